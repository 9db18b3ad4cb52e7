"""2:4 weights in the register order of `mma.sp.m16n8k32`: a warp loads what it multiplies with and nothing else.

A record holds 16 rows and 64 columns in 1152 bytes: 1024 of values, 128 of places (PTX ISA, matrix fragments for sparse
mma.m16n8k32 with .f16 and .bf16 types; `multiply_sparse` of runtime/cuda/ptx.cuh). With q = lane / 4 and c = lane % 4:

    bytes 512 t + 16 lane ..   the two kept values of group c, then 4 + c, of columns 32 t .. 32 t + 31, in the order
                               (group c, row q), (group c, row q + 8), (group 4 + c, row q), (group 4 + c, row q + 8)
    bytes 1024 + 4 lane ..     a word for columns 16 c .. 16 c + 15: row q in its low half, row q + 8 in the high one,
                               4 bits a group of four columns, the first place in the lower two

Records are ordered [16 rows][64 columns], so any number of row tiles may go to a warp. Rows are padded to 16 and
columns to 64 with zeros. A group that keeps fewer than two (1:4, a tail, padding) is completed with zeros at free
places.
"""

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Packed
from sparsify_compiler.runtime.bits import unpack_bits
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.rows import HALF_DTYPES, round_up

ROWS = 16
COLUMNS = 64
VALUE_BYTES = 1024
RECORD_BYTES = 1152


def pack_fragments(packed: Packed, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (ceil(out / 16), ceil(in / 64), 576) of `dtype`, float16 or bfloat16: records, bit for bit, on `device`.

    `packed` is of layout "nm" and keeps at most 2 of every 4 columns from column 0 on (2:4, 1:4, 1:2). Takes about six
    times the dense weight's memory while it runs.

    Raises:
        KernelError: another layout or dtype, or groups of four that keep more than two (counted).
    """
    if packed.layout != "nm" or dtype not in HALF_DTYPES:
        raise KernelError(
            f"2:4 fragments are made of layout 'nm' in float16 or bfloat16; found {packed.layout!r} in {dtype}"
        )
    out, in_ = packed.shape
    rows, columns = round_up(out, ROWS), round_up(in_, COLUMNS)
    moved = Packed(packed.layout, packed.pattern, packed.shape, {k: t.to(device) for k, t in packed.tensors.items()})
    dense = functional.pad(unpack(moved).to(dtype), (0, columns - in_, 0, rows - out))
    mask = moved.tensors["mask"]
    mask = functional.pad(mask, (0, columns // 8 - mask.shape[1], 0, rows - out))
    groups = torch.stack((mask & 15, mask >> 4), dim=-1).reshape(rows, columns // 4)  # 4 bits a group
    full = _completed(device)[groups.int()]  # exactly two of four bits
    if broken := int((full == 0).sum()):
        raise KernelError(
            f"weight ({out}, {in_}) is not 2:4: {broken} of {out * -(-in_ // 4)} groups of four columns keep more "
            f"than two; prune with pattern 2:4"
        )
    chosen = unpack_bits((full[:, 0::2] | (full[:, 1::2] << 4)).contiguous(), columns)
    values = dense.reshape(-1)[chosen.reshape(-1)]
    return _records(values.reshape(rows, columns // 2), full)


def unpack_fragments(records: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the dense (out, in) weight of `shape` that `pack_fragments` packed; exact."""
    tiles, steps, _ = records.shape
    raw = records.contiguous().view(torch.uint8).reshape(tiles, steps, RECORD_BYTES)
    values = raw[..., :VALUE_BYTES].contiguous().view(records.dtype)
    values = values.reshape(tiles, steps, 2, 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)  # tile, half, q, ...
    pairs = values.reshape(tiles * ROWS, steps * COLUMNS // 4, 2)
    places = raw[..., VALUE_BYTES:].reshape(tiles, steps, 8, 4, 2, 2).permute(0, 4, 2, 1, 3, 5)  # tile, half, q, k, c
    codes = torch.stack((places & 15, places >> 4), dim=-1).reshape(tiles * ROWS, steps * COLUMNS // 4)
    dense = pairs.new_zeros(*codes.shape, 4)
    index = torch.stack((codes & 3, codes >> 2), dim=-1).long()
    return dense.scatter_(2, index, pairs).reshape(tiles * ROWS, steps * COLUMNS)[: shape[0], : shape[1]].contiguous()


def _records(values: Tensor, full: Tensor) -> Tensor:
    """Order (rows, columns / 2) values and (rows, columns / 4) groups as records."""
    rows, tiles, steps = values.shape[0], values.shape[0] // ROWS, values.shape[1] * 2 // COLUMNS
    # row = 16 tile + 8 half + q; kept value = 32 step + 16 t + 8 high + 2 c + i
    ordered = values.reshape(tiles, 2, 8, steps, 2, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)
    records = torch.empty(tiles, steps, RECORD_BYTES, dtype=torch.uint8, device=values.device)
    records[..., :VALUE_BYTES] = ordered.reshape(tiles, steps, VALUE_BYTES // 2).view(torch.uint8)
    codes = _places(full.device)[full.int()]
    codes = (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(rows, steps, 8)  # one byte for 8 columns
    places = codes.reshape(tiles, 2, 8, steps, 4, 2).permute(0, 3, 2, 4, 1, 5)  # tile, step, q, c, half, byte
    records[..., VALUE_BYTES:] = places.reshape(tiles, steps, RECORD_BYTES - VALUE_BYTES)
    return records.view(values.dtype)


def _completed(device: torch.device) -> Tensor:
    """Map the 4 bits of a group to exactly two bits that contain them; 0 where it has more."""
    table = [0] * 16
    for bits in range(16):
        supersets = [two for two in range(16) if two.bit_count() == 2 and two & bits == bits]
        table[bits] = supersets[0] if supersets else 0
    return torch.tensor(table, dtype=torch.uint8, device=device)


def _places(device: torch.device) -> Tensor:
    """Map two bits of four to their places: the lower in bits 0 and 1, the higher in bits 2 and 3."""
    table = [(bits & -bits).bit_length() - 1 | bits.bit_length() - 1 << 2 if bits else 0 for bits in range(16)]
    return torch.tensor([code & 15 for code in table], dtype=torch.uint8, device=device)
