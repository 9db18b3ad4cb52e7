"""The standard layouts of a packed weight: the kept values and one bit per entry (or per tile), all dense tensors.

Kernels read them, artefacts store them and ONNX function bodies unpack them, so there is one meaning of each tensor:

| layout | tensor | shape | dtype | holds |
|---|---|---|---|---|
| nm | values | (out, kept per row) | the weight's | kept entries of a row, by column |
| nm | mask | (out, ceil(in / 8)) | uint8 | bit i % 8 (lowest first) of byte i // 8: column i is kept |
| bitmap | values | (kept,) | the weight's | kept entries, row after row, by column |
| bitmap | mask | (out, ceil(in / 8)) | uint8 | as above |
| bitmap | row_starts | (out + 1,) | int32 | where each row starts in `values` |
| block | values | (kept tiles, rows, cols) | the weight's | kept tiles, row after row; edge tiles padded with 0 |
| block | mask | (tile rows, ceil(tile cols / 8)) | uint8 | the same bits, one per tile |

Values are copied bit for bit: a kept entry may be 0.0, and entries that are not kept are never stored (but the
padding of edge tiles).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Format, Packed
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.bits import pack_bits, unpack_bits

LARGEST_COUNT = 2**31 - 1
"""The most values an int32 row start can address."""


@dataclass(frozen=True)
class NMFormat:
    """N:M weights. Every group keeps the same count in every row, so all rows hold as many values."""

    layout: str = "nm"

    def pack(self, weight: Tensor, keep: Tensor, pattern: Pattern, run: int | None = None) -> Packed:
        """Pack `weight` (out, in) where `keep` (out, in) bool; groups start again after `run` columns.

        Raises:
            KernelError: a group does not keep min(keep, group size), or the weight is not finite.
        """
        if not isinstance(pattern, NM):
            raise _wrong_pattern(self.layout, "N:M", pattern)
        _check_weight(weight, keep)
        out, in_ = weight.shape
        groups = pattern.groups(in_, run)
        asked = torch.tensor([min(pattern.keep, stop - start) for start, stop in groups], device=keep.device)
        sizes = torch.tensor([stop - start for start, stop in groups], device=keep.device)
        owner = torch.repeat_interleave(torch.arange(len(groups), device=keep.device), sizes)  # (in,)
        counts = torch.zeros(out, len(groups), dtype=torch.int32, device=keep.device)
        counts.index_add_(1, owner, keep.int())
        if broken := int((counts != asked).sum()):
            raise KernelError(
                f"cannot pack weight {tuple(weight.shape)} as {pattern}: {broken} of {counts.numel()} groups do not "
                f"keep {pattern.keep} (or all of a shorter tail); select the keep mask with this pattern"
            )
        values = weight[keep].reshape(out, int(asked.sum()))
        return Packed(self.layout, pattern, (out, in_), {"values": values, "mask": pack_bits(keep)})

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (out, in) weight."""
        return _scatter(packed)


