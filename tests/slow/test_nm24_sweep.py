"""The 2:4 kernel for few tokens on the emulator: every variant it offers, and every token count up to 130."""

import dataclasses

import pytest
import torch
from emulated import EmulatedLauncher
from kernels import choose

from sparsify_compiler.kernel import MatmulSpec, Packed
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm24 import Nm24Mma
from sparsify_compiler.runtime.oracle import difference

MISSING = EmulatedLauncher().unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
AMPERE, HOPPER = (8, 0), (9, 0)


def weight(out: int, in_: int, dtype: torch.dtype) -> Packed:
    dense = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to(dtype)
    return format_for(NM(2, 4)).pack(dense, choose(NM(2, 4), dense), NM(2, 4))


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=str)
@pytest.mark.parametrize("large", [(14336, 4096), (4096, 14336), (4096, 4096)], ids=str)
def test_every_variant_for_large_layers_is_right(large: tuple[int, int], capability: tuple[int, int]) -> None:
    packed = weight(200, 1100, torch.bfloat16)
    kernel = Nm24Mma(launcher=EmulatedLauncher(1), capability=capability)
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    for tokens in (1, 8, 16, 32, 64):
        spec = MatmulSpec(*large, torch.bfloat16, NM(2, 4), 0.5, (tokens,), torch.device("cpu"), capability)
        x = torch.randn(tokens, 1100, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        for name in kernel.variants(spec, tokens):
            y = kernel.run(dataclasses.replace(prepared, variants=f"{tokens}={name}"), x, x[0, :200], "silu")
            assert difference(y, x, unpack(packed), x[0, :200], "silu") is None, name


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=str)
@pytest.mark.parametrize("shape", [(33, 70), (16, 64), (7, 5), (65, 1030)], ids=str)
def test_every_token_count_is_right(shape: tuple[int, int], capability: tuple[int, int]) -> None:
    packed = weight(*shape, torch.float16)
    for tokens in range(131):
        kernel = Nm24Mma(launcher=EmulatedLauncher(tokens), capability=capability)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).half()
        y = kernel.run(kernel.prepare(packed, spec_for(packed, (1,))), x, None, "relu")
        assert difference(y, x, unpack(packed), None, "relu") is None, tokens
