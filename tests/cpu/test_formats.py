"""The packed layouts: exact round trips, the bit order against NumPy, and every refusal."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DTYPES, LAYOUT_PATTERNS, choose

import sparsify_compiler.runtime.formats as formats_module
from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Packed
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import (
    BitmapFormat,
    BlockFormat,
    NMFormat,
    format_for,
    kept_entries,
    packed_tensors,
    unpack,
)

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.element_size()])


def draw(out: int, in_: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A weight with exact zeros of both signs among its entries, so that kept zeros are met."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_, generator=generator).to(dtype)
    weight[torch.rand(out, in_, generator=generator) < 0.1] = 0.0
    weight[torch.rand(out, in_, generator=generator) < 0.1] = -0.0
    return weight


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(LAYOUT_PATTERNS),
    out=st.integers(1, 37),
    in_=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)
def test_unpack_gives_back_every_kept_bit(
    pattern: Pattern, out: int, in_: int, dtype: torch.dtype, sparsity: float
) -> None:
    weight = draw(out, in_, dtype)
    keep = choose(pattern, weight, sparsity)
    packed = format_for(pattern).pack(weight, keep, pattern)
    expected = torch.where(keep, weight, torch.zeros((), dtype=dtype))
    assert torch.equal(bits(unpack(packed)), bits(expected))
    found_keep, found_values = kept_entries(packed)
    assert torch.equal(found_keep, keep)
    assert torch.equal(bits(found_values), bits(weight[keep]))


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 20), in_=st.integers(4, 40), seed=st.integers(0, 5))
def test_masks_are_numpys_little_endian_packbits(out: int, in_: int, seed: int) -> None:
    weight = draw(out, in_, torch.float32, seed)
    for pattern in (Unstructured(), NM(2, 4)):
        keep = choose(pattern, weight)
        packed = format_for(pattern).pack(weight, keep, pattern)
        assert np.array_equal(packed.tensors["mask"], np.packbits(keep.numpy(), axis=1, bitorder="little"))


def test_the_layouts_hold_what_their_table_says() -> None:
    weight = torch.arange(1.0, 25.0).reshape(4, 6)
    keep = NM(1, 4).select(weight, 0.75)
    packed = NMFormat().pack(weight, keep, NM(1, 4))
    assert packed.tensors["values"].tolist() == [[4, 6], [10, 12], [16, 18], [22, 24]]  # a tail of 2 keeps 1
    assert packed.tensors["mask"].tolist() == [[0b101000]] * 4
    bitmap = BitmapFormat().pack(weight, weight > 10, Unstructured())
    assert bitmap.tensors["row_starts"].tolist() == [0, 0, 2, 8, 14]
    assert bitmap.tensors["row_starts"].dtype == torch.int32
    tiles = torch.tensor([[True, False], [False, True]])
    block = BlockFormat().pack(weight, Block(3, 4).expand(tiles)[:4, :6], Block(3, 4))
    assert block.tensors["mask"].tolist() == [[0b01], [0b10]]
    first, last = block.tensors["values"]
    assert torch.equal(first, weight[:3, :4])
    assert torch.equal(last, torch.tensor([[23.0, 24, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))  # padded at both edges
    for made in (packed, bitmap, block):
        assert tuple(made.tensors) == packed_tensors(made.layout)


def test_convolution_groups_start_again_at_every_tap() -> None:
    weight = draw(5, 3 * 6, torch.float32)  # 3 taps of 6 input channels: groups of 4 and 2 at each tap
    pattern = NM(2, 4)
    keep = pattern.select(weight.abs(), 0.5, run=6)
    packed = NMFormat().pack(weight, keep, pattern, run=6)
    assert packed.tensors["values"].shape == (5, 3 * 4)
    assert torch.equal(unpack(packed), weight * keep)


def test_the_size_of_2_to_4_in_float16_is_9_sixteenths_of_dense() -> None:
    weight = draw(64, 64, torch.float16)
    packed = NMFormat().pack(weight, NM(2, 4).select(weight.float().abs(), 0.5), NM(2, 4))
    assert packed.size_bytes() == 64 * 64 * 2 * 9 // 16


def test_a_mask_that_breaks_the_pattern_is_refused_with_the_count() -> None:
    weight = draw(8, 16, torch.float32)
    keep = NM(2, 4).select(weight.abs(), 0.5)
    keep[0, :4] = True
    keep[3, 8:12] = False
    with pytest.raises(KernelError, match=r"2 of 32 groups do not keep 2"):
        NMFormat().pack(weight, keep, NM(2, 4))
    tiles = Block(4, 4).expand(torch.ones(2, 4, dtype=torch.bool))
    tiles[5, 9] = False
    with pytest.raises(KernelError, match=r"1 of 8 tiles are kept in part"):
        BlockFormat().pack(weight, tiles, Block(4, 4))


def test_weights_that_cannot_be_packed_are_refused() -> None:
    weight, keep = torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool)
    broken = weight.clone()
    broken[1, 2], broken[3, 4] = float("nan"), float("inf")
    for arguments, message in [
        ((broken, keep), "2 entries are NaN or infinite"),
        ((weight.int(), keep), "floating"),
        ((weight[0], keep[0]), "floating"),
        ((weight, keep[:2]), "same shape"),
        ((weight, keep.float()), "must be bool"),
    ]:
        with pytest.raises(KernelError, match=message):
            BitmapFormat().pack(*arguments, Unstructured())
    with pytest.raises(KernelError, match="packs N:M patterns; found 4x4"):
        NMFormat().pack(weight, keep, Block(4, 4))
    with pytest.raises(KernelError, match="packs block patterns; found 2:4"):
        BlockFormat().pack(weight, keep, NM(2, 4))


def test_too_many_values_for_int32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "LARGEST_COUNT", 31)  # 2^31 entries would need 8 GiB
    weight, keep = torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(KernelError, match="keeps 32 entries and a bitmap addresses at most 31"):
        BitmapFormat().pack(weight, keep, Unstructured())


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 4)], ids=str)
def test_packed_tensors_that_contradict_each_other_are_refused(pattern: Pattern) -> None:
    weight = draw(8, 12, torch.float32)
    packed = format_for(pattern).pack(weight, choose(pattern, weight), pattern)

    def changed(**tensors: torch.Tensor) -> Packed:
        return dataclasses.replace(packed, tensors={**packed.tensors, **tensors})

    fewer_bits = packed.tensors["mask"].clone()
    fewer_bits[0] = 0
    stray_bits = packed.tensors["mask"] | 0x80
    wrong = [
        changed(values=packed.tensors["values"][:-1]),
        changed(mask=packed.tensors["mask"][:-1]),
        changed(mask=packed.tensors["mask"].int()),
        changed(mask=fewer_bits),
        changed(mask=stray_bits),
        dataclasses.replace(packed, tensors={"mask": packed.tensors["mask"]}),
        dataclasses.replace(packed, layout="zip"),
    ]
    if packed.layout != "block":
        moved_bits = packed.tensors["mask"].clone()
        moved_bits[0, 0], moved_bits[1, 0] = 0, 0xFF  # the same total of bits or more, but not row by row
        wrong.append(changed(mask=moved_bits))
    if "row_starts" in packed.tensors:
        wrong.append(changed(row_starts=packed.tensors["row_starts"].flip(0)))
    for broken in wrong:
        with pytest.raises(KernelError):
            unpack(broken)


def test_a_weight_with_nothing_kept_packs_to_no_values() -> None:
    weight, keep = torch.ones(3, 9), torch.zeros(3, 9, dtype=torch.bool)
    for pattern in (Unstructured(), Block(2, 2)):
        packed = format_for(pattern).pack(weight, keep, pattern)
        assert packed.tensors["values"].numel() == 0
        assert not unpack(packed).any()
