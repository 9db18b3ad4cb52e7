"""The order in which nm_mma.cu reads N:M weights: every lane of a warp owns runs of 32 columns of two rows.

A tile is 16 rows, a chunk 128 columns. Lane 4 q + c owns columns 32 c .. 32 c + 31 of rows q and q + 8 of the tile
(half 0 and 1 below). The columns of a run form groups of 8, 16 or 32 that keep the same even count in every row; what
a group lacks (a tail, columns beyond `in`, a group cut by a convolution's tap, an odd N) is filled up with columns that
are not kept, of value 0. Two 16-bit values make a word. Three orders of the words of one group:

| order | group, count | index of the int32 tensor `words` | values |
|---|---|---|---|
| PAIR | 8, 2 | (tile, chunk, two groups, lane, group, half) | by column |
| ENDS | 8, 4 | (tile, chunk, group, lane, half, word) | by column |
| GATHER | any other | (tile, chunk, group, half, word, lane) | see below |

`masks` (tiles, chunks, 2, 32) int32: bit i of [tile, chunk, half, lane] says that column i of the lane's run is kept.

GATHER: two neighbouring columns are a pair. Octet after octet, a pair with two values gets a word of its own; pairs
with one value share words, two a word, in column order. An octet with an odd count has one value left; those of a group
fill its last word, lower half first, then the word before, so that each is found by the number of odd octets before.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.bits import pack_bits, unpack_bits
from sparsify_compiler.runtime.rows import round_up

Order = Literal["pair", "ends", "gather"]

TILE_ROWS = 16
RUN = 32
CHUNK = 128
# Where the axes of `_row_shape` lie in `words`.
_PLACES = {"pair": (0, 3, 5, 2, 4, 6, 1), "ends": (0, 3, 5, 2, 4, 1, 6), "gather": (0, 3, 5, 1, 6, 2, 4)}
_LEFT = 255
SLAB_ENTRIES = 1 << 24
"""Entries packed at a time, which bounds the memory that packing takes beside the weight (about 40 bytes each)."""


@dataclass(frozen=True)
class RunOrder:
    """Groups of `group` columns (8, 16 or 32) that hold `count` values, even."""

    group: int
    count: int

    @property
    def order(self) -> Order:
        """How the words of a group lie."""
        return {(8, 2): "pair", (8, 4): "ends"}.get((self.group, self.count), "gather")  # type: ignore[return-value]

    @property
    def row_words(self) -> int:
        """Words of a lane's run in one row."""
        return RUN // self.group * self.count // 2

    def bytes_per_entry(self) -> float:
        """Bytes read for one entry of the dense weight, its mask included."""
        return (self.row_words * 4 + 4) / RUN


@dataclass(frozen=True)
class Runs:
    """A packed weight: `words` and `masks` as above."""

    words: Tensor
    masks: Tensor


