"""1-swaps: put a removed weight back and take a kept one out while that lowers the loss of the re-solved row."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.elimination import SINGLE
from sparsify_compiler.passes.prune.kept import factor_kept, solve_kept
from sparsify_compiler.passes.prune.quadratic import DampedQuadratic, damped_quadratic, tile_of
from sparsify_compiler.passes.prune.refit import refit
from sparsify_compiler.passes.prune.swap_gains import disjoint_swaps, swap_gains
from sparsify_compiler.pattern import NM
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs, Pruner

CPU_BYTES, GPU_BYTES = 1 << 26, 1 << 30
"""Bytes of (in, in) float64 matrices worked on at once, one a lane; peak use is about four times that."""


@dataclass(frozen=True)
class Swapped:
    """Prune with `inner`, then refine its mask by swaps: CBS (Yu et al. 2022) and SparseSwaps, from the Gram matrix.

    Each row (the rows of a tile together) swaps kept tiles for removed ones, within the group under N:M, in at most
    `rounds` rounds and as long as the best swap gains more than `least_gain` of the row's loss. A swap's gain is exact
    for the row re-solved to optimality before and after, see `swap_gains`; `damp` is the ridge of that loss as a share
    of the Gram's mean diagonal, raised tenfold (and noted) where a factorisation fails. A round makes up to
    `together` swaps of a row that share no tile, a quarter as many until they gain at least what the best alone does.

    Departures: SparseSwaps keeps the weights fixed, which misjudges what a re-solve makes of a mask; CBS swaps between
    a sorted few. Per-row counts stay as `inner` left them.
    """

    inner: Pruner
    rounds: int = 10
    least_gain: float = 1e-3
    together: int = 64
    damp: float = 1e-6

    def __post_init__(self) -> None:
        _check_options(self.rounds, self.least_gain, self.together, self.damp)

    @property
    def name(self) -> str:
        """The word in recipes."""
        return f"{self.inner.name}+swaps"

    @property
    def needs(self) -> Needs:
        """The Gram matrix, and what `inner` needs."""
        return Needs.LOOKAHEAD if self.inner.needs is Needs.LOOKAHEAD else Needs.GRAM

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Select with `inner`, then swap. Raises what `inner` and `refine` do."""
        return refine(layer, self.inner.prune(layer), self.rounds, self.least_gain, self.together, self.damp)


