"""The order in which bitmap_gemv.cu reads a weight of any pattern: kept values and their distances.

Rows are sorted by how many entries they hold, 32 of neighbouring places are a tile, and a lane owns one row of it, so
the lanes of a warp run out of entries together. The columns are cut into `parts` of `span` columns, whose x fits shared
memory. An entry is a 16-bit value and a gap of 4 or 8 bits, whichever takes fewer bytes; a distance that the gap cannot
hold is cut by entries of value 0. Tensors:

| tensor | shape | dtype | holds |
|---|---|---|---|
| packets | (packets, 128 + 8 * gap bits) | int32 | 8 entries of each lane, see below |
| firsts | (tiles, parts, warps, 32) | int16 | the column, within its part, of each lane's first entry for each warp |
| starts | (tiles * parts + 1,) | int32 | the packets of a tile and part lie from one start to the next |
| rows | (tiles * 32,) | int32 | the row that a lane of a tile owns, -1 for none |

A packet is 32 lanes times 16 bytes of values, then 32 lanes times 4 or 8 bytes of gaps. A gap is the distance from the
entry before: in 8 bits, byte i is that of entry i; in 4 bits, byte i % 4 has that of entry i in its low half for i < 4,
in its high half from there on. Of the p packets of a tile and part, warp w of W takes those from w p // W to
(w + 1) p // W: all get as many to within one. A warp's first entry has gap 0, and what fills a lane up has gap and
value 0: it stays in place.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.runtime.rows import round_up

TILE_ROWS = 32
PACKET = 8
VALUE_WORDS = TILE_ROWS * PACKET // 2
MOST_SPAN = 4096
"""Columns of a part: 64 KiB of shared memory at eight tokens a pass."""

_SLAB_ENTRIES = 1 << 22
"""Entries of the mask looked at together: bounds the memory that packing takes."""


@dataclass(frozen=True)
class Strands:
    """The four tensors of the module's table."""

    packets: Tensor
    firsts: Tensor
    starts: Tensor
    rows: Tensor

    @property
    def gap_bits(self) -> int:
        """4 or 8."""
        return (self.packets.shape[1] - VALUE_WORDS) // PACKET

    @property
    def parts(self) -> int:
        """Into how many parts the columns are cut."""
        return self.firsts.shape[1]

    @property
    def warps(self) -> int:
        """How many warps share a tile and part."""
        return self.firsts.shape[2]


