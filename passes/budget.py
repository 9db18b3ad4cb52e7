"""Divide one budget of removed weights among sites: exact totals, and the least cost where costs are convex."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

STEPS = 64
"""Points between a site's bounds at which its cost is taken."""


@dataclass(frozen=True)
class Share:
    """How many of a site's `entries` weights may go: `low` to `high`, whole `unit`s all; the recipe asked for `asked`.

    0 <= low <= asked <= high < entries.
    """

    entries: int
    unit: int
    asked: int
    low: int
    high: int

    def sparsity(self, removed: int) -> float:
        """Return the share that `removed` weights are."""
        return removed / self.entries


@dataclass(frozen=True)
class Curve:
    """A cost (>= 0) at a few sparsities, in increasing order; geometric in between, as layer errors nearly are.

    Linear where a cost is zero, which no geometric mean joins; outside the outermost ends go on.
    """

    sparsities: tuple[float, ...]
    costs: tuple[float, ...]

    def __call__(self, sparsity: float) -> float:
        """Return the cost at `sparsity`."""
        if len(self.sparsities) == 1:
            return self.costs[0]
        right = min(max(bisect.bisect(self.sparsities, sparsity), 1), len(self.sparsities) - 1)
        first, last = self.costs[right - 1], self.costs[right]
        width = self.sparsities[right] - self.sparsities[right - 1]
        part = (sparsity - self.sparsities[right - 1]) / width
        if first > 0 and last > 0:
            return float(first ** (1 - part) * last**part)
        return first + part * (last - first)


def fill(shares: Sequence[Share], costs: Sequence[Callable[[float], float]]) -> list[int]:
    """Return how many weights each site loses: the costs sum to the least, the counts to those asked.

    `costs` map a site's sparsity to its cost. Each is taken at `STEPS` points between its bounds and replaced by the
    greatest convex function below those; then steps are taken by least cost a weight until the budget is used, which
    is optimal for convex costs (a step never comes before a cheaper one of its own site). Equal costs: first site.
    Where units do not fit the rest of the budget, a little less is removed than was asked, never more.
    """
    removed = [share.low for share in shares]
    budget = sum(share.asked - share.low for share in shares)
    steps = sorted(
        (slope, site, count)
        for site, (share, cost) in enumerate(zip(shares, costs, strict=True))
        for slope, count in _steps(share, cost)
    )
    for _, site, count in steps:
        taken = min(count, budget // shares[site].unit * shares[site].unit)
        removed[site] += taken
        budget -= taken
    return removed


def round_to_units(shares: Sequence[Share], wanted: Sequence[Fraction]) -> list[int]:
    """Round the numbers of weights `wanted` to whole units, their sum that of `asked`, by the largest remainder.

    Every count is within one unit of what was wanted (Hamilton's method; equal remainders: first site), but that the
    sites of the smallest units take what larger ones leave. Where units do not fit the rest, a little less is removed
    than was asked, never more.
    """
    removed = [int(want // share.unit) * share.unit for share, want in zip(shares, wanted, strict=True)]
    budget = sum(share.asked for share in shares) - sum(removed)
    left = [want - count for want, count in zip(wanted, removed, strict=True)]
    for site in sorted(range(len(shares)), key=lambda site: (-left[site] / shares[site].unit, site)):
        if shares[site].unit <= budget and left[site] > 0:
            removed[site] += shares[site].unit
            budget -= shares[site].unit
    for site in sorted(range(len(shares)), key=lambda site: (shares[site].unit, site)):
        taken = min(shares[site].high - removed[site], budget) // shares[site].unit * shares[site].unit
        removed[site] += max(taken, 0)
        budget -= max(taken, 0)
    return removed


def _steps(share: Share, cost: Callable[[float], float]) -> list[tuple[float, int]]:
    """Return (cost a weight, weights) for every edge of the lower convex hull of the cost, slopes increasing."""
    units = (share.high - share.low) // share.unit
    counts = sorted({share.low + units * step // STEPS * share.unit for step in range(STEPS + 1)})
    hull: list[tuple[int, float]] = []
    for count in counts:
        point = (count, cost(share.sparsity(count)))
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(_slope(left, right), right[0] - left[0]) for left, right in pairwise(hull)]


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
