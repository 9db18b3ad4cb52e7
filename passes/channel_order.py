"""Order columns so that N:M groups lose as little as they can: swaps of columns between groups, many at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.pattern import NM

LEAST_GAIN = 1e-6
"""A swap has to gain this share of a group's mean kept score: less is noise of float32 sums."""


@dataclass(frozen=True)
class ColumnOrder:
    """`order` (columns,) int64: position p takes column `order[p]`. `kept` and `kept_before` are sums of scores."""

    order: Tensor
    kept: float
    kept_before: float


def kept_score(scores: Tensor, pattern: NM) -> float:
    """Sum, in float64, the scores (rows, columns), at least 0, that the best `keep` of every group hold."""
    return float(_grouped(scores, pattern).topk(pattern.keep, dim=2).values.sum(dtype=torch.float64))


def order_columns(scores: Tensor, pattern: NM, sweeps: int) -> ColumnOrder:
    """Search an order of the columns of `scores` (rows, columns), at least 0, that keeps much of their sum.

    The objective is Pool & Yu 2021's, "Channel Permutations for N:M Sparsity", eq. 1: what remains after each row's
    best `keep` of every group were kept. Their greedy method tries pairs of groups by themselves; here the gain of all
    swaps of two columns is computed at once. With t_i the largest score a row leaves outside group(i) without column i
    among those it keeps, and b_i the sum of its other kept ones, column j in i's place makes the group
    b_i + max(t_i, s_j), and Σ max(t, s) = ½ Σ (t + s + |t − s|): one matrix of L1 distances gives every gain exactly.
    A sweep takes swaps from the best on, none in a group that has changed in it, so that gains add up; at most
    `sweeps` sweeps, each never worse than the one before. Float32; time columns² · rows a sweep.
    """
    columns = scores.shape[1]
    state = _Search(scores.float() / scores.max().clamp_min(torch.finfo(torch.float32).tiny), pattern)
    for _ in range(sweeps):
        if not state.sweep():
            break
    order = state.order[state.order < columns]
    before, kept = kept_score(scores, pattern), kept_score(scores[:, order], pattern)
    if kept <= before:
        return ColumnOrder(torch.arange(columns, device=scores.device), before, before)
    return ColumnOrder(order, kept, before)


class _Search:
    """An order and what it takes to improve it. A tail is filled up with columns of zeros, which stay in place."""

    def __init__(self, scores: Tensor, pattern: NM) -> None:
        rows, columns = scores.shape
        fill = -columns % pattern.of
        self._scores = torch.cat([scores, scores.new_zeros(rows, fill)], dim=1)
        self._pattern = pattern
        self._sums = self._scores.sum(0)
        self._movable = torch.arange(columns + fill, device=scores.device) < columns
        self.order = torch.arange(columns + fill, device=scores.device)
        self._stale = self.order.clone()
        self._instead = scores.new_zeros(columns + fill, columns + fill)  # by column: Σ max(t_i, s_j)

    def sweep(self) -> bool:
        """Swap columns between disjoint pairs of groups; say whether any swap gained."""
        of = self._pattern.of
        best, place = self._best_swaps()
        first, second = _disjoint(best)
        if not len(first):
            return False
        where = place[first, second]
        left, right = first * of + where // of, second * of + where % of
        self.order[left], self.order[right] = self.order[right], self.order[left]
        changed = torch.cat([first, second])
        self._stale = (changed[:, None] * of + torch.arange(of, device=changed.device)).flatten()
        return True

    def _best_swaps(self) -> tuple[Tensor, Tensor]:
        """Return per pair of groups the best gain, (groups, groups), and which of the of² swaps has it."""
        of = self._pattern.of
        groups = _grouped(self._scores[:, self.order], self._pattern)  # (rows, groups, of)
        top, place = groups.topk(self._pattern.keep + 1, dim=2)
        kept = top[:, :, :-1].sum(2)
        inside = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, place[:, :, :-1], True)
        threshold = torch.where(inside, top[:, :, -1:], top[:, :, -2:-1]).flatten(1)
        others = torch.where(inside, kept[:, :, None] - groups, (kept - top[:, :, -2])[:, :, None]).flatten(1)
        stale = self._stale
        distance = torch.cdist(threshold[:, stale].T.contiguous(), self._scores.T.contiguous(), p=1)
        self._instead[self.order[stale]] = (threshold[:, stale].sum(0)[:, None] + self._sums + distance) / 2
        total = kept.sum(0)
        change = self._instead[self.order][:, self.order]
        change += (others.sum(0) - total.repeat_interleave(of))[:, None]
        gain = change + change.T
        free = self._movable[self.order]
        gain.masked_fill_(~(free[:, None] & free), 0)
        count = len(total)
        pairs = gain.reshape(count, of, count, of).permute(0, 2, 1, 3).reshape(count, count, of * of)
        best, which = pairs.max(2)
        best.fill_diagonal_(0)
        best.masked_fill_(best <= LEAST_GAIN * total.mean(), 0)
        return best, which


def _disjoint(best: Tensor) -> tuple[Tensor, Tensor]:
    """Choose pairs (a < b) of groups, no group twice: pairs that are each other's best, then again among the rest."""
    best = torch.maximum(best, best.T)
    numbers = torch.arange(len(best), device=best.device)
    chosen = []
    while True:
        gain, partner = best.max(1)
        mutual = (gain > 0) & (partner[partner] == numbers) & (numbers < partner)
        if not mutual.any():
            break
        pair = torch.stack([numbers[mutual], partner[mutual]])
        chosen.append(pair)
        best[pair.flatten()] = 0
        best[:, pair.flatten()] = 0
    pairs = torch.cat(chosen, dim=1) if chosen else numbers.new_empty(2, 0)
    return pairs[0], pairs[1]


def _grouped(scores: Tensor, pattern: NM) -> Tensor:
    """Bring (rows, columns) into (rows, groups, of), a tail filled up with zeros."""
    fill = -scores.shape[1] % pattern.of
    return torch.nn.functional.pad(scores, (0, fill)).reshape(len(scores), -1, pattern.of)
