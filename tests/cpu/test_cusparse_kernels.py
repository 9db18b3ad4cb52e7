"""The cuSPARSE kernels through the real Python path, over a stand-in for the library on CPU memory."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cusparse_cases import CASES, CPU, CUDA, CusparseKernel, chosen, fake_of, over, pack, spec_of
from fake_cusparse import FakeLibrary
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.cusparse import product as cusparse_product
from sparsify_compiler.runtime.cusparse.blocked_ell import CusparseBlockedEll
from sparsify_compiler.runtime.cusparse.bsr import CusparseBsr
from sparsify_compiler.runtime.cusparse.csr import CusparseCsr
from sparsify_compiler.runtime.cusparse.plans import InstalledLibrary
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.oracle import difference


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every new tensor with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_every_variant_equals_float64_over_shapes_and_dtypes(
    kind: type[CusparseKernel], pattern: Pattern, dtype: torch.dtype
) -> None:
    kernel = over(kind)
    if kernel.rejects(spec_of(pack(pattern, 8, 8, dtype), CUDA)):
        assert (kind, dtype) == (CusparseBlockedEll, torch.float64)
        return
    generator = torch.Generator().manual_seed(1)
    for out, in_ in ((1, 1), (7, 5), (33, 70), (64, 48)) if dtype == torch.float16 else ((33, 70),):
        packed = pack(pattern, out, in_, dtype)
        spec = spec_of(packed)
        prepared, bias = kernel.prepare(packed, spec), torch.randn(out, generator=generator).to(dtype)
        for tokens in (0, 1, 3, 17):
            x = torch.randn(tokens, in_, generator=generator).to(dtype)
            for name in ("", *kernel.variants(spec, max(tokens, 1))):
                for added, activation in ((None, None), (bias, None), (bias, "gelu")):
                    y = kernel.run(chosen(prepared, name), x, added, activation)  # type: ignore[arg-type]
                    assert difference(y, x, unpack(packed), added, activation) is None, name  # type: ignore[arg-type]
                    assert y.is_contiguous()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("kind", "pattern"), [CASES[0], CASES[5], CASES[7]], ids=str)
def test_all_token_counts_are_right(kind: type[CusparseKernel], pattern: Pattern) -> None:
    kernel, packed = over(kind), pack(pattern, 19, 37, torch.float16)
    prepared = kernel.prepare(packed, spec_of(packed))
    for tokens in range(131):
        x = torch.randn(tokens, 37).half()
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_bias_and_activation_follow(kind: type[CusparseKernel], pattern: Pattern, activation: Activation) -> None:
    kernel, packed = over(kind), pack(pattern, 24, 20)
    prepared = kernel.prepare(packed, spec_of(packed))
    for tokens in (1, 9):
        x, bias = torch.randn(tokens, 20), torch.randn(24)
        for added in (bias, None):
            y = kernel.run(prepared, x, added, activation)
            assert difference(y, x, unpack(packed), added, activation) is None


@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_empty_weights_and_rows_are_computed(kind: type[CusparseKernel], pattern: Pattern) -> None:
    kernel, weight, x, bias = over(kind), torch.randn(40, 64), torch.randn(4, 64), torch.randn(40)
    keep = choose(pattern, weight)
    if isinstance(pattern, NM):
        masks = (keep,)
    else:
        keep[: 32 // pattern.rows * pattern.rows if isinstance(pattern, Block) else 32] = False
        masks = (keep, torch.zeros_like(keep))
    for mask in masks:
        packed = format_for(pattern).pack(weight, mask, pattern)
        prepared = kernel.prepare(packed, spec_of(packed))
        for added in (None, bias):
            assert difference(kernel.run(prepared, x, added), x, weight * mask, added) is None


@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_inputs_of_any_strides_give_the_same_result(kind: type[CusparseKernel], pattern: Pattern) -> None:
    kernel, packed, base = over(kind), pack(pattern, 12, 10), torch.randn(16, 20)
    prepared = kernel.prepare(packed, spec_of(packed))
    for x in (
        base[::2, ::2],
        base.T[:8, :10],
        base[0, :10].expand(8, 10),
        base[8:, 5:15],
        base.view(-1)[1:81].view(8, 10),
    ):
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None


@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_the_comparison_fails_on_one_corrupted_value(kind: type[CusparseKernel], pattern: Pattern) -> None:
    kernel, packed = over(kind), pack(pattern, 64, 64)
    prepared, x = kernel.prepare(packed, spec_of(packed)), torch.randn(16, 64)
    values = prepared.tensors[-1].clone()
    values.view(-1)[int(values.view(-1).nonzero()[0])] += 2
    broken = dataclasses.replace(prepared, tensors=(*prepared.tensors[:-1], values))
    assert "outputs differ from float64" in (difference(kernel.run(broken, x), x, unpack(packed)) or "")


def test_csr_is_packed_as_numpy_would() -> None:
    packed = pack(Unstructured(), 13, 21)
    starts, columns, values = (t.numpy() for t in CusparseCsr().prepare(packed, spec_of(packed)).tensors)
    weight = unpack(packed).numpy()
    assert starts.dtype == columns.dtype == np.int32
    for row in range(13):
        mine = slice(starts[row], starts[row + 1])
        np.testing.assert_array_equal(columns[mine], np.flatnonzero(weight[row]))
        np.testing.assert_array_equal(values[mine], weight[row][weight[row] != 0])


def test_bsr_and_csr_share_the_packed_values() -> None:
    for kernel, pattern in ((CusparseCsr(), Unstructured()), (CusparseBsr(), Block(4, 4))):
        packed = pack(pattern, 16, 16)
        values = kernel.prepare(packed, spec_of(packed)).tensors[-1]
        assert values.data_ptr() == packed.tensors["values"].data_ptr()


def test_blocked_ell_is_packed_as_numpy_would() -> None:
    packed = pack(Block(8, 8), 30, 50, sparsity=0.6)
    columns, values = (t.numpy() for t in over(CusparseBlockedEll).prepare(packed, spec_of(packed)).tensors)
    weight = np.zeros((32, 56), np.float32)
    weight[:30, :50] = unpack(packed).numpy()
    width = columns.shape[1]
    flat = values.reshape(32, width * 8)  # NVIDIA's values: one row of W after the other, tiles side by side
    for tile_row in range(4):
        kept = [c for c in range(7) if weight[tile_row * 8 : tile_row * 8 + 8, c * 8 : c * 8 + 8].any()]
        assert columns[tile_row].tolist() == kept + [-1] * (width - len(kept))
        for slot, column in enumerate(columns[tile_row]):
            stored = flat[tile_row * 8 : tile_row * 8 + 8, slot * 8 : slot * 8 + 8]
            expected = weight[tile_row * 8 : tile_row * 8 + 8, column * 8 : column * 8 + 8] if column >= 0 else 0
            np.testing.assert_array_equal(stored, np.broadcast_to(expected, (8, 8)))


def test_blocked_ell_refuses_much_padding_with_the_numbers() -> None:
    keep = torch.zeros(64, 64, dtype=torch.bool)
    keep[:8] = True
    keep[8:16, :8] = True
    packed = format_for(Block(8, 8)).pack(torch.randn(64, 64), keep, Block(8, 8))
    with pytest.raises(KernelError, match=r"8 x 8 for 9 kept, 7\.11 times as many, above the limit of 2"):
        CusparseBlockedEll().prepare(packed, spec_of(packed))


def test_too_many_tokens_for_one_call_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparse_product, "MOST_COLUMNS", 16)
    kernel, packed, x = over(CusparseCsr), pack(Unstructured(), 12, 10), torch.randn(41, 10)
    y = kernel.run(kernel.prepare(packed, spec_of(packed)), x, torch.ones(12))
    assert difference(y, x, unpack(packed), torch.ones(12)) is None
    assert fake_of(kernel).algorithms == [("SpMM", 12)] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_rows_of_row_major_operands_start_at_16_bytes(dtype: torch.dtype) -> None:
    kernel, packed = over(CusparseCsr), pack(Unstructured(), 12, 10, dtype)
    kernel.run(chosen(kernel.prepare(packed, spec_of(packed)), "alg12.rows"), torch.randn(5, 10).to(dtype))
    operands = [made for made in fake_of(kernel).living.values() if made.kind == "dense"]
    assert [(made.rows, made.columns) for made in operands] == [(10, 5), (12, 5)]
    assert all(made.order == 2 and made.leading * dtype.itemsize % 16 == 0 for made in operands)


def test_the_chosen_algorithm_is_the_one_called() -> None:
    kernel, packed = over(CusparseCsr), pack(Unstructured(), 12, 10)
    prepared, fake = kernel.prepare(packed, spec_of(packed)), fake_of(kernel)
    tuned = dataclasses.replace(prepared, variants="1=spmv2;8=alg4.cols;64=spmv3")
    for tokens in (1, 8, 64):
        kernel.run(tuned, torch.randn(tokens, 10))
    assert fake.algorithms == [("SpMV", 2), ("SpMM", 4), ("SpMM", 12)]  # 64 single vectors would be absurd
    with pytest.raises(KernelError, match="cuSPARSE variant 'alg12' is not"):
        kernel.run(chosen(prepared, "alg12"), torch.randn(2, 10))


def test_sixteen_bit_csr_has_the_one_algorithm_that_the_library_runs() -> None:
    kernel, packed = over(CusparseCsr), pack(Unstructured(), 12, 10)
    wide = kernel.variants(spec_of(packed), 64)
    narrow = kernel.variants(dataclasses.replace(spec_of(packed), dtype=torch.float16), 64)
    assert {name.split(".")[0] for name in narrow} == {"alg12"}
    assert {name.split(".")[0] for name in wide} == {"alg12", "alg6", "alg4"}
    assert kernel.variants(spec_of(packed), 1)[0] == "spmv3"


def test_bsr_without_vectors_in_the_library_multiplies_matrices() -> None:
    kernel, packed = over(CusparseBsr, FakeLibrary(version=(12, 5, 10))), pack(Block(4, 4), 16, 16)
    x = torch.randn(1, 16)
    assert difference(kernel.run(kernel.prepare(packed, spec_of(packed)), x), x, unpack(packed)) is None
    assert fake_of(kernel).algorithms == [("SpMM", 14)]
    assert kernel.variants(spec_of(packed), 1) == ("alg14.rows", "alg14.cols", "alg14.mixed")


def test_each_kernel_says_what_it_cannot_run() -> None:
    csr, bsr, ell = over(CusparseCsr), over(CusparseBsr), over(CusparseBlockedEll)
    spec = MatmulSpec(64, 64, torch.float16, Block(16, 16), 0.5, (1,), CUDA, (9, 0))
    assert [kernel.rejects(spec) for kernel in (csr, bsr, ell)] == [None] * 3
    assert "runs on cuda; found cpu" in (csr.rejects(dataclasses.replace(spec, device=CPU)) or "")
    old = dataclasses.replace(spec, dtype=torch.bfloat16, capability=(7, 5))
    assert csr.rejects(old) == "bfloat16 needs compute capability 8.0 or later; found 7.5"
    assert "found an unknown one" in (csr.rejects(dataclasses.replace(spec, capability=None)) or "")
    assert "found float64" in (ell.rejects(dataclasses.replace(spec, dtype=torch.float64)) or "")
    assert "found float8" in (csr.rejects(dataclasses.replace(spec, dtype=torch.float8_e4m3fn)) or "")
    assert "do not fit int32" in (csr.rejects(dataclasses.replace(spec, out=2**20, in_=2**20)) or "")
    unsquare = dataclasses.replace(spec, pattern=Block(16, 8))
    assert bsr.rejects(unsquare) == "runs square blocks; found 16x8"
    odd = dataclasses.replace(spec, pattern=Block(12, 12))
    assert ell.rejects(odd) == "runs square blocks of 8, 16, 32, 64, 128; found 12x12"
    assert bsr.rejects(odd) is None
    past = over(CusparseBsr, FakeLibrary(version=(12, 5, 0))).rejects(spec)
    assert (past or "").startswith("SpMM with a BSR matrix needs cuSPARSE 12.5.1 or newer; found 12.5.0: pip install")


def test_a_missing_library_is_a_reason_and_an_error_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "found no libcusparse.so: pip install nvidia-cusparse"
    monkeypatch.setattr("sparsify_compiler.runtime.cusparse.plans.load", lambda: words)
    spec = MatmulSpec(64, 64, torch.float16, Block(16, 16), 0.5, (1,), CUDA, (9, 0))
    for kernel in (CusparseCsr(), CusparseBsr(), CusparseBlockedEll()):
        assert kernel.rejects(spec) == words
    with pytest.raises(KernelError, match="cuSPARSE cannot be called: found no libcusparse"):
        InstalledLibrary().plans()


def test_kernels_are_values() -> None:
    for kind in (CusparseCsr, CusparseBsr, CusparseBlockedEll):
        assert kind() == kind()
        assert hash(kind()) == hash(kind())
