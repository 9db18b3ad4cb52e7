"""The order of n:m weights that the tensor-core kernel reads, against a reference that follows its description."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.nm.nm_runs import RunOrder, Runs, choose_order, from_runs, order_of, to_runs

PATTERNS = tuple(
    NM(keep, of)
    for keep, of in (
        (4, 8),
        (2, 8),
        (8, 16),
        (4, 16),
        (16, 32),
        (8, 32),
        (2, 4),
        (1, 4),
        (1, 2),
        (3, 8),
        (2, 32),
        (30, 32),
    )
)


def read_run(values: list[int], mask: int, order: RunOrder) -> list[int]:
    """Put the 16-bit values of one group back by its mask, as the description of nm_runs.py says."""
    columns = [i for i in range(order.group) if mask >> i & 1]
    dense = [0] * order.group
    if order.order != "gather":
        for column, value in zip(columns, values, strict=True):
            dense[column] = value
        return dense
    word, left = 0, 0
    for octet in range(0, order.group, 8):
        singles = []
        openings = []  # (first column of the word, its second), a word each, by the pair that opens it
        for pair in range(octet, octet + 8, 2):
            kept = [column for column in (pair, pair + 1) if column in columns]
            if len(kept) == 2:
                openings.append((pair, tuple(kept)))
            elif kept:
                singles.append((pair, kept[0]))
        for first, second in zip(singles[::2], singles[1::2], strict=False):
            openings.append((first[0], (first[1], second[1])))
        for _, (low, high) in sorted(openings):
            dense[low], dense[high] = values[2 * word], values[2 * word + 1]
            word += 1
        if len(singles) % 2:
            dense[singles[-1][1]] = values[order.count - 2 - 2 * (left // 2) + left % 2]
            left += 1
    return dense


def reference(runs: Runs, shape: tuple[int, int]) -> np.ndarray:
    """Return the dense weight as uint16, lane by lane."""
    order = order_of(runs.words)
    tiles, chunks = runs.masks.shape[:2]
    masks = runs.masks.numpy().view(np.uint32)
    words = runs.words.numpy()
    dense = np.zeros((tiles * 16, chunks * 128), np.uint16)
    per = order.count // 2
    for tile, chunk, half, lane in np.ndindex(*masks.shape):
        row, start = 16 * tile + 8 * half + lane // 4, 128 * chunk + 32 * (lane % 4)
        for group in range(32 // order.group):
            if order.order == "pair":
                own = [words[tile, chunk, group // 2, lane, group % 2, half]]
            elif order.order == "ends":
                own = [words[tile, chunk, group, lane, half, word] for word in range(per)]
            else:
                own = [words[tile, chunk, group, half, word, lane] for word in range(per)]
            values = [int(v) for v in np.array(own, np.int32).view(np.uint16)]
            mask = int(masks[tile, chunk, half, lane]) >> (group * order.group) & ((1 << order.group) - 1)
            first = start + group * order.group
            dense[row, first : first + order.group] = read_run(values, mask, order)
    assert not dense[shape[0] :].any()
    assert not dense[:, shape[1] :].any()
    return dense[: shape[0], : shape[1]]


def chosen(pattern: NM, out: int, in_: int, run: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out * in_)
    weight = torch.randn(out, in_, generator=generator).half()
    return weight, pattern.select(weight.abs().double(), 0.5, run)


def check(weight: Tensor, keep: Tensor, order: RunOrder | None = None) -> RunOrder:
    runs = to_runs(keep, weight[keep], order)
    shape = (weight.shape[0], weight.shape[1])
    expected = weight.where(keep, torch.zeros_like(weight))
    np.testing.assert_array_equal(reference(runs, shape), expected.numpy().view(np.uint16))
    assert torch.equal(from_runs(runs, shape, weight.dtype), expected)
    return order_of(runs.words)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packed_weights_read_back_as_described_and_by_the_inverse(pattern: NM) -> None:
    for out, in_ in ((1, 32), (17, 130), (16, 128), (3, 163)):
        check(*chosen(pattern, out, in_))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_of_a_group_take_no_more_than_the_pattern_keeps(pattern: NM) -> None:
    order = check(*chosen(pattern, 32, 256))
    if pattern.keep % 2 == 0 or pattern.of <= 16:
        assert order.count * pattern.of == pattern.keep * order.group


def test_orders_follow_the_smallest_group() -> None:
    expected = {NM(2, 4): (8, 4), NM(1, 4): (8, 2), NM(4, 8): (8, 4), NM(3, 8): (16, 6), NM(8, 16): (16, 8)}
    for pattern, (group, count) in expected.items():
        assert choose_order(chosen(pattern, 16, 128)[1]) == RunOrder(group, count)


@pytest.mark.parametrize("group", [8, 16, 32])
def test_every_distribution_over_octets_is_packed(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    half, quarter = group // 2, max(group // 4, 2)
    for count in {half, quarter, group - 2, group}:
        rows = [
            torch.arange(group) < count,
            torch.arange(group) >= group - count,
            torch.arange(group) * count % group < count,
            *(torch.rand(group, generator=generator).argsort() < count for _ in range(60)),
        ]
        keep = torch.stack(rows).repeat(1, 128 // group)
        check(torch.randn(keep.shape, generator=generator).half(), keep, RunOrder(group, count))


def test_groups_cut_by_a_tap_and_tails_are_filled_with_zeros() -> None:
    for pattern, in_, run in ((NM(4, 8), 180, 20), (NM(2, 4), 90, 10), (NM(8, 32), 360, 40), (NM(3, 8), 99, 33)):
        check(*chosen(pattern, 19, in_, run))


def test_kept_zeros_and_empty_weights_survive() -> None:
    weight, keep = chosen(NM(8, 16), 16, 128)
    check(torch.zeros_like(weight), keep)
    check(weight, torch.zeros_like(keep))
    check(weight, torch.ones_like(keep))


def test_slabs_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, keep = chosen(NM(16, 32), 70, 160)
    whole = to_runs(keep, weight[keep])
    monkeypatch.setattr("sparsify_compiler.runtime.nm.nm_runs.SLAB_ENTRIES", 1)
    parts = to_runs(keep, weight[keep])
    assert torch.equal(whole.words, parts.words)
    assert torch.equal(whole.masks, parts.masks)


def test_a_group_with_too_many_is_refused_with_the_counts() -> None:
    keep = torch.ones(2, 64, dtype=torch.bool)
    with pytest.raises(KernelError, match="cannot pack 8 kept of 8 columns where 4 have room"):
        to_runs(keep, torch.ones(128).half(), RunOrder(8, 4))
