"""1-swaps: put a removed tile back and take a kept one out while that lowers the loss of the re-solved row."""

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.quadratic import DampedQuadratic, damped_quadratic, tile_of
from sparsify_compiler.passes.prune.refit import too_few_tokens
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
    of the Gram's mean diagonal, raised tenfold (and noted) where a factorisation fails. Weights are re-solved exactly
    with that ridge. A lane's new mask is taken only where its loss falls, so the layer's never rises. Patterns and the
    count of every row stay as they are.

    Departures: SparseSwaps keeps the weights fixed, which misjudges what a re-solve makes of a mask; CBS swaps between
    a sorted few. Here a round swaps among the tiles that a bound on the gain and then the gain itself put first, see
    `swap_search`.

    `loss_selected` stays the loss as the method left it. `stats` gain "loss_before_swaps" (re-solved where that helps)
    and "loss_after_swaps", "swaps", "swap_rounds" and "swapped_lanes".

    Raises:
        ValueError: an option out of range.
        DataError: the problem carries no Gram matrix.
        CalibrationError: it is not finite.
        SingularGramError: it stayed indefinite at every damping up to 1, or is all zero.
    """
    _check_options(rounds, least_gain, damp)
    rows, cols = tile_of(layer.pattern)
    quadratic = damped_quadratic(layer, damp, "swaps")
    lanes, in_ = len(layer.weight) // rows, layer.weight.shape[1]
    keep = solution.keep.view(lanes, rows, in_ // cols, cols)[:, 0, :, 0].contiguous()  # (lanes, tiles)
    found = Search(quadratic, rows, cols, _groups(layer), rounds, least_gain).run(keep)
    own, before, after = (
        solution.weight,
        _weight(layer, quadratic, keep, found.before),
        _weight(layer, quadratic, found.keep, found.after),
    )
    losses = [_row_losses(layer, weight).view(lanes, rows).sum(dim=1) for weight in (own, before, after)]
    better = (losses[2] < torch.minimum(losses[0], losses[1])) & (found.keep != keep).any(dim=1)
    taken, solved = (choice.repeat_interleave(rows)[:, None] for choice in (better, losses[1] < losses[0]))
    start = torch.where(solved, before, own)
    weight = torch.where(taken, after, start)
    mask = torch.where(taken, _entries(layer, found.keep), solution.keep)
    loss, loss_before = layer.loss(weight), layer.loss(start)
    assert loss is not None
    assert loss_before is not None
    stats = {
        **solution.stats,
        "loss_before_swaps": loss_before,
        "loss_after_swaps": loss,
        "swaps": float(found.swaps[better].sum()),
        "swap_rounds": float(found.rounds),
        "swapped_lanes": float(better.sum()),
    }
    selected = layer.loss(own) if solution.loss_selected is None else solution.loss_selected
    notes = (*solution.notes, *quadratic.notes, *too_few_tokens(layer, "swaps"))
    return LayerSolution(weight, mask, selected, loss, stats, tuple(dict.fromkeys(notes)))


def _check_options(rounds: int, least_gain: float, damp: float) -> None:
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: must be at least 1")
    if not 0 <= least_gain < 1:
        raise ValueError(f"least_gain {least_gain}: must lie in [0, 1), a share of a row's loss")
    if not 0 < damp <= 1:
        raise ValueError(f"damp {damp}: must lie in (0, 1], a share of the Gram's mean diagonal")


def _groups(layer: LayerProblem) -> Tensor | None:
    """Return the N:M group of every column (in,) int64, None for other patterns."""
    if not isinstance(layer.pattern, NM):
        return None
    spans = layer.pattern.groups(layer.weight.shape[1], layer.run)
    widths = torch.tensor([stop - start for start, stop in spans], device=layer.weight.device)
    return torch.arange(len(spans), device=layer.weight.device).repeat_interleave(widths)


def _entries(layer: LayerProblem, keep: Tensor) -> Tensor:
    """Return the mask (out, in) of the tiles `keep` (lanes, tiles)."""
    rows, cols = tile_of(layer.pattern)
    return keep.repeat_interleave(cols, 1).repeat_interleave(rows, 0)


def _weight(layer: LayerProblem, quadratic: DampedQuadratic, keep: Tensor, scaled: Tensor) -> Tensor:
    """Return the weight (out, in) float32 of the scaled values (lanes, rows, in), zero off the tiles `keep`."""
    weight = scaled.view(layer.weight.shape) * quadratic.scale
    return weight.float().masked_fill(~_entries(layer, keep), 0.0)


def _row_losses(layer: LayerProblem, weight: Tensor) -> Tensor:
    """Return every row's share of the loss, up to a constant per row: (out,) float64."""
    assert layer.gram is not None
    matrix = layer.gram.matrix
    if layer.targets is None:
        delta = weight.to(matrix) - layer.weight.to(matrix)
        return ((delta @ matrix) * delta).sum(dim=1)
    new = weight.to(matrix)
    return ((new @ matrix - 2 * layer.weight.to(matrix) @ layer.targets.cross.t()) * new).sum(dim=1)
