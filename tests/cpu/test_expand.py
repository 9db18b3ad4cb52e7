"""The kernel that expands packed weights for many tokens, run by the emulator."""

import dataclasses
import shutil

import pytest
import torch
from emulated import EmulatedLauncher

from sparsify_compiler.kernel import MatmulSpec
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.unstructured.expand import ExpandDense

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ for the emulator")
KERNEL = ExpandDense(launcher=EmulatedLauncher())
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(3, 8), NM(8, 32)], ids=str)
def test_the_expanded_weight_is_the_packed_one_bit_for_bit(pattern: Pattern, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for out, in_ in ((1, 32), (3, 33), (9, 1024), (5, 1025), (4, 2100), (33, 63)):
        weight = torch.randn(out, in_, generator=generator).to(dtype)
        packed = format_for(pattern).pack(weight, pattern.select(weight.abs().double(), 0.7), pattern)
        dense = KERNEL.expand(KERNEL.prepare(packed, spec_for(packed, (1,))))
        assert torch.equal(dense, unpack(packed))
        assert dense.stride(0) * dense.element_size() % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_and_full_rows_expand_and_products_take_bias_and_activation(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 1100, generator=generator).to(dtype)
    keep = torch.rand(6, 1100, generator=generator) > 0.8
    keep[0], keep[5], keep[2] = False, False, True
    for mask in (keep, torch.zeros_like(keep), torch.ones_like(keep)):
        packed = format_for(Unstructured()).pack(weight, mask, Unstructured())
        prepared = KERNEL.prepare(packed, spec_for(packed, (1,)))
        for tokens in (0, 1, 130):
            x = torch.randn(tokens, 1100, generator=generator).to(dtype)
            bias = torch.randn(6, generator=generator).to(dtype)
            y = KERNEL.run(prepared, x, bias, "relu")
            assert difference(y, x, unpack(packed), bias, "relu") is None


def test_a_weight_without_rows_expands_to_nothing() -> None:
    weight = torch.zeros(0, 8)
    packed = format_for(Unstructured()).pack(weight, weight.bool(), Unstructured())
    prepared = KERNEL.prepare(packed, spec_for(packed, (1,)))
    assert KERNEL.run(prepared, torch.randn(3, 8)).shape == (3, 0)


def test_the_prepared_weight_shares_the_packed_values() -> None:
    weight = torch.randn(8, 64)
    packed = format_for(NM(2, 4)).pack(weight, NM(2, 4).select(weight.abs(), 0.5), NM(2, 4))
    prepared = KERNEL.prepare(packed, spec_for(packed, (1,)))
    assert prepared.tensors[0].data_ptr() == packed.tensors["values"].data_ptr()
    assert sum(t.numel() * t.element_size() for t in prepared.tensors) <= packed.size_bytes() + 8 * 8


def test_it_says_what_it_cannot_run() -> None:
    spec = MatmulSpec(64, 64, torch.float16, NM(2, 4), 0.5, (1,), torch.device("cuda", 0), (9, 0))
    assert KERNEL.rejects(spec) is None
    assert "found 16x16" in (KERNEL.rejects(dataclasses.replace(spec, pattern=Block(16, 16))) or "")
    assert "found float64" in (KERNEL.rejects(dataclasses.replace(spec, dtype=torch.float64)) or "")
    assert "found cpu" in (KERNEL.rejects(dataclasses.replace(spec, device=torch.device("cpu"))) or "")
    assert "found 6.1" in (KERNEL.rejects(dataclasses.replace(spec, capability=(6, 1))) or "")