def span_of(in_: int, parts: int) -> int:
    """Return the columns of a part: a multiple of 8, so that x is read in whole words."""
    return round_up(-(-in_ // parts), 8)


def to_strands(keep: Tensor, values: Tensor, parts: int, warps: int, gap_bits: int | None = None) -> Strands:
    """Pack `keep` (out, in) bool and `values` (kept,), 16 bits each, row after row.

    `gap_bits` None takes what needs fewer bytes, 8 where they are equal (fewer entries). `parts` must leave at most
    MOST_SPAN columns a part.
    """
    out, in_ = keep.shape
    span = span_of(in_, parts)
    dense = torch.zeros(out, in_, dtype=torch.int16, device=keep.device).masked_scatter_(keep, values.view(torch.int16))
    counts = {bits: _counts(keep, parts, span, bits) for bits in ((4, 8) if gap_bits is None else (gap_bits,))}
    size = {bits: int(count.sum()) * (16 + bits) for bits, count in counts.items()}
    bits = min(size, key=lambda gap: (size[gap], -gap))
    order = counts[bits].sum(dim=1).argsort(descending=True, stable=True)  # (out,) row numbers
    tiles = -(-out // TILE_ROWS)
    held = torch.zeros(tiles * TILE_ROWS, parts, dtype=torch.int64, device=keep.device)
    held[:out] = counts[bits][order]
    lengths = -(-held.view(tiles, TILE_ROWS, parts).amax(dim=1) // PACKET)  # (tiles, parts) packets
    starts = torch.nn.functional.pad(lengths.reshape(-1).cumsum(0), (1, 0))
    total = max(int(starts[-1]), 1)  # never an empty tensor: it has no address
    entries = torch.zeros(total, TILE_ROWS, PACKET, dtype=torch.int16, device=keep.device)
    gaps = torch.zeros(total, TILE_ROWS, PACKET, dtype=torch.uint8, device=keep.device)
    firsts = torch.zeros(tiles, parts, warps, TILE_ROWS, dtype=torch.int16, device=keep.device)
    layout = _Layout(bits, span, lengths, starts, warps)
    for first, last in _slabs(tiles, TILE_ROWS * in_):
        slab = order[first * TILE_ROWS : last * TILE_ROWS]
        _place(layout, first, keep[slab], dense[slab], entries, gaps, firsts)
    rows = torch.full((tiles * TILE_ROWS,), -1, dtype=torch.int32, device=keep.device)
    rows[:out] = order.int()
    return Strands(_join(entries, gaps, bits), firsts, starts.int(), rows)


def from_strands(strands: Strands, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the dense weight of `shape` (out, in) that `to_strands` packed from values of `dtype`."""
    out, in_ = shape
    tiles, parts, warps = strands.firsts.shape[:3]
    span = span_of(in_, parts)
    values, gaps = _part(strands.packets, strands.gap_bits)
    starts = strands.starts.long()
    lengths = starts[1:] - starts[:-1]
    item = torch.repeat_interleave(torch.arange(tiles * parts, device=starts.device), lengths)  # of each packet
    place = torch.arange(item.numel(), device=starts.device) - starts[item]
    warp = ((place + 1) * warps - 1) // lengths[item].clamp(min=1)  # the warp w with w p // W <= place < (w + 1) p // W
    begins = place == warp * lengths[item] // warps
    walked = gaps[: item.numel()].long().cumsum(dim=2)  # (packets, 32, 8)
    before = torch.nn.functional.pad(walked[:, :, -1].cumsum(0), (0, 0, 1, 0))  # gaps of all packets before
    opening = torch.where(begins, torch.arange(item.numel(), device=starts.device), 0).cummax(0).values
    base = strands.firsts.long().view(-1, warps, TILE_ROWS)[item, warp] - before[opening]  # (packets, 32)
    columns = (base + before[:-1])[:, :, None] + walked + ((item % parts) * span)[:, None, None]
    lanes = strands.rows.long().view(tiles, TILE_ROWS)[item // parts][:, :, None].expand_as(columns)
    dense = torch.zeros(out + 1, parts * span, dtype=dtype, device=starts.device)  # the last row takes the padding
    kept = values[: item.numel()]
    flat = lanes.where(lanes >= 0, out) * (parts * span) + columns
    dense.view(-1)[flat[kept != 0]] = kept[kept != 0].view(dtype)
    return dense[:out, :in_].contiguous()


@dataclass(frozen=True)
class _Layout:
    bits: int
    span: int
    lengths: Tensor
    starts: Tensor
    warps: int


def _slabs(count: int, entries: int) -> Iterator[tuple[int, int]]:
    """Cut `count` things of `entries` mask entries each into runs of bounded size."""
    step = max(1, _SLAB_ENTRIES // max(entries, 1))
    for first in range(0, count, step):
        yield first, min(count, first + step)


def _distances(keep: Tensor, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, column and distance of every kept entry of `keep` (rows, in); the first of a row and part has 0."""
    row, column = keep.nonzero(as_tuple=True)
    distance = torch.diff(column, prepend=column.new_zeros(1))
    part = column // span
    opens = torch.ones_like(row, dtype=torch.bool)
    opens[1:] = (row[1:] != row[:-1]) | (part[1:] != part[:-1])
    return row, column, distance.masked_fill_(opens, 0)


def _extra(distance: Tensor, bits: int) -> Tensor:
    """Count the entries of value 0 that must come before one at `distance`."""
    most = 2**bits - 1
    return torch.div((distance - 1).clamp_(min=0), most, rounding_mode="floor")


def _counts(keep: Tensor, parts: int, span: int, bits: int) -> Tensor:
    """Count the entries (out, parts) int64 of each row and part."""
    out, in_ = keep.shape
    counts = torch.zeros(out * parts, dtype=torch.int64, device=keep.device)
    for first, last in _slabs(out, in_):
        row, column, distance = _distances(keep[first:last], span)
        counts.index_add_(0, (row + first) * parts + column // span, 1 + _extra(distance, bits))
    return counts.view(out, parts)


def _place(
    layout: _Layout, tile: int, keep: Tensor, dense: Tensor, entries: Tensor, gaps: Tensor, firsts: Tensor
) -> None:
    """Write the rows of whole tiles from `tile` on into `entries`, `gaps` (packets, 32, 8) and `firsts`."""
    parts, most = layout.lengths.shape[1], 2**layout.bits - 1
    row, column, distance = _distances(keep, layout.span)
    extra = _extra(distance, layout.bits)
    reach = 1 + extra  # entries each kept one takes: the zeros before it, itself
    owner = torch.repeat_interleave(torch.arange(row.numel(), device=row.device), reach)
    ends = reach.cumsum(0)
    number = torch.arange(owner.numel(), device=row.device)
    behind = ends[owner] - 1 - number  # entries from this one to the kept one
    gap = torch.where(behind == 0, distance[owner] - extra[owner] * most, most)
    at = column[owner] - torch.where(behind == 0, 0, distance[owner] - (extra[owner] - behind + 1) * most)
    value = torch.where(behind == 0, dense[row, column][owner], 0)
    part = column[owner] // layout.span
    strand = row[owner] * parts + part  # ascending
    opens = torch.ones_like(strand, dtype=torch.bool)
    opens[1:] = strand[1:] != strand[:-1]
    index = number - torch.where(opens, number, 0).cummax(0).values if number.numel() else number
    item = (tile + row[owner] // TILE_ROWS) * parts + part
    lane = row[owner] % TILE_ROWS
    packet, slot = index // PACKET, index % PACKET
    length = layout.lengths.reshape(-1)[item]
    warp = ((packet + 1) * layout.warps - 1) // length
    begins = (slot == 0) & (packet == warp * length // layout.warps)
    where = layout.starts[item] + packet
    entries[where, lane, slot] = value
    gaps[where, lane, slot] = gap.masked_fill(begins, 0).to(torch.uint8)
    firsts.view(-1, layout.warps, TILE_ROWS)[item[begins], warp[begins], lane[begins]] = (
        at[begins] - part[begins] * layout.span
    ).to(torch.int16)


def _join(entries: Tensor, gaps: Tensor, bits: int) -> Tensor:
    """Return packets (packets, words) int32."""
    total = entries.shape[0]
    if bits == 4:
        gaps = gaps[:, :, :4] | (gaps[:, :, 4:] << 4)
    words = (entries.view(total, -1).view(torch.int32), gaps.reshape(total, -1).view(torch.int32))
    return torch.cat(words, dim=1)


def _part(packets: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return values (packets, 32, 8) int16 and gaps (packets, 32, 8) uint8."""
    total = packets.shape[0]
    values = packets[:, :VALUE_WORDS].contiguous().view(torch.int16).view(total, TILE_ROWS, PACKET)
    stored = packets[:, VALUE_WORDS:].contiguous().view(torch.uint8).view(total, TILE_ROWS, bits)
    return values, torch.cat((stored & 15, stored >> 4), dim=2) if bits == 4 else stored
