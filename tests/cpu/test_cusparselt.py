"""cuSPARSELt: what is asked of it, by a library that stands in for it, and by its header where that is installed."""

import ctypes
import dataclasses
import gc
import re
import threading
from pathlib import Path

import pytest
import torch
from cusparselt_stand_in import ALGORITHMS, StandIn
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm import cusparselt_plans
from sparsify_compiler.runtime.nm.cusparselt import CuSparseLt, TorchProducts, read_algorithm
from sparsify_compiler.runtime.nm.cusparselt_plans import (
    SIGNATURES,
    Algorithm,
    Plans,
    find_library,
    plan_for,
    wheel_files,
)
from sparsify_compiler.runtime.oracle import difference

HALF, BRAIN = torch.float16, torch.bfloat16
SPEC = MatmulSpec(64, 64, HALF, NM(2, 4), 0.5, (1,), torch.device("cuda", 0), (9, 0))


def pack(out: int, in_: int, dtype: torch.dtype = HALF) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out + in_)).to(dtype)
    return format_for(NM(2, 4)).pack(weight, choose(NM(2, 4), weight), NM(2, 4))


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(("out", "in_"), [(64, 48), (33, 70), (7, 5), (1, 1)])
def test_odd_sizes_are_padded_and_bias_and_activation_follow(out: int, in_: int, dtype: torch.dtype) -> None:
    packed, kernel, generator = pack(out, in_, dtype), CuSparseLt(Plans(StandIn())), torch.Generator().manual_seed(1)
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    bias = torch.randn(out, generator=generator).to(dtype)
    activations: tuple[Activation | None, ...] = (None, "relu", "gelu", "silu")
    for place, tokens in enumerate((0, 1, 7, 8, 33, 130)):
        x = torch.randn(tokens, in_, generator=generator).to(dtype)
        activation = activations[place % 4]
        for given in (None, bias):
            # GELU and SiLU follow a result that was rounded already: the bound has 4 roundings, that is one more.
            assert difference(kernel.run(prepared, x, given, activation), x, unpack(packed), given, activation) is None
    for x in (torch.randn(16, 2 * in_).to(dtype)[:, ::2], torch.randn(in_, 16).to(dtype).T):
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None


def test_a_repeated_call_is_one_call_of_the_library() -> None:
    library = StandIn()
    kernel, packed = CuSparseLt(Plans(library)), pack(32, 64)
    prepared = kernel.prepare(packed, spec_for(packed, (8,)))
    x, bias = torch.randn(8, 64).to(HALF), torch.randn(32).to(HALF)
    first = kernel.run(prepared, x, bias, "relu")
    library.calls.clear()
    assert torch.equal(kernel.run(prepared, x, bias, "relu"), first)
    assert library.calls == ["cusparseLtMatmul"]
    kernel.run(prepared, torch.randn(5, 64).to(HALF), bias, "relu")  # 5 and 8 tokens are 8 to the library
    assert library.calls == ["cusparseLtMatmul"] * 2
    kernel.run(prepared, torch.randn(9, 64).to(HALF), bias, "relu")
    assert library.calls.count("plan") == 1
    odd, narrow = pack(20, 64), CuSparseLt(Plans(library))
    rows = narrow.prepare(odd, spec_for(odd, (8,)))
    narrow.run(rows, x, torch.randn(20).to(HALF))
    library.calls.clear()
    narrow.run(rows, x, torch.randn(20).to(HALF))  # a padded bias has a new address every time, and needs no plan
    assert library.calls == ["cusparseLtMatmul"]


def test_the_tuned_algorithm_is_asked_for_and_an_unknown_one_is_refused() -> None:
    library = StandIn()
    kernel, packed = CuSparseLt(Plans(library)), pack(32, 64)
    prepared = dataclasses.replace(kernel.prepare(packed, spec_for(packed, (8,))), variants="8=alg3;64=alg1.mode6")
    asked = []
    for tokens in (3, 60, 200):
        x = torch.randn(tokens, 64).to(HALF)
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None
    asked = [content[2] for content in library.made.values() if content[0] == "algorithm"]
    assert {0: 3} in asked
    assert {0: 1, 4: 6} in asked
    with pytest.raises(KernelError, match="cusparseLtMatmulAlgSetAttribute returned status 3"):
        kernel.run(dataclasses.replace(prepared, variants="8=alg9"), torch.randn(8, 64).to(HALF))


def test_algorithms_are_named_and_read() -> None:
    assert read_algorithm("alg3") == Algorithm(3)
    assert read_algorithm("alg12.splitk2.mode5") == Algorithm(12, 2, 5)
    assert read_algorithm("alg0.splitk-1") == Algorithm(0, -1)
    for name in ("", "3", "alg", "alg3.mode", "alg-1", "few.r64.t8.s1"):
        with pytest.raises(KernelError, match="no variant"):
            read_algorithm(name)
    plans, cpu = Plans(StandIn()), torch.device("cpu")
    assert plans.algorithms(32, 64, 8, HALF, cpu) == ALGORITHMS
    assert CuSparseLt(TorchProducts()).variants(SPEC, 8) == tuple(f"alg{i}" for i in range(6))


def test_each_thread_has_its_own_handle_and_plans() -> None:
    library = StandIn()
    kernel, packed = CuSparseLt(Plans(library)), pack(32, 64)
    prepared, x = kernel.prepare(packed, spec_for(packed, (8,))), torch.randn(8, 64).to(HALF)
    results = [kernel.run(prepared, x)]
    thread = threading.Thread(target=lambda: results.append(kernel.run(prepared, x)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], results[1])
    assert library.calls.count("cusparseLtInit") == 2
    assert library.calls.count("plan") == 2


