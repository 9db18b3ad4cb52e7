"""1-swaps: put a removed tile back and take a kept one out while that lowers the loss of the re-solved row."""

from dataclasses import replace

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.quadratic import DampedQuadratic, damped_quadratic, tile_of
from sparsify_compiler.passes.prune.refit import refit
from sparsify_compiler.passes.prune.swap_search import Search
from sparsify_compiler.pattern import NM
from sparsify_compiler.problem import LayerProblem, LayerSolution


def refine(
    layer: LayerProblem, solution: LayerSolution, rounds: int, least_gain: float = 1e-3, damp: float = 1e-6
) -> LayerSolution:
    """Return `solution` with its mask refined by swaps, as CBS (Yu et al. 2022) and SparseSwaps, from the Gram matrix.

    Each row (the rows of a tile together) swaps kept tiles for removed ones, within the group under N:M, in at most
    `rounds` rounds and as long as the best swap gains more than `least_gain` in [0, 1) of the row's loss. A swap's gain
    is exact for the row re-solved to optimality before and after; `damp` in (0, 1] is the ridge of that loss as a share
    of the Gram's mean diagonal, raised tenfold (and noted) where a factorisation fails. Weights are re-solved on the
    new mask, as `refit` does. A lane's new mask is taken only where its re-solved loss falls, so the layer's never
    rises. Patterns and the count of every row stay as they are.

    Departures: SparseSwaps keeps the weights fixed, which misjudges what a re-solve makes of a mask; CBS swaps between
    a sorted few. Here a round swaps among the tiles that a bound on the gain and then the gain itself put first, see
    `swap_search`.

    `loss_selected` stays the loss as the method left it. `stats` gain "loss_before_swaps" (re-solved) and
    "loss_after_swaps", "swaps", "swap_rounds" and "swapped_lanes".

    Raises:
        ValueError: an option out of range.
        DataError: the problem carries no Gram matrix.
        CalibrationError: it is not finite.
        SingularGramError: it stayed indefinite at every damping up to 1, or is all zero.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: must be at least 1")
    if not 0 <= least_gain < 1:
        raise ValueError(f"least_gain {least_gain}: must lie in [0, 1), a share of a row's loss")
    if not 0 < damp <= 1:
        raise ValueError(f"damp {damp}: must lie in (0, 1], a share of the Gram's mean diagonal")
    rows, cols = tile_of(layer.pattern)
    quadratic = damped_quadratic(layer, damp, "swaps")
    lanes, in_ = len(layer.weight) // rows, layer.weight.shape[1]
    keep = solution.keep.view(lanes, rows, in_ // cols, cols)[:, 0, :, 0].contiguous()  # (lanes, tiles)
    found = Search(quadratic, rows, cols, _groups(layer), rounds, least_gain).run(keep)
    before = refit(layer, _solution(layer, solution, quadratic, keep, found.before))
    after = refit(layer, _solution(layer, solution, quadratic, found.keep, found.after))
    gained = (_row_losses(layer, before.weight) - _row_losses(layer, after.weight)).view(lanes, rows).sum(dim=1)
    better = (gained > 0) & (found.keep != keep).any(dim=1)
    taken = better.repeat_interleave(rows)[:, None]
    weight = torch.where(taken, after.weight, before.weight)
    loss = layer.loss(weight)
    stats = {
        **solution.stats,
        "swaps": float(found.swaps[better].sum()),
        "swap_rounds": float(found.rounds),
        "swapped_lanes": float(better.sum()),
    }
    if before.loss is not None and loss is not None:
        stats |= {"loss_before_swaps": before.loss, "loss_after_swaps": loss}
    selected = layer.loss(solution.weight) if solution.loss_selected is None else solution.loss_selected
    notes = tuple(dict.fromkeys((*solution.notes, *quadratic.notes, *after.notes)))
    return LayerSolution(weight, torch.where(taken, after.keep, before.keep), selected, loss, stats, notes)


def _groups(layer: LayerProblem) -> Tensor | None:
    """Return the N:M group of every column (in,) int64, None for other patterns."""
    if not isinstance(layer.pattern, NM):
        return None
    spans = layer.pattern.groups(layer.weight.shape[1], layer.run)
    widths = torch.tensor([stop - start for start, stop in spans], device=layer.weight.device)
    return torch.arange(len(spans), device=layer.weight.device).repeat_interleave(widths)


def _solution(
    layer: LayerProblem, solution: LayerSolution, quadratic: DampedQuadratic, keep: Tensor, weight: Tensor
) -> LayerSolution:
    """Return `solution` with the tiles of `keep` (lanes, tiles) and the scaled weights (lanes, rows, in)."""
    (rows, cols), shape = tile_of(layer.pattern), layer.weight.shape
    mask = keep.repeat_interleave(cols, 1).repeat_interleave(rows, 0)
    dense = (weight.view(shape) * quadratic.scale).float().masked_fill(~mask, 0.0)
    return replace(solution, weight=dense, keep=mask, loss=None)


def _row_losses(layer: LayerProblem, weight: Tensor) -> Tensor:
    """Return every row's share of the loss, up to a constant per row: (out,) float64."""
    assert layer.gram is not None
    matrix = layer.gram.matrix
    if layer.targets is None:
        delta = weight.to(matrix) - layer.weight.to(matrix)
        return ((delta @ matrix) * delta).sum(dim=1)
    new = weight.to(matrix)
    return ((new @ matrix - 2 * layer.weight.to(matrix) @ layer.targets.cross.t()) * new).sum(dim=1)
