"""The order in which nm_gemv.cu reads a weight that keeps the same count of every 32 columns.

One int32 tensor (tiles, chunks, 1 + kept / 2, 32, 4), `kept` the even count a group of 32 columns holds:

| index | meaning |
|---|---|
| tile | 32 rows; rows beyond `out` hold zeros |
| chunk | 128 columns, four groups; columns beyond `in` hold zeros |
| [0, lane, g] | the coded mask of row `lane` in group g |
| [1 + i, lane, j] | word 4 i + j of the row's values in the chunk: group after group, two 16-bit values a word |

So every load of a lane is 16 bytes, every load of a warp 512, and a chunk is one piece of memory. Bit 31 - c of a coded
mask is the parity of the kept columns up to and including column c: it changes exactly where a column is kept, which
is what one instruction (bfind) finds. A group that keeps fewer than `kept` (a tail, a group cut by a convolution's
tap) is filled up with its first columns that are not kept, of value 0.
"""

import torch
from torch import Tensor

from sparsify_compiler.runtime.bits import pack_bits, unpack_bits
from sparsify_compiler.runtime.rows import round_up

TILE_ROWS = 32
GROUP = 32
CHUNK = 128


def to_lane_order(keep: Tensor, values: Tensor) -> Tensor:
    """Return the tensor above for `keep` (out, in) bool and its `values` (kept,), 16 bits each, row after row."""
    out, in_ = keep.shape
    rows, columns = round_up(out, TILE_ROWS), round_up(in_, CHUNK)
    dense = torch.zeros(rows, columns, dtype=torch.int16, device=keep.device)
    dense[:out, :in_].masked_scatter_(keep, values.view(torch.int16))
    chosen = _fill(torch.nn.functional.pad(keep, (0, columns - in_, 0, rows - out)).view(rows, -1, GROUP))
    kept = int(chosen[0, 0].sum())
    words = dense[chosen.view(rows, columns)].view(torch.int32)
    tiles, chunks = rows // TILE_ROWS, columns // CHUNK
    words = words.view(tiles, TILE_ROWS, chunks, kept // 2, 4).permute(0, 2, 3, 1, 4)
    masks = _coded(chosen).view(tiles, TILE_ROWS, chunks, 1, 4).permute(0, 2, 3, 1, 4)
    return torch.cat((masks, words), dim=2).contiguous()


def from_lane_order(words: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the dense weight of `shape` (out, in) that `to_lane_order` packed from values of `dtype`."""
    tiles, chunks, loads = words.shape[:3]
    rows, columns = tiles * TILE_ROWS, chunks * CHUNK
    rowwise = words.permute(0, 3, 1, 2, 4)  # (tiles, 32, chunks, loads, 4)
    masks = rowwise[..., 0, :].reshape(rows * chunks * 4, 1)
    changes = unpack_bits(masks.contiguous().view(torch.uint8), GROUP).flip(1)
    chosen = changes ^ torch.nn.functional.pad(changes, (1, 0))[:, :-1]
    values = rowwise[..., 1:, :].reshape(rows, chunks * (loads - 1) * 4).view(dtype)
    dense = torch.zeros(rows, columns, dtype=dtype, device=words.device)
    return dense.masked_scatter_(chosen.view(rows, columns), values)[: shape[0], : shape[1]].contiguous()


def kept_of_group(words: Tensor) -> int:
    """Return how many of every 32 columns a packed tensor holds."""
    return 2 * (words.shape[2] - 1)


def _fill(chosen: Tensor) -> Tensor:
    """Raise every group of `chosen` (rows, groups, 32) bool to the largest count of all, made even."""
    counts = chosen.sum(dim=2, dtype=torch.uint8)  # (rows, groups)
    kept = max(2, round_up(int(counts.max()), 2)) if counts.numel() else 2
    free = (~chosen).cumsum(dim=2, dtype=torch.uint8)  # the place of a free column among the free ones, from 1
    return chosen | (~chosen & (free <= (kept - counts).unsqueeze(2)))


def _coded(chosen: Tensor) -> Tensor:
    """Return the coded masks (rows, groups) int32 of `chosen` (rows, groups, 32) bool."""
    rows, groups = chosen.shape[:2]
    parity = (chosen.cumsum(dim=2, dtype=torch.uint8) & 1).bool()
    return pack_bits(parity.flip(2).reshape(rows * groups, GROUP)).view(torch.int32).view(rows, groups)
