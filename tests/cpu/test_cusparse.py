"""The C layer over cuSPARSE: against the real header and the real library where they are installed, without a GPU."""

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cusparse import FakeLibrary

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.cusparse import library as cusparse
from sparsify_compiler.runtime.cusparse.blocked_ell import BlockedEllMatrix
from sparsify_compiler.runtime.cusparse.bsr import MATRIX_VERSION, VECTOR_VERSION, BsrMatrix
from sparsify_compiler.runtime.cusparse.csr import CsrMatrix
from sparsify_compiler.runtime.cusparse.library import DATA_TYPES, SIGNATURES, Calls, Operation, Order, SpMM, SpMV, load

NUMBERS = {
    "CUSPARSE_ORDER_COL": Order.COLUMN,
    "CUSPARSE_ORDER_ROW": Order.ROW,
    "CUSPARSE_OPERATION_NON_TRANSPOSE": Operation.NONE,
    "CUSPARSE_OPERATION_TRANSPOSE": Operation.TRANSPOSE,
    "CUSPARSE_SPMM_CSR_ALG1": SpMM.CSR_1,
    "CUSPARSE_SPMM_CSR_ALG2": SpMM.CSR_2,
    "CUSPARSE_SPMM_CSR_ALG3": SpMM.CSR_3,
    "CUSPARSE_SPMM_BLOCKED_ELL_ALG1": SpMM.BLOCKED_ELL,
    "CUSPARSE_SPMM_BSR_ALG1": SpMM.BSR,
    "CUSPARSE_SPMV_CSR_ALG1": SpMV.CSR_1,
    "CUSPARSE_SPMV_CSR_ALG2": SpMV.CSR_2,
    "CUSPARSE_SPMV_BSR_ALG1": SpMV.BSR,
    "CUSPARSE_INDEX_32I": cusparse.INDEX_32I,
    "CUSPARSE_INDEX_BASE_ZERO": cusparse.BASE_ZERO,
    "CUSPARSE_STATUS_SUCCESS": cusparse.SUCCESS,
}
SINCE = {"CUSPARSE_SPMM_BSR_ALG1": MATRIX_VERSION, "CUSPARSE_SPMV_BSR_ALG1": VECTOR_VERSION}


def headers() -> Iterator[Path]:
    """Find cusparse.h in the nvidia wheels and in a CUDA toolkit."""
    yield from cusparse.installed_files("include", "cusparse.h")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        path = Path(os.environ.get(name) or "absent") / "include" / "cusparse.h"
        if path.is_file():
            yield path
    system = Path("/usr/local/cuda/include/cusparse.h")
    if system.is_file():
        yield system


@pytest.fixture(scope="module")
def header() -> str:
    for path in headers():
        text = path.read_text(encoding="utf-8", errors="replace")
        return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    pytest.skip("needs cusparse.h; pip install nvidia-cusparse brings one")


def c_type(declaration: str) -> type:
    """The ctypes type of one argument as a header declares it."""
    stars = declaration.count("*")
    base = re.sub(r"\bconst\b|\*", " ", declaration).split()[0]
    handles = base.endswith("_t") and ("Descr" in base or base == "cusparseHandle_t" or base == "cudaStream_t")
    if stars and handles:
        return ctypes.POINTER(ctypes.c_void_p)
    if handles or base == "void":
        return ctypes.c_void_p
    plain = {"int64_t": ctypes.c_int64, "size_t": ctypes.c_size_t}.get(base, ctypes.c_int)  # the rest are enums
    return ctypes.POINTER(plain) if stars else plain


def declared(name: str, header: str) -> tuple[type, ...]:
    match = re.search(rf"\b{name}\s*\(([^)]*)\)\s*;", header)
    assert match is not None, f"the header has no {name}"
    return tuple(c_type(argument) for argument in match[1].split(","))


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_signature_is_the_headers(name: str, header: str) -> None:
    assert SIGNATURES[name] == declared(name, header)


def test_the_comparison_with_the_header_can_fail() -> None:
    text = "cusparseStatus_t CUSPARSEAPI\ncusparseSetStream(cusparseHandle_t handle,\n  cudaStream_t streamId);"
    assert declared("cusparseSetStream", text) == SIGNATURES["cusparseSetStream"]
    assert declared("cusparseSetStream", text.replace("cudaStream_t", "int64_t")) != SIGNATURES["cusparseSetStream"]
    assert declared("f", "f(const void* a, size_t* b, int c);") == (
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_int,
    )


def test_every_number_is_the_headers(header: str) -> None:
    values = {name: int(value) for name, value in re.findall(r"\b(CUSPARSE_\w+)\s*=\s*(\d+)", header)}
    parts = [int(re.search(rf"CUSPARSE_VER_{part}\s+(\d+)", header)[1]) for part in ("MAJOR", "MINOR", "PATCH")]  # type: ignore[index]
    for name, number in NUMBERS.items():
        if tuple(parts) >= SINCE.get(name, (0, 0, 0)):
            assert values[name] == number, name
        else:
            assert name not in values


