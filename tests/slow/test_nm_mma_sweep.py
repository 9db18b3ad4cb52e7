"""Every pattern, dtype and token count to 130 of the n:m tensor-core kernel, emulated: four minutes on two cores."""

import shutil

import pytest
import torch
from emulated import EmulatedLauncher

from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import NMFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm_mma import NmMma
from sparsify_compiler.runtime.oracle import difference

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ for the emulator")
KERNEL = NmMma(launcher=EmulatedLauncher())
COUNTS = {8: (2, 3, 4, 6), 16: (2, 4, 5, 8, 12), 32: (2, 4, 8, 11, 16, 24)}
PATTERNS = tuple(NM(keep, of) for of, counts in COUNTS.items() for keep in counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_all_token_counts_are_right(pattern: NM, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(pattern.keep)
    weight = torch.randn(35, 171, generator=generator).to(dtype)
    packed = NMFormat().pack(weight, pattern.select(weight.abs().double(), 0.5), pattern)
    prepared, dense = KERNEL.prepare(packed, spec_for(packed, (1,))), unpack(packed)
    for tokens in range(131):
        x = torch.randn(tokens, 171, generator=generator).to(dtype)
        assert difference(KERNEL.run(prepared, x), x, dense) is None, tokens


@pytest.mark.parametrize("pattern", [NM(4, 8), NM(8, 16), NM(8, 32)], ids=str)
def test_every_variant_of_a_hopper_is_right_at_other_token_counts(pattern: NM) -> None:
    generator = torch.Generator().manual_seed(pattern.keep)
    weight = torch.randn(70, 1200, generator=generator).half()
    packed = NMFormat().pack(weight, pattern.select(weight.abs().double(), 0.5), pattern)
    prepared, dense = KERNEL.prepare(packed, spec_for(packed, (1,))), unpack(packed)
    names = {
        f"tiles{tiles}.warps{warps}.chunks{chunks}.split{split}.stages{stages}"
        for tiles in (1, 2, 4)
        for warps, chunks in ((8, 1), (7, 1), (4, 2))
        for split, stages in ((1, 3), (4, 2), (8, 6))
    }
    for name in sorted(names):
        chosen = type(prepared)(prepared.kernel, prepared.shape, prepared.tensors, f"8={name}")
        for tokens in (3, 70):
            x = torch.randn(tokens, 1200, generator=generator).half()
            assert difference(KERNEL.run(chosen, x), x, dense) is None, (name, tokens)