def order_of(words: Tensor) -> RunOrder:
    """Read from the shape of packed words how their groups lie."""
    if words.shape[5] == RUN:
        return RunOrder(RUN // words.shape[2], 2 * words.shape[4])
    return RunOrder(8, 4 if words.shape[2] == 4 else 2)


def choose_order(keep: Tensor) -> RunOrder:
    """Return the order that stores `keep` (out, in) bool in the fewest bytes; of equals the smallest group."""
    orders = [RunOrder(group, _largest_count(keep, group)) for group in (8, 16, 32)]
    return min(orders, key=lambda order: (order.row_words, order.group))


def to_runs(keep: Tensor, values: Tensor, order: RunOrder | None = None) -> Runs:
    """Pack `keep` (out, in) bool and its `values` (kept,), 16 bits each, row after row.

    `order` None: `choose_order`. Padding rows and columns hold zeros. The result is on the device of `keep`.

    Raises:
        KernelError: a group keeps more than `order` has room for.
    """
    order = order or choose_order(keep)
    out, in_ = keep.shape
    chunks = -(-in_ // CHUNK)
    slab = max(1, SLAB_ENTRIES // max(chunks * CHUNK * TILE_ROWS, 1)) * TILE_ROWS
    starts = torch.nn.functional.pad(keep.sum(dim=1).cumsum(0), (1, 0)).tolist()
    parts = []
    for first in range(0, out, slab):
        rows = keep[first : first + slab]
        parts.append(_pack(rows, values[starts[first] : starts[first + len(rows)]], chunks, order))
    if not parts:
        parts = [_pack(keep, values, chunks, order)]
    words, masks = (torch.cat(tensors) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True))
    return Runs(words, masks)


def from_runs(runs: Runs, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the dense weight of `shape` (out, in) that `to_runs` packed from values of `dtype` (16 bits)."""
    order = order_of(runs.words)
    tiles, chunks = runs.masks.shape[:2]
    rows, columns = tiles * TILE_ROWS, chunks * CHUNK
    bits = runs.masks.view(tiles, chunks, 2, 8, 4).permute(0, 2, 3, 1, 4).reshape(rows, chunks * 4)
    keep = unpack_bits(bits.contiguous().view(torch.uint8), columns)
    chosen = keep.view(rows, columns // order.group, order.group)
    groups = chosen.shape[1]
    natural, places = _row_shape(rows, chunks, order), _PLACES[order.order]
    stored = runs.words.view([natural[place] for place in places])
    words = stored.permute([places.index(place) for place in range(7)]).reshape(rows, groups * order.count // 2)
    ordered = words.view(dtype).view(rows, groups, order.count)
    values = ordered.gather(2, _slots(chosen, order)[chosen].view(rows, groups, order.count).long())
    dense = torch.zeros(rows, columns, dtype=dtype, device=words.device)
    return dense.masked_scatter_(keep, values)[: shape[0], : shape[1]].contiguous()


def _largest_count(keep: Tensor, group: int) -> int:
    """Return the largest count that `group` consecutive columns keep, made even, at least 2."""
    most = 0
    step = max(1, SLAB_ENTRIES // max(keep.shape[1], 1))
    for first in range(0, len(keep), step):
        rows = keep[first : first + step]
        padded = torch.nn.functional.pad(rows, (0, -keep.shape[1] % group)).view(len(rows), -1, group)
        if padded.numel():
            most = max(most, int(padded.sum(dim=2, dtype=torch.uint8).max()))
    return max(2, round_up(most, 2))


def _pack(keep: Tensor, values: Tensor, chunks: int, order: RunOrder) -> tuple[Tensor, Tensor]:
    """Pack a slab of whole tiles: words and masks."""
    out, in_ = keep.shape
    rows, columns = round_up(out, TILE_ROWS), chunks * CHUNK
    dense = torch.zeros(rows, columns, dtype=torch.int16, device=keep.device)
    dense[:out, :in_].masked_scatter_(keep, values.contiguous().view(torch.int16))
    padded = torch.nn.functional.pad(keep, (0, columns - in_, 0, rows - out))
    chosen = _fill(padded.view(rows, columns // order.group, order.group), order)
    groups = columns // order.group
    slots = _slots(chosen, order)[chosen].view(rows, groups, order.count)  # by column
    by_column = dense[chosen.view(rows, columns)].view(rows, groups, order.count)
    ordered = torch.empty_like(by_column).scatter_(2, slots.long(), by_column)
    words = ordered.view(rows, groups * order.count).view(torch.int32).view(_row_shape(rows, chunks, order))
    masks = pack_bits(chosen.reshape(rows, columns)).view(torch.int32).view(rows // TILE_ROWS, 2, 8, chunks, 4)
    stored = words.permute(_PLACES[order.order]).contiguous().view(_shape(rows // TILE_ROWS, chunks, order))
    return stored, masks.permute(0, 3, 1, 2, 4).reshape(rows // TILE_ROWS, chunks, 2, RUN)


def _row_shape(rows: int, chunks: int, order: RunOrder) -> tuple[int, ...]:
    """(tile, half, q, chunk, c, group, word): words in the order of rows; in order PAIR (.., two groups, group)."""
    split = (2, 2) if order.order == "pair" else (RUN // order.group, order.count // 2)
    return (rows // TILE_ROWS, 2, 8, chunks, 4, *split)


def _shape(tiles: int, chunks: int, order: RunOrder) -> tuple[int, ...]:
    groups = RUN // order.group
    if order.order == "gather":
        return (tiles, chunks, groups, 2, order.count // 2, RUN)
    return (tiles, chunks, 2 if order.order == "pair" else groups, RUN, 2, 2)


def _fill(chosen: Tensor, order: RunOrder) -> Tensor:
    """Raise every group of `chosen` (rows, groups, group) bool to `order.count`, by its first columns not kept."""
    counts = chosen.sum(dim=2, dtype=torch.uint8)
    if counts.numel() and int(counts.max()) > order.count:
        raise KernelError(
            f"cannot pack {int(counts.max())} kept of {order.group} columns where {order.count} have room; "
            f"select the keep mask with this pattern"
        )
    free = (~chosen).cumsum(dim=2, dtype=torch.uint8)  # the place of a free column among the free ones, from 1
    return chosen | (~chosen & (free <= (order.count - counts).unsqueeze(2)))


def _slots(chosen: Tensor, order: RunOrder) -> Tensor:
    """Return where in its group's values (0 .. count - 1) each kept entry of `chosen` (rows, groups, group) lies."""
    if order.order != "gather":
        return chosen.cumsum(dim=2, dtype=torch.uint8) - 1
    rows, groups, group = chosen.shape
    bits = pack_bits(chosen.view(rows, groups * group)).view(rows, groups, group // 8)
    table = torch.tensor(_octet_slots(), dtype=torch.uint8, device=chosen.device)
    inside = table[bits.int()]  # (rows, groups, octets, 8)
    counts = chosen.view(rows, groups, group // 8, 8).sum(dim=3, dtype=torch.uint8)
    whole, odd = counts // 2, counts & 1
    start = 2 * (whole.cumsum(dim=2, dtype=torch.uint8) - whole)
    before = odd.cumsum(dim=2, dtype=torch.uint8) - odd  # odd octets before this one
    last = order.count - 2 - 2 * (before // 2) + (before & 1)
    return torch.where(inside == _LEFT, last.unsqueeze(3), start.unsqueeze(3) + inside).view(chosen.shape)


@functools.lru_cache(maxsize=1)
def _octet_slots() -> tuple[tuple[int, ...], ...]:
    """For each mask of eight columns, where order GATHER puts each column's value among the octet's words."""
    return tuple(tuple(_slots_of(mask)) for mask in range(256))


def _slots_of(mask: int) -> list[int]:
    pairs = [(mask >> (2 * pair)) & 3 for pair in range(4)]
    singles = sum(pair in (1, 2) for pair in pairs)
    slots, words, seen, opened = [0] * 8, 0, 0, 0
    for place, pair in enumerate(pairs):
        if pair == 3:
            slots[2 * place : 2 * place + 2] = [2 * words, 2 * words + 1]
            words += 1
        elif pair:
            column = 2 * place + pair - 1
            if seen % 2:
                slots[column] = 2 * opened + 1
            elif seen == singles - 1:
                slots[column] = _LEFT
            else:
                slots[column], opened, words = 2 * words, words, words + 1
            seen += 1
    return slots