@dataclass(frozen=True)
class BitmapFormat:
    """Any pattern: one bit per entry and the kept values row after row."""

    layout: str = "bitmap"

    def pack(self, weight: Tensor, keep: Tensor, pattern: Pattern, run: int | None = None) -> Packed:
        """Pack `weight` (out, in) where `keep` (out, in) bool. The pattern is recorded, not checked.

        Raises:
            KernelError: the weight is not finite, or more than 2^31 - 1 entries are kept.
        """
        _check_weight(weight, keep)
        counts = keep.sum(dim=1)  # (out,)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        if (total := int(starts[-1])) > LARGEST_COUNT:
            raise KernelError(
                f"cannot pack weight {tuple(weight.shape)}: it keeps {total} entries and a bitmap addresses at most "
                f"{LARGEST_COUNT}; split the layer or keep it dense"
            )
        tensors = {"values": weight[keep], "mask": pack_bits(keep), "row_starts": starts.int()}
        return Packed(self.layout, pattern, (weight.shape[0], weight.shape[1]), tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (out, in) weight."""
        return _scatter(packed)


@dataclass(frozen=True)
class BlockFormat:
    """Whole tiles. A weight that the tiles do not divide is padded with zeros at its right and lower edges."""

    layout: str = "block"

    def pack(self, weight: Tensor, keep: Tensor, pattern: Pattern, run: int | None = None) -> Packed:
        """Pack `weight` (out, in) where `keep` (out, in) bool, equal within every tile.

        Raises:
            KernelError: a tile is kept in part, or the weight is not finite.
        """
        if not isinstance(pattern, Block):
            raise _wrong_pattern(self.layout, "block", pattern)
        _check_weight(weight, keep)
        shape = (weight.shape[0], weight.shape[1])
        any_kept = _tiles(keep, pattern, False).any(dim=3).any(dim=2)  # (tile rows, tile cols)
        all_kept = _tiles(keep, pattern, True).all(dim=3).all(dim=2)
        if broken := int((any_kept & ~all_kept).sum()):
            raise KernelError(
                f"cannot pack weight {shape} as blocks {pattern}: {broken} of {any_kept.numel()} tiles are kept in "
                f"part; select the keep mask with this pattern"
            )
        values = _tiles(weight, pattern, 0.0)[any_kept]
        return Packed(self.layout, pattern, shape, {"values": values, "mask": pack_bits(any_kept)})

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (out, in) weight."""
        pattern, (out, in_) = _block(packed), packed.shape
        tile_rows, tile_cols = -(-out // pattern.rows), -(-in_ // pattern.cols)
        kept = _read_mask(packed, tile_rows, tile_cols)
        values = _read(packed, "values", (int(kept.sum()), pattern.rows, pattern.cols))
        tiles = values.new_zeros(tile_rows, tile_cols, pattern.rows, pattern.cols)
        tiles[kept] = values
        return (
            tiles.transpose(1, 2).reshape(tile_rows * pattern.rows, tile_cols * pattern.cols)[:out, :in_].contiguous()
        )


def format_for(pattern: Pattern) -> Format:
    """Return the standard layout of a pattern: N:M "nm", blocks "block", the rest "bitmap"."""
    formats: dict[type, Format] = {NM: NMFormat(), Block: BlockFormat(), Unstructured: BitmapFormat()}
    return formats[type(pattern)]


def unpack(packed: Packed) -> Tensor:
    """Return the dense (out, in) weight, equal to `weight * keep` as packed.

    Raises:
        KernelError: an unknown layout, or tensors that are missing, misshapen or contradict each other.
    """
    formats: dict[str, Format] = {"nm": NMFormat(), "bitmap": BitmapFormat(), "block": BlockFormat()}
    if packed.layout not in formats:
        raise KernelError(f"packed weight has layout {packed.layout!r}; this version reads {', '.join(formats)}")
    return formats[packed.layout].unpack(packed)


def kept_entries(packed: Packed) -> tuple[Tensor, Tensor]:
    """Return the keep mask (out, in) bool and the kept values (kept,) row after row, from any layout.

    The values of "nm" and "bitmap" are a view of the packed ones, so a kernel that stores them costs no memory.
    Padding of block layouts is not counted as kept.

    Raises:
        KernelError: as `unpack`.
    """
    if packed.layout == "block":
        pattern, (out, in_) = _block(packed), packed.shape
        tiles = _read_mask(packed, -(-out // pattern.rows), -(-in_ // pattern.cols))
        keep = pattern.expand(tiles)[:out, :in_]
        return keep, unpack(packed)[keep]
    keep = _read_mask(packed, *packed.shape)
    kept = int(keep.sum())
    if packed.layout == "bitmap":
        starts = _read(packed, "row_starts", (packed.shape[0] + 1,))
        if not torch.equal(starts.long(), torch.nn.functional.pad(keep.sum(dim=1).cumsum(0), (1, 0))):
            raise KernelError(f"packed weight {packed.shape}: row_starts contradicts the mask; pack it again")
        return keep, _read(packed, "values", (kept,))
    per_row = kept // max(packed.shape[0], 1)
    if not bool((keep.sum(dim=1) == per_row).all()):
        raise KernelError(f"packed weight {packed.shape}: mask rows keep different counts; pack it again")
    return keep, _read(packed, "values", (packed.shape[0], per_row)).reshape(-1)


def packed_tensors(layout: str) -> tuple[str, ...]:
    """Name the tensors of a layout, in the order artefacts and ONNX nodes list them."""
    names: Mapping[str, tuple[str, ...]] = {
        "nm": ("values", "mask"),
        "bitmap": ("values", "mask", "row_starts"),
        "block": ("values", "mask"),
    }
    return names[layout]


def _scatter(packed: Packed) -> Tensor:
    keep, values = kept_entries(packed)
    return values.new_zeros(packed.shape).masked_scatter_(keep, values)


def _tiles(tensor: Tensor, pattern: Block, fill: float) -> Tensor:
    """Cut (out, in) into (tile rows, tile cols, rows, cols), padded at the edges with `fill`."""
    out, in_ = tensor.shape
    padded = torch.nn.functional.pad(tensor, (0, -in_ % pattern.cols, 0, -out % pattern.rows), value=fill)
    high, wide = padded.shape
    split = padded.reshape(high // pattern.rows, pattern.rows, wide // pattern.cols, pattern.cols)
    return split.transpose(1, 2)


def _check_weight(weight: Tensor, keep: Tensor) -> None:
    shape = tuple(weight.shape)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise KernelError(f"cannot pack {weight.dtype} of shape {shape}: needs a floating (out, in) weight")
    if keep.dtype != torch.bool or keep.shape != weight.shape:
        found = f"{keep.dtype} {tuple(keep.shape)}"
        raise KernelError(f"cannot pack weight {shape}: keep must be bool of the same shape; found {found}")
    if broken := int((~torch.isfinite(weight)).sum()):
        raise KernelError(
            f"cannot pack weight {shape}: {broken} entries are NaN or infinite in {weight.dtype}; "
            f"check the model, or choose a dtype with a wider range"
        )


def _wrong_pattern(layout: str, asked: str, pattern: Pattern) -> KernelError:
    return KernelError(f"layout {layout!r} packs {asked} patterns; found {pattern}; use format_for(pattern)")


def _block(packed: Packed) -> Block:
    if not isinstance(packed.pattern, Block):
        raise _wrong_pattern(packed.layout, "block", packed.pattern)
    return packed.pattern


def _read(packed: Packed, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in packed.tensors:
        found = ", ".join(packed.tensors) or "none"
        raise KernelError(f"packed weight {packed.shape} of layout {packed.layout!r} needs {name!r}; found {found}")
    tensor = packed.tensors[name]
    if tuple(tensor.shape) != shape:
        raise KernelError(
            f"packed weight {packed.shape} of layout {packed.layout!r}: {name} must be {shape}; "
            f"found {tuple(tensor.shape)}; pack it again"
        )
    return tensor


def _read_mask(packed: Packed, rows: int, columns: int) -> Tensor:
    bits = _read(packed, "mask", (rows, -(-columns // 8)))
    if bits.dtype != torch.uint8:
        raise KernelError(f"packed weight {packed.shape}: mask must be uint8; found {bits.dtype}; pack it again")
    # Kernels count bits by the byte, so a stray bit past the last column would shift every value after it.
    if columns % 8 and bool((bits[:, -1] >> (columns % 8)).any()):
        raise KernelError(f"packed weight {packed.shape}: mask has bits past column {columns}; pack it again")
    return unpack_bits(bits, columns)
