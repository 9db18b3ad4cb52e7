"""Every kernel against the float64 product, within the bound of runtime/oracle.py, which can fail."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from kernels import KERNELS, LAYOUT_PATTERNS, accepted, choose, skip_without_mkl
from methods import KERNELS as TESTED
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import kernel_named, kernels, spec_for
from sparsify_compiler.runtime.oracle import difference

CPU = torch.device("cpu")
SHAPES = ((1, 1), (7, 5), (33, 70), (64, 48))
TOKENS = (0, 1, 3, 17, 130)


def pack(pattern: Pattern, out: int, in_: int, dtype: torch.dtype = torch.float32, sparsity: float = 0.5) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out + in_)).to(dtype)
    return format_for(pattern).pack(weight, choose(pattern, weight, sparsity), pattern)


def dtypes(kernel: Kernel, pattern: Pattern) -> Iterator[torch.dtype]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        if kernel.rejects(MatmulSpec(8, 8, dtype, pattern, 0.5, (1,), CPU)) is None:
            yield dtype


def usable(kernel: Kernel) -> Pattern:
    """Return a pattern that the kernel runs, or skip with its reason: a library that is not installed."""
    skip_without_mkl(kernel.name)
    found = accepted(kernel, CPU, (torch.float32,))
    if not found:
        pytest.skip(kernel.rejects(MatmulSpec(8, 8, torch.float32, Block(4, 4), 0.5, (1,), CPU)) or "")
    return found[0]


def check(kernel: Kernel, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None, act: Activation | None) -> None:
    skip_without_mkl(kernel.name)
    spec = spec_for(packed, (x.shape[0],))
    assert kernel.rejects(spec) is None
    y = kernel.run(kernel.prepare(packed, spec), x, bias, act)
    assert difference(y, x, unpack(packed), bias, act) is None


@pytest.mark.parametrize("pattern", LAYOUT_PATTERNS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_equals_float64_over_shapes_tokens_and_dtypes(kernel: Kernel, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(1)
    skip_without_mkl(kernel.name)
    if not [*dtypes(kernel, pattern)]:
        pytest.skip(kernel.rejects(MatmulSpec(8, 8, torch.float32, pattern, 0.5, (1,), CPU)) or "")
    for dtype in dtypes(kernel, pattern):
        for out, in_ in SHAPES if dtype == torch.float32 else SHAPES[2:3]:
            packed = pack(pattern, out, in_, dtype)
            bias = torch.randn(out, generator=generator).to(dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, in_, generator=generator).to(dtype)
                check(kernel, packed, x, bias if tokens % 2 else None, None)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_applies_bias_and_activation(kernel: Kernel, activation: Activation) -> None:
    packed = pack(usable(kernel), 24, 20)
    x, bias = torch.randn(9, 20), torch.randn(24)
    check(kernel, packed, x, bias, activation)
    check(kernel, packed, x, None, activation)
    # An independent reference: PyTorch's own module on the dense weight.
    modules = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}
    y = kernel.run(kernel.prepare(packed, spec_for(packed, (9,))), x, bias, activation)
    expected = modules[activation](functional.linear(x, unpack(packed), bias))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # 20 float32 terms of size 1: 20 * 6e-8 * 4


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_empty_and_full_rows_and_an_empty_weight_are_computed(kernel: Kernel) -> None:
    usable(kernel)
    whole = kernel.rejects(MatmulSpec(8, 8, torch.float32, Unstructured(), 0.5, (1,), CPU)) is not None
    pattern: Pattern = Block(4, 4) if whole else Unstructured()
    tiles = torch.rand(6, 10) > 0.5
    tiles[0], tiles[5], tiles[2] = False, False, True
    x = torch.randn(4, 40)
    for chosen in (tiles, torch.zeros_like(tiles), torch.ones_like(tiles)):
        keep = chosen.repeat_interleave(4, 0).repeat_interleave(4, 1)
        check(kernel, format_for(pattern).pack(torch.randn(24, 40), keep, pattern), x, torch.randn(24), None)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_inputs_of_any_strides_give_the_same_result(kernel: Kernel) -> None:
    packed = pack(usable(kernel), 12, 10)
    prepared = kernel.prepare(packed, spec_for(packed, (8,)))
    base = torch.randn(16, 20)
    for x in (base[::2, ::2], base.T[:8, :10], base[0, :10].expand(8, 10), base[8:, 5:15]):
        assert not x.is_contiguous()
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 4)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_comparison_fails_on_one_corrupted_value(kernel: Kernel, pattern: Pattern) -> None:
    if not [*dtypes(kernel, pattern)]:
        pytest.skip(kernel.rejects(MatmulSpec(8, 8, torch.float32, pattern, 0.5, (1,), CPU)) or "")
    for dtype in dtypes(kernel, pattern):
        packed = pack(pattern, 64, 256, dtype)
        values = packed.tensors["values"].clone()
        values.view(-1)[values.numel() // 2] += 2
        broken = dataclasses.replace(packed, tensors={**packed.tensors, "values": values})
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
        y = kernel.run(kernel.prepare(broken, spec_for(broken, (16,))), x)
        assert "outputs differ from float64" in (difference(y, x, unpack(packed)) or "")


def test_the_comparison_fails_on_nan_shapes_dtypes_and_a_missing_bias() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    y = functional.linear(x, weight, bias)
    assert difference(y, x, weight, bias) is None
    assert difference(y, x, weight) is not None
    assert "expected" in (difference(y.T, x, weight, bias) or "")
    assert "expected" in (difference(y.double(), x, weight, bias) or "")
    y[1, 1] = float("nan")
    assert "1 of 15 outputs" in (difference(y, x, weight, bias) or "")


def test_csr_says_what_it_cannot_run() -> None:
    csr = kernel_named("torch_csr")
    spec = MatmulSpec(64, 64, torch.float16, Unstructured(), 0.5, (1,), CPU)
    assert "runs float32 and float64 on a CPU; found float16" in (csr.rejects(spec) or "")
    huge = dataclasses.replace(spec, dtype=torch.float32, out=2**20, in_=2**20)
    assert "do not fit int32" in (csr.rejects(huge) or "")
    cuda = dataclasses.replace(spec, dtype=torch.bfloat16, device=torch.device("cuda", 0), capability=(7, 5))
    assert "needs compute capability 8.0 or later; found 7.5" in (csr.rejects(cuda) or "")
    assert csr.rejects(dataclasses.replace(cuda, capability=(9, 0))) is None
    assert "runs on cpu and cuda" in (csr.rejects(dataclasses.replace(spec, device=torch.device("mps"))) or "")
    if torch.backends.mkl.is_available():  # and PyTorch really has none: the refusal is not out of date
        packed = pack(Unstructured(), 8, 8, torch.float16)
        with pytest.raises(NotImplementedError):
            csr.run(csr.prepare(packed, spec_for(packed, (3,))), torch.ones(3, 8, dtype=torch.float16))


def test_csr_refuses_a_cpu_without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    spec = MatmulSpec(64, 64, torch.float32, Unstructured(), 0.5, (1,), CPU)
    assert "without MKL" in (kernel_named("torch_csr").rejects(spec) or "")


def test_a_csr_kernel_shares_the_packed_values() -> None:
    packed = pack(NM(2, 4), 16, 16)
    prepared = kernel_named("torch_csr").prepare(packed, spec_for(packed, (1,)))
    assert prepared.tensors[2].data_ptr() == packed.tensors["values"].data_ptr()


def test_kernels_are_found_by_name_and_dense_comes_first() -> None:
    assert kernels()[0].name == "dense"
    names = [kernel.name for kernel in kernels()]
    assert sorted(names) == sorted([*TESTED, "block_triton"])  # which tests/interpreted runs
    assert all(kernel_named(kernel.name) == kernel for kernel in kernels())
    with pytest.raises(KernelError, match="kernel 'fast': this version has dense, nm24_mma"):
        kernel_named("fast")


def test_a_specification_describes_the_packed_weight() -> None:
    spec = spec_for(pack(NM(2, 4), 16, 32, torch.bfloat16), (1, 16))
    assert spec == MatmulSpec(16, 32, torch.bfloat16, NM(2, 4), 0.5, (1, 16), CPU, None)
