"""Every kernel made for a GPU, run on the CPU by what stands in for it, against float64; and promises they all keep."""

import pytest
import torch
from doubles import DOUBLES, Double
from emulated import EmulatedLauncher
from kernels import DTYPES, LAYOUT_PATTERNS, accepted, choose

from sparsify_compiler.kernel import Kernel, MatmulSpec, Packed
from sparsify_compiler.pattern import Block, Pattern
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import kernel_named, spec_for
from sparsify_compiler.runtime.oracle import difference

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
OUT, IN = 40, 72
TOKENS = (0, 1, 3, 17)

doubles = pytest.mark.parametrize("double", DOUBLES, ids=lambda double: double.name)


def made(double: Double) -> Kernel:
    """Make the kernel, or skip with the reason."""
    if double.emulated and (reason := EmulatedLauncher().unavailable()):
        pytest.skip(reason)
    return double.make()


def first_dtype(kernel: Kernel, pattern: Pattern) -> torch.dtype:
    specs = {dtype: MatmulSpec(64, 64, dtype, pattern, 0.5, (1,), CUDA, (9, 0)) for dtype in DTYPES}
    return next(dtype for dtype, spec in specs.items() if kernel.rejects(spec) is None)


def pack(pattern: Pattern, dtype: torch.dtype, out: int = OUT, in_: int = IN) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out + in_)).to(dtype)
    return format_for(pattern).pack(weight, choose(pattern, weight), pattern)


@doubles
def test_every_pattern_it_accepts_is_multiplied_right(double: Double) -> None:
    kernel, generator = made(double), torch.Generator().manual_seed(1)
    found = accepted(kernel, CUDA)
    assert found
    for pattern in found:
        dtype = first_dtype(kernel, pattern)
        packed = pack(pattern, dtype)
        prepared = kernel.prepare(packed, spec_for(packed, TOKENS))
        bias = torch.randn(OUT, generator=generator).to(dtype)
        for tokens in TOKENS if pattern == found[0] else TOKENS[1:2]:
            x = torch.randn(tokens, IN, generator=generator).to(dtype)
            y = kernel.run(prepared, x, bias)
            assert difference(y, x, unpack(packed), bias) is None, f"{pattern}, {tokens} tokens"


@doubles
def test_the_same_call_gives_the_same_bits(double: Double) -> None:
    kernel = made(double)
    pattern = accepted(kernel, CUDA)[0]
    packed = pack(pattern, first_dtype(kernel, pattern))
    prepared = kernel.prepare(packed, spec_for(packed, (3,)))
    x = torch.randn(3, IN).to(packed.tensors["values"].dtype)
    assert torch.equal(kernel.run(prepared, x), kernel.run(prepared, x))


@doubles
def test_empty_and_full_rows_are_multiplied_right(double: Double) -> None:
    kernel = made(double)
    free = [pattern for pattern in accepted(kernel, CUDA) if pattern.fixed_sparsity() is None]
    if not free:
        pytest.skip("its patterns keep the same count in every row")
    pattern = free[0]
    rows, cols = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    tiles = torch.zeros(-(-OUT // rows), -(-IN // cols), dtype=torch.bool)
    tiles[-1] = True
    keep = tiles.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:OUT, :IN]
    dtype = first_dtype(kernel, pattern)
    for chosen in (keep, torch.zeros_like(keep), torch.ones_like(keep)):
        packed = format_for(pattern).pack(torch.randn(OUT, IN).to(dtype), chosen, pattern)
        x = torch.randn(2, IN).to(dtype)
        y = kernel.run(kernel.prepare(packed, spec_for(packed, (2,))), x)
        assert difference(y, x, unpack(packed)) is None


@doubles
def test_views_and_unaligned_inputs_are_accepted(double: Double) -> None:
    kernel = made(double)
    pattern = accepted(kernel, CUDA)[0]
    dtype = first_dtype(kernel, pattern)
    packed = pack(pattern, dtype)
    prepared = kernel.prepare(packed, spec_for(packed, (2,)))
    base = torch.randn(4, 2 * IN).to(dtype)
    for x in (base[::2, ::2], base[:2, 1 : 1 + IN], base[0, :IN].expand(2, IN)):
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None


@pytest.mark.parametrize("name", [double.name for double in DOUBLES] + ["block_triton"])
def test_the_real_one_says_why_it_cannot_run_on_a_cpu_an_old_gpu_or_in_another_dtype(name: str) -> None:
    kernel = kernel_named(name)
    pattern = accepted_in_words(kernel)
    here = MatmulSpec(64, 64, torch.float16, pattern, 0.5, (1,), CPU)
    assert "cpu" in (kernel.rejects(here) or "")
    for spec in (
        MatmulSpec(64, 64, torch.float16, pattern, 0.5, (1,), CUDA, (6, 1)),
        MatmulSpec(64, 64, torch.int8, pattern, 0.5, (1,), CUDA, (9, 0)),
    ):
        assert kernel.rejects(spec)


def accepted_in_words(kernel: Kernel) -> Pattern:
    """Return a pattern of the kernel's family: one that it does not refuse by name on a recent GPU."""
    for pattern in LAYOUT_PATTERNS:
        spec = MatmulSpec(64, 64, torch.float16, pattern, 0.5, (1,), CUDA, (9, 0))
        if not (kernel.rejects(spec) or "").endswith(f"found {pattern}"):
            return pattern
    raise AssertionError(f"{kernel.name} refuses every pattern by name")
