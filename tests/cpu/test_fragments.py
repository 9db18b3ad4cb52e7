"""2:4 in fragment order against the PTX manual's definition, element by element."""

import dataclasses

import numpy as np
import pytest
import torch
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Packed
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.nm.fragments import pack_fragments, unpack_fragments

CPU = torch.device("cpu")
SHAPES = ((16, 64), (1, 4), (7, 5), (33, 70), (48, 192), (17, 131))


def weight(pattern: NM | Unstructured, out: int, in_: int, dtype: torch.dtype = torch.float16) -> Packed:
    dense = torch.randn(out, in_, generator=torch.Generator().manual_seed(out * in_)).to(dtype)
    return format_for(pattern).pack(dense, choose(pattern, dense), pattern)


def dense_from_records(records: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Read a weight from uint16 records (tiles, steps, 576) the slow way, as the PTX ISA defines the registers.

    mma.sp.m16n8k32, A: a0, a1 are at row groupID, a2, a3 at row groupID + 8, a4, a5 and a6, a7 the same at the columns
    from 16 on; of each chunk of four columns two are stored, column group (threadID_in_group, + 4). Metadata: lanes
    whose threadID_in_group is 2 F and 2 F + 1 give the indices, the first lane for columns 0-15.
    """
    dense = np.zeros((rows, columns), np.uint16)
    for tile, step in np.ndindex(records.shape[:2]):
        words = records[tile, step]
        for t in range(2):
            for lane in range(32):
                group_id, thread = divmod(lane, 4)
                for i in range(8):
                    row = group_id + (8 if i in (2, 3, 6, 7) else 0)
                    chunk = thread + (4 if i >= 4 else 0)
                    holder = group_id * 4 + 2 * t + (chunk >= 4)
                    metadata = int(words[512 + 2 * holder]) | int(words[512 + 2 * holder + 1]) << 16
                    nibble = metadata >> (4 * (chunk % 4) + (16 if row >= 8 else 0)) & 15
                    first, second = nibble & 3, nibble >> 2
                    assert first < second
                    column = step * 64 + 32 * t + 4 * chunk + (second if i % 2 else first)
                    r = tile * 16 + row
                    if r < rows and column < columns:
                        dense[r, column] = words[t * 256 + lane * 8 + i]
                    else:
                        assert words[t * 256 + lane * 8 + i] == 0
    return dense


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_records_are_the_registers_of_the_instruction(pattern: NM, shape: tuple[int, int]) -> None:
    packed = weight(pattern, *shape)
    records = pack_fragments(packed, CPU, torch.float16)
    assert tuple(records.shape) == (-(-shape[0] // 16), -(-shape[1] // 64), 576)
    expected = unpack(packed).view(torch.int16).numpy().view(np.uint16)
    found = dense_from_records(records.view(torch.int16).numpy().view(np.uint16), *shape)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unpacking_gives_the_weight_back_exactly(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        packed = weight(NM(2, 4), *shape, dtype)
        records = pack_fragments(packed, CPU, dtype)
        assert records.dtype == dtype
        assert torch.equal(unpack_fragments(records, shape), unpack(packed))


def test_kept_zeros_and_negative_zeros_survive() -> None:
    dense = torch.tensor([[0.0, -0.0, 1.0, 2.0] * 16])
    keep = torch.tensor([[True, True, False, False] * 16])
    packed = format_for(NM(2, 4)).pack(dense.half(), keep, NM(2, 4))
    back = unpack_fragments(pack_fragments(packed, CPU, torch.float16), (1, 64))
    assert torch.equal(back.view(torch.int16), unpack(packed).view(torch.int16))


def test_what_is_not_two_of_four_is_refused_with_a_count() -> None:
    packed = dataclasses.replace(weight(NM(4, 8), 4, 64), pattern=NM(2, 4))
    more = int((unpack(packed).reshape(-1, 4).ne(0).sum(dim=1) > 2).sum())
    assert more
    with pytest.raises(KernelError, match=f"not 2:4: {more} of 64 groups of four columns keep more than two"):
        pack_fragments(packed, CPU, torch.float16)
    with pytest.raises(KernelError, match="layout 'nm'"):
        pack_fragments(weight(Unstructured(), 4, 8), CPU, torch.float16)
    with pytest.raises(KernelError, match=r"torch\.float32"):
        pack_fragments(weight(NM(2, 4), 4, 8), CPU, torch.float32)