def refine(
    layer: LayerProblem,
    solution: LayerSolution,
    rounds: int = 10,
    least_gain: float = 1e-3,
    together: int = 64,
    damp: float = 1e-6,
) -> LayerSolution:
    """Return `solution` with a mask refined by swaps and re-solved weights; the options are those of `Swapped`.

    The weights are those of `refit`. A lane's new mask is taken only where its loss falls, so the loss of the re-solved
    layer never rises. Patterns and the counts of every row stay as they are. `stats` gain "swaps", "swap_rounds" and
    "swapped_lanes".

    Raises:
        DataError: the problem carries no Gram matrix.
        CalibrationError: it is not finite.
        SingularGramError: it stayed indefinite at every damping up to 1, or is all zero.
    """
    _check_options(rounds, least_gain, together, damp)
    rows, cols = tile_of(layer.pattern)
    quadratic = damped_quadratic(layer, damp, "swaps")
    lanes, in_ = len(layer.weight) // rows, layer.weight.shape[1]
    keep = solution.keep.view(lanes, rows, in_ // cols, cols)[:, 0, :, 0].contiguous()  # (lanes, tiles)
    search = _Search(quadratic, rows, cols, _groups(layer), rounds, least_gain, together)
    swapped, swaps, used = search.run(keep)
    before = refit(layer, solution)
    after = refit(layer, _with_mask(layer, solution, quadratic, swapped))
    better = _row_losses(layer, after.weight).view(lanes, rows).sum(dim=1) < (
        _row_losses(layer, before.weight).view(lanes, rows).sum(dim=1)
    )
    better &= (swapped != keep).any(dim=1)
    taken = better.repeat_interleave(rows)[:, None]
    weight = torch.where(taken, after.weight, before.weight)
    stats = {
        **solution.stats,
        "swaps": float(swaps[better].sum()),
        "swap_rounds": float(used),
        "swapped_lanes": float(better.sum()),
    }
    loss = layer.loss(weight)
    notes = tuple(dict.fromkeys((*solution.notes, *quadratic.notes)))
    return LayerSolution(weight, torch.where(taken, after.keep, before.keep), loss, loss, stats, notes)


@dataclass(frozen=True)
class _Search:
    """What stays the same while masks change; `groups` (tiles,) as `_groups` says."""

    quadratic: DampedQuadratic
    rows: int
    cols: int
    groups: Tensor | None
    rounds: int
    least_gain: float
    together: int

    def run(self, keep: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the keep mask (lanes, tiles) after all swaps, how many every lane made, and the most rounds used."""
        keep, swaps, used = keep.clone(), torch.zeros(len(keep), dtype=torch.int64, device=keep.device), 0
        in_ = self.quadratic.matrix.shape[0]
        budget = GPU_BYTES if keep.is_cuda else CPU_BYTES
        # Wide and flat tiles hold rows x columns of residuals for every pair of tiles.
        chunk = max(budget // (8 * in_ * in_ * max(1, self.rows // self.cols)), 1)
        # Lanes that keep about as much come together: the widest sets the size of a chunk.
        by_width = keep.sum(dim=1).sort(stable=True).indices
        for first in range(0, len(by_width), chunk):
            active = by_width[first : first + chunk]
            for round_ in range(self.rounds):
                if not len(active):
                    break
                used = max(used, round_ + 1)
                changed, new, count = self._round(keep[active], active)
                keep[active], swaps[active] = new, swaps[active] + count
                active = active[changed]
        return keep, swaps, used

    def _round(self, keep: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Swap once in lanes with masks `keep` (n, tiles): whether each did (n,) bool, the masks, and how often."""
        n, tiles = keep.shape
        start = self.quadratic.start.view(-1, self.rows, tiles * self.cols)[lanes]
        moment = self.quadratic.moment.view(-1, self.rows, tiles * self.cols)[lanes]
        kept, removed, gains, value = self._gains(keep, lanes, moment)
        loss = ((start - value) * moment).sum(dim=(1, 2))  # what is lost against the minimiser
        order, partner, best = disjoint_swaps(gains)
        worth = best > self.least_gain * loss[:, None]  # (n, removed), best first
        most = worth.sum(dim=1).clamp_max(self.together)
        new, count = keep.clone(), torch.zeros(n, dtype=torch.int64, device=keep.device)
        open_ = (most > 0).nonzero()[:, 0]
        while len(open_):
            rank = torch.arange(order.shape[1], device=keep.device)
            used = rank < most[open_, None]
            trial = keep[open_]
            trial = trial.scatter(1, removed[open_].gather(1, order[open_]), used) | trial
            gone = torch.zeros_like(trial).scatter_add(1, kept[open_].gather(1, partner[open_]), used)
            trial &= ~gone
            solved = self._solve(trial, moment[open_])
            gain = ((solved - value[open_]) * moment[open_]).sum(dim=(1, 2))
            # Together they must bring what the best does alone; that one brings what was computed, up to rounding.
            alone = most[open_] == 1
            enough = torch.where(alone, gain > 0, gain >= best[open_, 0])
            done = open_[enough]
            new[done], count[done] = trial[enough], most[done]
            open_ = open_[~enough & ~alone]
            most[open_] = (most[open_] // 4).clamp_min(1)
        return count > 0, new, count

    def _solve(self, keep: Tensor, moment: Tensor) -> Tensor:
        return solve_kept(self.quadratic.matrix, moment, keep.repeat_interleave(self.cols, 1))

    def _gains(self, keep: Tensor, lanes: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return kept and removed tiles (n, K), (n, R), gains (n, R, K) and the weights now (n, rows, in)."""
        matrix, cols = self.quadratic.matrix, self.cols
        counts = keep.sum(dim=1, keepdim=True)
        by_kept = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices
        most, least = int(counts.max()), int(counts.min())
        kept, removed = by_kept[:, :most], by_kept[:, least:]
        position = torch.arange(keep.shape[1], device=keep.device)
        free = position[least:] >= counts  # (n, R): False where a lane that keeps more fills up its list
        allowed = free[:, :, None] & (position[:most] < counts)[:, None, :]
        if self.groups is not None:
            allowed &= self.groups[removed][:, :, None] == self.groups[kept][:, None, :]
        part = factor_kept(matrix, keep.repeat_interleave(cols, 1), lanes, most * cols)
        across = part.columns[:, None].expand(-1, self.rows, -1)
        right = moment.gather(2, across) * part.valid[:, None]
        inner = torch.cholesky_solve(right.transpose(1, 2), part.lower)  # (n, K * cols, rows)
        value = torch.zeros_like(moment).scatter_(2, across, inner.transpose(1, 2))
        outside = (removed[:, :, None] * cols + torch.arange(cols, device=keep.device)).flatten(1)
        dtype = torch.float32 if cols == 1 and matrix.shape[0] > SINGLE else torch.float64
        cross = matrix.to(dtype)[outside[:, :, None], part.columns[:, None, :]]  # (n, R * cols, K * cols)
        cross.mul_(part.valid[:, None]).mul_(free.repeat_interleave(cols, 1)[:, :, None])
        across = outside[:, None].expand(-1, self.rows, -1)
        residual = (moment - value @ matrix).gather(2, across).transpose(1, 2)
        inverse = torch.cholesky_inverse(part.lower)
        gains = swap_gains(inverse, cross, _diagonal(matrix, outside, cols), inner, residual, cols)
        return kept, removed, gains.masked_fill_(~allowed, -torch.inf), value


def _diagonal(matrix: Tensor, columns: Tensor, cols: int) -> Tensor:
    """Return the diagonal blocks (n, tiles, cols, cols) of `matrix` at `columns` (n, tiles * cols)."""
    split = columns.view(len(columns), -1, cols)
    return matrix[split[:, :, :, None], split[:, :, None, :]]


def _groups(layer: LayerProblem) -> Tensor | None:
    """Return the N:M group of every column (in,) int64, None for other patterns."""
    if not isinstance(layer.pattern, NM):
        return None
    spans = layer.pattern.groups(layer.weight.shape[1], layer.run)
    widths = torch.tensor([stop - start for start, stop in spans], device=layer.weight.device)
    return torch.arange(len(spans), device=layer.weight.device).repeat_interleave(widths)


def _with_mask(layer: LayerProblem, solution: LayerSolution, quadratic: DampedQuadratic, keep: Tensor) -> LayerSolution:
    """Return the solution of the damped quadratic on the tiles of `keep` (lanes, tiles)."""
    (rows, cols), shape = tile_of(layer.pattern), layer.weight.shape
    columns = keep.repeat_interleave(cols, 1)
    moment = quadratic.moment.view(len(keep), rows, -1)
    weight = solve_kept(quadratic.matrix, moment, columns).view(shape) * quadratic.scale
    return replace(solution, weight=weight.float(), keep=columns.repeat_interleave(rows, 0), loss=None)


def _row_losses(layer: LayerProblem, weight: Tensor) -> Tensor:
    """Return every row's share of the loss, up to a constant per row: (out,) float64."""
    assert layer.gram is not None
    matrix = layer.gram.matrix
    if layer.targets is None:
        delta = weight.to(matrix) - layer.weight.to(matrix)
        return ((delta @ matrix) * delta).sum(dim=1)
    new = weight.to(matrix)
    return ((new @ matrix - 2 * layer.weight.to(matrix) @ layer.targets.cross.t()) * new).sum(dim=1)


def _check_options(rounds: int, least_gain: float, together: int, damp: float) -> None:
    if rounds < 1 or together < 1:
        raise ValueError(f"rounds {rounds}, together {together}: both must be at least 1")
    if not 0 <= least_gain < 1:
        raise ValueError(f"least_gain {least_gain}: must lie in [0, 1), a share of a row's loss")
    if not 0 < damp <= 1:
        raise ValueError(f"damp {damp}: must lie in (0, 1], a share of the Gram's mean diagonal")