def test_plans_that_are_dropped_are_given_back() -> None:
    library = StandIn()
    kernel, packed = CuSparseLt(Plans(library)), pack(32, 64)
    prepared = kernel.prepare(packed, spec_for(packed, (8,)))
    before = library.destroyed
    kernel.run(prepared, torch.randn(8, 64).to(HALF))
    plan_for.cache_clear()
    gc.collect()
    assert library.destroyed == before + 4  # a plan and three matrices


def test_a_weight_that_is_not_two_of_four_is_counted() -> None:
    tensors = {"values": torch.ones(4, 6).to(HALF), "mask": torch.full((4, 1), 0x77).byte()}
    three = Packed("nm", NM(3, 4), (4, 8), tensors)
    with pytest.raises(KernelError, match="not 2:4: 8 groups of four columns"):
        CuSparseLt(Plans(StandIn())).prepare(three, spec_for(three, (1,)))


def test_it_says_what_it_cannot_run() -> None:
    kernel = CuSparseLt(Plans(StandIn()))

    def reason(**changes: object) -> str:
        return kernel.rejects(dataclasses.replace(SPEC, **changes)) or ""

    assert reason() == ""
    assert reason(capability=(8, 0)) == ""
    assert "runs 2:4, 1:4 and 1:2; found 8:16" in reason(pattern=NM(8, 16))
    assert "start again after 9 columns" in reason(run=9)
    assert "found float32" in reason(dtype=torch.float32)
    assert "found cpu" in reason(device=torch.device("cpu"))
    assert "8.0 or later; found 7.5" in reason(capability=(7, 5))
    assert "found an unknown one" in reason(capability=None)
    if not torch.backends.cusparselt.is_available():
        assert "without cuSPARSELt" in (CuSparseLt(TorchProducts()).rejects(SPEC) or "")


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cusparselt_plans.ctypes, "CDLL", refuse)
    find_library.cache_clear()
    try:
        assert "pip install nvidia-cusparselt-cu13" in (CuSparseLt().rejects(SPEC) or "")
        with pytest.raises(KernelError, match=r"no libcusparseLt\.so\.0"):
            Plans().compress(torch.zeros(16, 16, dtype=HALF))
    finally:
        find_library.cache_clear()


def test_pytorch_has_the_operators_with_the_arguments_that_are_passed() -> None:
    multiply = torch.ops.aten._cslt_sparse_mm.default._schema
    names = [argument.name for argument in multiply.arguments]
    assert names[:3] == ["compressed_A", "dense_B", "bias"]
    assert {"transpose_result", "alg_id", "split_k", "split_k_mode"} <= set(names)
    assert len(torch.ops.aten._cslt_compress.default._schema.arguments) == 1


def header() -> Path | None:
    return next(iter(wheel_files("include/cusparseLt.h")), None)


@pytest.mark.skipif(header() is None, reason="needs cusparseLt.h, of the wheel nvidia-cusparselt-cu13")
def test_arguments_and_numbers_are_those_of_the_installed_header() -> None:
    path = header()
    assert path is not None
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    kinds = {
        "int64_t": ctypes.c_int64,
        "uint32_t": ctypes.c_uint32,
        "int32_t": ctypes.c_int32,
        "size_t": ctypes.c_size_t,
    }
    for function, arguments in SIGNATURES.items():
        if (match := re.search(rf"{function}\s*\(([^)]*)\)", text)) is None:
            assert function == "cusparseLtMatmulAlgSelectionDestroy"
            continue
        words = [re.sub(r"\bconst\b", "", part).split()[0].rstrip("*") for part in match[1].split(",")]
        pointers = ["*" in part or "cudaStream_t " in part for part in match[1].split(",")]
        expected = [
            ctypes.c_void_p if pointer else kinds.get(word, ctypes.c_int)
            for word, pointer in zip(words, pointers, strict=True)
        ]
        assert list(arguments) == expected, function

    def number(enumeration: str, name: str) -> int:
        bodies = re.findall(r"typedef enum \{([^}]*)\}\s*(\w+);", text)
        body = next(body for body, known in bodies if known == enumeration)
        return [part.split()[0] for part in body.split(",") if part.strip()].index(name)

    attribute = "cusparseLtMatmulDescAttribute_t"
    assert number(attribute, "CUSPARSELT_MATMUL_BIAS_POINTER") == cusparselt_plans.BIAS_POINTER
    assert number(attribute, "CUSPARSELT_MATMUL_ACTIVATION_RELU") == cusparselt_plans.RELU
    assert number("cusparseComputeType", "CUSPARSE_COMPUTE_32F") == cusparselt_plans.COMPUTE_FLOAT32
    algorithm = "cusparseLtMatmulAlgAttribute_t"
    assert number(algorithm, "CUSPARSELT_MATMUL_ALG_CONFIG_ID") == cusparselt_plans.ALGORITHM_ID
    assert number(algorithm, "CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID") == cusparselt_plans.ALGORITHM_COUNT
    assert number(algorithm, "CUSPARSELT_MATMUL_SPLIT_K") == cusparselt_plans.SPLIT
    assert number(algorithm, "CUSPARSELT_MATMUL_SPLIT_K_MODE") == cusparselt_plans.SPLIT_MODE
    sizes = [int(size) for size in re.findall(r"uint8_t data\[(\d+)\]", text)]
    assert len(sizes) == 5
    assert max(sizes) <= cusparselt_plans.STRUCT_BYTES
