"""Keep masks as bits: bit i % 8 (lowest first) of byte i // 8 of a row is column i."""

import torch
from torch import Tensor


def pack_bits(keep: Tensor) -> Tensor:
    """Pack `keep` (rows, columns) bool into (rows, ceil(columns / 8)) uint8; bits past the last column are 0.

    The order of NumPy's `packbits(axis=1, bitorder="little")`.
    """
    rows, columns = keep.shape
    padded = torch.nn.functional.pad(keep, (0, -columns % 8)).reshape(rows, -(-columns // 8), 8)
    return (padded << _places(keep.device)).sum(dim=2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Return the bool mask (rows, columns) that `pack_bits` packed into `bits` (rows, ceil(columns / 8)) uint8."""
    rows, width = bits.shape
    spread = (bits.unsqueeze(2) >> _places(bits.device)) & 1  # (rows, width, 8)
    return spread.reshape(rows, width * 8)[:, :columns].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
