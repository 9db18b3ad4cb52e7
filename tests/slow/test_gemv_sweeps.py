"""The GEMV kernels on the emulator over every token count up to 130, many shapes, patterns and densities: minutes."""

import dataclasses
import itertools

import pytest
import torch
from emulated import EmulatedLauncher
from kernels import choose

from sparsify_compiler.kernel import Kernel
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm_gemv import NmGemv
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.unstructured.bitmap_gemv import BitmapGemv

LAUNCHER = EmulatedLauncher()
GROUPS = tuple(NM(keep, of) for of in (4, 8, 16, 32) for keep in range(1, of, max(1, of // 8)))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LAUNCHER.unavailable() is not None, reason=str(LAUNCHER.unavailable())),
]


def check(
    kernel: Kernel, pattern: Pattern, shape: tuple[int, int], tokens: int, dtype: torch.dtype, sparsity: float = 0.8
) -> None:
    """Small blocks: the stacks of an emulated cluster stay mapped as long as the process lives."""
    (out, in_), generator = shape, torch.Generator().manual_seed(sum(shape) + tokens)
    weight = torch.randn(out, in_, generator=generator).to(dtype)
    packed = format_for(pattern).pack(weight, choose(pattern, weight, sparsity), pattern)
    x, bias = torch.randn(tokens, in_, generator=generator).to(dtype), torch.randn(out, generator=generator).to(dtype)
    cut = f"split{1 + tokens % 2}.tokens{next((t for t in (1, 2, 4) if tokens <= t), 8)}"
    variant = f"1=warps4.{cut}" if isinstance(kernel, NmGemv) else f"1={cut}"
    prepared = dataclasses.replace(kernel.prepare(packed, spec_for(packed, (tokens,))), variants=variant)
    y = kernel.run(prepared, x, bias, "silu")
    assert difference(y, x, unpack(packed), bias, "silu") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [NM(16, 32), NM(8, 32), NM(2, 4), Unstructured()], ids=str)
def test_every_token_count_is_right(pattern: Pattern, dtype: torch.dtype) -> None:
    for tokens in range(131):
        kernel = NmGemv(launcher=LAUNCHER) if isinstance(pattern, NM) else BitmapGemv(launcher=LAUNCHER)
        check(kernel, pattern, (70, 330), tokens, dtype)


@pytest.mark.parametrize("pattern", GROUPS, ids=str)
def test_every_group_is_right_over_odd_shapes(pattern: NM) -> None:
    dtype = (torch.float16, torch.bfloat16)[pattern.keep % 2]
    for seed, (tokens, shape) in enumerate(itertools.product((1, 5), ((1, 1), (31, 129), (40, 2050), (7, 8191)))):
        check(NmGemv(launcher=EmulatedLauncher(seed=seed)), pattern, shape, tokens, dtype)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_every_density_is_right_over_odd_shapes(sparsity: float) -> None:
    patterns: tuple[Pattern, ...] = (Unstructured(), Block(4, 4), Block(8, 1))
    shapes = ((1, 1), (31, 129), (65, 1100), (40, 4097), (7, 20000))
    for seed, (pattern, shape) in enumerate(itertools.product(patterns, shapes)):
        for tokens, dtype in ((1, torch.float16), (5, torch.bfloat16)):
            check(BitmapGemv(launcher=EmulatedLauncher(seed=seed)), pattern, shape, tokens, dtype, sparsity)
