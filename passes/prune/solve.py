"""Prune one layer problem from end to end: check, select, re-solve, check."""

import torch

from sparsify_compiler.errors import ModelError, PatternError
from sparsify_compiler.passes.prune.refit import refit as refit_kept
from sparsify_compiler.passes.prune.swaps import refine
from sparsify_compiler.pattern import Scope
from sparsify_compiler.problem import LayerProblem, LayerSolution, Pruner


def prune_with(problem: LayerProblem, method: Pruner, refit: bool = True, swaps: int = 0) -> LayerSolution:
    """Return what `method` makes of `problem`, re-solved on its mask where `refit` and a Gram matrix is at hand.

    With `swaps`, as many rounds of 1-swap search refine the mask, and re-solve it in any case: see `refine`.
    The weight is float32 and exactly zero off `keep`, which obeys the pattern with its exact count; both losses are
    filled where there is a Gram matrix. The problem is not modified.

    Raises:
        ModelError: the weight has entries that are not finite.
        PatternError: the pattern does not fit the weight.
        DataError, CalibrationError, SingularGramError: as the method, the swaps and the re-solve say.
    """
    out, in_ = problem.weight.shape
    if not torch.isfinite(problem.weight).all():
        raise ModelError(f"layer {problem.name!r}: the weight ({out}, {in_}) has NaN or infinite entries; repair it")
    if reason := problem.pattern.misfit(out, in_, problem.run):
        raise PatternError(f"layer {problem.name!r}: {reason}")
    solution = method.prune(problem)
    if solution.loss is None and problem.gram is not None:
        loss = problem.loss(solution.weight)
        solution = LayerSolution(solution.weight, solution.keep, loss, loss, solution.stats, solution.notes)
    if swaps:
        solution = refine(problem, solution, swaps)
    elif refit:
        solution = refit_kept(problem, solution)
    _check(problem, method, solution)
    return solution


def _check(problem: LayerProblem, method: Pruner, solution: LayerSolution) -> None:
    """Assert what every method promises; a failure is our own bug."""
    out, in_ = problem.weight.shape
    by_row = in_ - solution.keep.sum(dim=1)
    removed = int(by_row.sum())
    scopes: tuple[Scope, ...] = (method.scope,) if hasattr(method, "scope") else ("layer", "row")
    counts = {problem.pattern.removed(out, in_, problem.sparsity, problem.run, scope) for scope in scopes}
    by_layer = problem.pattern.removed(out, in_, problem.sparsity, problem.run) if "layer" in scopes else None
    where = f"layer {problem.name!r}, {method.name}, {problem.pattern}"
    assert removed in counts, f"{where}: removed {removed} entries, {sorted(counts)} were asked"
    assert removed == by_layer or bool((by_row == by_row[:1]).all()), f"{where}: rows lost different counts"
    assert solution.weight.dtype == torch.float32, f"{where}: weight is {solution.weight.dtype}"
    assert not solution.weight[~solution.keep].any(), f"{where}: a removed weight is not zero"
    assert torch.isfinite(solution.weight).all(), f"{where}: a weight is not finite"
