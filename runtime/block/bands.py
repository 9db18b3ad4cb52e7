"""From kept tiles to the order our block kernels read: bands of rows, each with its kept columns one after the other.

A band is `height` rows of the weight, a grain `width` columns of one band; a step is as many grains as a kernel takes
at once. A band keeps a grain where any tile of the weight under it is kept. Bands are ordered by length, longest
first, so that the last blocks of a launch are the shortest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.kernel import Packed
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.bits import unpack_bits
from sparsify_compiler.runtime.formats import unpack


@dataclass(frozen=True)
class Bands:
    """A weight cut into bands.

    `table` (bands, 4) int32: first step, number of steps, place of the band in the weight, 0. `columns`
    (steps, grains a step) int32: the grain's place in its band, in units of `width`. `values` (steps, grains a step,
    height, width), the weight's dtype. The last step of a band is filled up with zeros at the column of its last kept
    grain, so a kernel reads no column of x that the band does not multiply anyway.
    """

    table: Tensor
    columns: Tensor
    values: Tensor


def largest_power(value: int, most: int) -> int:
    """Return the largest power of two that divides `value`, but at most `most`."""
    return min(value & -value, most)


def grain_mask(packed: Packed, height: int, width: int) -> Tensor:
    """Return which grains are kept, bool (ceil(out / height), ceil(in / width)); the sides must divide the tile's."""
    pattern = packed.pattern
    assert isinstance(pattern, Block)
    assert pattern.rows % height == 0
    assert pattern.cols % width == 0
    out, in_ = packed.shape
    tiles = unpack_bits(packed.tensors["mask"], -(-in_ // pattern.cols))
    fine = tiles.repeat_interleave(pattern.rows // height, 0).repeat_interleave(pattern.cols // width, 1)
    return fine[: -(-out // height), : -(-in_ // width)]


def merge_bands(kept: Tensor, count: int) -> Tensor:
    """Return the union of every `count` neighbouring bands of `kept` (bands, grains), a shorter group at the end."""
    padded = torch.nn.functional.pad(kept, (0, 0, 0, -kept.shape[0] % count))
    return padded.reshape(-1, count, kept.shape[1]).any(dim=1)


def cut_bands(packed: Packed, kept: Tensor, height: int, width: int, grains: int) -> Bands:
    """Order the weight by `kept` (bands, grains of a band) bool, with `grains` grains a step.

    Raises:
        KernelError: the packed tensors are broken, as `unpack` says.
    """
    weight = unpack(packed)
    out, in_ = packed.shape
    bands, wide = kept.shape
    padded = torch.nn.functional.pad(weight, (0, wide * width - in_, 0, bands * height - out))
    blocks = padded.reshape(bands, height, wide, width).transpose(1, 2)  # (bands, grains, height, width)
    counts = kept.sum(dim=1)
    steps = (counts + grains - 1) // grains
    order = torch.argsort(steps, descending=True, stable=True)
    kept, counts, steps = kept[order], counts[order], steps[order]
    starts = steps.cumsum(0) - steps
    total = int(steps.sum())
    band, grain = kept.nonzero(as_tuple=True)  # by band, then by column
    place = torch.arange(len(band), device=band.device) - (counts.cumsum(0) - counts)[band]
    slot = starts[band] * grains + place
    last = grain[counts.cumsum(0)[counts > 0] - 1]  # of every band that keeps anything
    columns = last.repeat_interleave(steps[counts > 0] * grains)
    columns[slot] = grain
    values = weight.new_zeros(total * grains, height, width)
    values[slot] = blocks[order[band], grain]
    table = torch.stack((starts, steps, order, torch.zeros_like(order)), dim=1).int()
    return Bands(
        table.contiguous(),
        columns.reshape(total, grains).int(),
        values.reshape(total, grains, height, width),
    )