@pytest.fixture(scope="module")
def real() -> Calls:
    calls = load()
    if isinstance(calls, str):
        pytest.skip(calls)
    return calls


def test_the_real_library_names_its_version_and_errors_without_a_gpu(real: Calls) -> None:
    assert real.version >= cusparse.OLDEST_VERSION
    assert real.error_name(10) == "CUSPARSE_STATUS_NOT_SUPPORTED"


@pytest.mark.parametrize("dtype", DATA_TYPES, ids=str)
def test_the_real_library_accepts_our_descriptors(real: Calls, dtype: torch.dtype) -> None:
    starts, columns, values = torch.zeros(9).int(), torch.zeros(64).int(), torch.zeros(4096, dtype=dtype)
    matrices = [
        (CsrMatrix((8, 8)), (starts, columns[:5], values[:5])),
        (BsrMatrix((2, 3), 16), (starts[:3], columns[:4], values[:1024].reshape(4, 16, 16))),
        (BlockedEllMatrix((2, 3), 16, 2), (columns[:4], values[:1024].reshape(2, 16, 2, 16))),
    ]
    for matrix, tensors in matrices:
        made = matrix.create(real, tensors)  # type: ignore[attr-defined]
        assert made
        real.call("cusparseDestroySpMat", made)
    for order in Order:
        made = real.create("cusparseCreateDnMat", 5, 5, 8, values.data_ptr(), DATA_TYPES[dtype], order)
        real.call("cusparseDnMatSetValues", made, values.data_ptr())
        real.call("cusparseDestroyDnMat", made)


def test_the_real_library_refuses_what_the_fake_refuses(real: Calls, capfd: pytest.CaptureFixture[str]) -> None:
    """Checked without a GPU: leading dimensions, square tiles, whole tiles, the width of Blocked-ELL."""
    bad = [
        ("cusparseCreateDnMat", (4, 3, 3, 4096, 2, 1)),
        ("cusparseCreateDnMat", (4, 3, 2, 4096, 2, 2)),
        ("cusparseCreateBsr", (2, 2, 3, 16, 8, 4096, 4096, 4096, 2, 2, 0, 2, 2)),
        ("cusparseCreateBlockedEll", (7, 8, 2, 4, 4096, 4096, 2, 0, 2)),
        ("cusparseCreateBlockedEll", (8, 8, 2, 3, 4096, 4096, 2, 0, 2)),
        ("cusparseCreateBlockedEll", (8, 8, 2, 10, 4096, 4096, 2, 0, 2)),
        ("cusparseCreateCsr", (8, 8, 65, 4096, 4096, 4096, 2, 2, 0, 14)),
    ]
    for calls in (real, Calls(FakeLibrary())):
        for name, arguments in bad:
            with pytest.raises(KernelError, match=f"{name}: CUSPARSE_STATUS_INVALID_VALUE"):
                calls.create(name, *arguments)
    capfd.readouterr()  # the library explains itself on the error stream


def test_an_error_has_the_librarys_own_name_for_it() -> None:
    calls = Calls(FakeLibrary(refused=frozenset({"cusparseCreate"})))
    with pytest.raises(KernelError, match=r"cusparseCreate: CUSPARSE_STATUS_NOT_SUPPORTED \(10\)"):
        calls.create("cusparseCreate")


def test_a_library_without_a_function_is_refused_by_name() -> None:
    fake = FakeLibrary()
    del fake.cusparseSpMV_preprocess  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match="has no cusparseSpMV_preprocess: it is too old; pip install"):
        Calls(fake)


def loaded(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary | None) -> Calls | str:
    monkeypatch.setattr(cusparse, "_loaded", lambda: library)
    monkeypatch.setattr(cusparse, "_cupys", lambda: None)
    monkeypatch.setattr(cusparse, "_found", lambda: None)
    return load.__wrapped__()


def test_loading_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(monkeypatch, None) == (
        "found no libcusparse.so: pip install nvidia-cusparse (CUDA 13), or nvidia-cusparse-cu12"
    )
    old = loaded(monkeypatch, FakeLibrary(version=(12, 3, 0)))
    assert isinstance(old, str)
    assert old.startswith("needs cuSPARSE 12.4.1 or newer; found 12.3.0: pip install")
    broken = loaded(monkeypatch, FakeLibrary(refused=frozenset({"cusparseGetProperty"})))
    assert broken == "cusparseGetProperty: CUSPARSE_STATUS_NOT_SUPPORTED (10)"
    assert isinstance(loaded(monkeypatch, FakeLibrary()), Calls)
    monkeypatch.setattr(cusparse.sys, "platform", "win32")
    assert loaded(monkeypatch, FakeLibrary()) == "cuSPARSE is called on Linux only; found win32"


def test_loading_asks_cupy_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cusparse._cupys() is None
    assert list(cusparse.installed_files("lib", "*")) == []
