"""The search for an order of columns: exact gains, brute force on a small case, tails, noise."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparsify_compiler.passes.channel_order import kept_score, order_columns
from sparsify_compiler.pattern import NM


def partitions(columns: tuple[int, ...], of: int) -> list[tuple[int, ...]]:
    """List every order of the columns that differs in its groups."""
    if not columns:
        return [()]
    first, rest = columns[0], columns[1:]
    return [
        (first, *chosen, *tail)
        for chosen in combinations(rest, of - 1)
        for tail in partitions(tuple(column for column in rest if column not in chosen), of)
    ]


def by_hand(scores: Tensor, pattern: NM) -> float:
    return float((scores.double() * pattern.select(scores, pattern.keep / pattern.of)).sum())


@pytest.mark.parametrize(("pattern", "columns"), [(NM(2, 4), 8), (NM(1, 2), 8), (NM(1, 4), 8), (NM(2, 3), 9)], ids=str)
def test_the_search_reaches_nearly_what_every_order_together_offers(pattern: NM, columns: int) -> None:
    shares = []
    for seed in range(8):
        scores = torch.rand(6, columns, generator=torch.Generator().manual_seed(seed)).pow(3)
        best = max(
            kept_score(scores[:, list(order)], pattern) for order in partitions(tuple(range(columns)), pattern.of)
        )
        found = order_columns(scores, pattern, sweeps=50)
        assert found.kept <= best + 1e-9
        shares.append((found.kept - found.kept_before) / max(best - found.kept_before, 1e-9))
    assert sum(shares) / len(shares) > 0.75  # a search by swaps may end beside the best


@pytest.mark.parametrize("columns", [12, 13, 14, 15])
def test_the_sums_are_those_of_the_pattern_tails_included(columns: int) -> None:
    scores = torch.rand(9, columns, generator=torch.Generator().manual_seed(columns)).pow(4)
    found = order_columns(scores, NM(2, 4), sweeps=20)
    assert sorted(found.order.tolist()) == list(range(columns))
    assert found.kept_before == pytest.approx(by_hand(scores, NM(2, 4)), rel=1e-12)
    assert found.kept == pytest.approx(by_hand(scores[:, found.order], NM(2, 4)), rel=1e-12)
    assert found.kept > found.kept_before


def test_no_swap_of_two_columns_is_left_that_gains() -> None:
    scores = torch.rand(20, 16, generator=torch.Generator().manual_seed(3)).pow(4)
    found = order_columns(scores, NM(2, 4), sweeps=100)
    for left, right in combinations(range(16), 2):
        order = found.order.clone()
        order[left], order[right] = found.order[right], found.order[left]
        assert kept_score(scores[:, order], NM(2, 4)) <= found.kept * (1 + 1e-5)  # LEAST_GAIN, and float32 sums


def test_more_sweeps_never_keep_less() -> None:
    scores = torch.rand(30, 40, generator=torch.Generator().manual_seed(4)).pow(4)
    kept = [order_columns(scores, NM(4, 8), sweeps).kept for sweeps in (1, 2, 4, 8, 16)]
    assert kept == sorted(kept)


def test_competing_columns_are_parted() -> None:
    scores = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]]).repeat(3, 1)
    found = order_columns(scores, NM(2, 4), sweeps=10)
    assert found.kept_before == 3 * 20
    assert found.kept == 3 * 36


@pytest.mark.parametrize(
    "scores", [torch.zeros(3, 8), torch.ones(3, 8), torch.eye(8)[:, :4]], ids=["zero", "equal", "one group"]
)
def test_where_no_order_is_better_the_columns_stay(scores: Tensor) -> None:
    found = order_columns(scores, NM(2, 4), sweeps=10)
    assert found.order.tolist() == list(range(scores.shape[1]))
    assert found.kept == found.kept_before
