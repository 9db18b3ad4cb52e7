"""OBC: row by row, the weight that costs least goes, and all that are left make up for it, one removal at a time."""

from dataclasses import dataclass

import torch

from sparsify_compiler.errors import SingularGramError
from sparsify_compiler.passes.prune.elimination import Quotas, Trace, eliminate
from sparsify_compiler.passes.prune.kept import solve_kept
from sparsify_compiler.passes.prune.quadratic import DampedQuadratic, damped_quadratic, tile_of
from sparsify_compiler.pattern import NM, Scope
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs


@dataclass(frozen=True)
class OBC:
    """Frantar & Alistarh 2022, "Optimal Brain Compression", ExactOBS (Alg. 1 and 2), batched over rows.

    `damp` in (0, 1] is the ridge as a share of the Gram's mean diagonal, raised tenfold (and noted) where the
    factorisation fails; it holds the weights to the dense ones. `scope` "layer" shares the budget out by what each
    removal costs (the paper's global step 2), "row" removes the same count from every row; N:M implies its own counts.

    A layer costs out · in³ operations, whatever the sparsity. Tiles of a Block pattern are scored by
    Σ w_T ([H⁻¹]_TT)⁻¹ w_Tᵀ over their rows, which lose the same inputs and so share one inverse. With dense targets
    (`Targets`) the greedy removal starts at the minimiser of the true quadratic, (G + ridge)⁻¹ (C w + ridge · w), not
    at the dense weight (the Newton point of I-OBS; equal to it without targets).

    Departures from the authors' code: damping (theirs has none), an input that never fired loses its weight first,
    running maxima in place of a heap (the same choice), and the weights returned are solved on the final set instead
    of being carried along, which is the same up to rounding.
    """

    damp: float = 0.01
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie in (0, 1], a share of the Gram's mean diagonal")
        if self.scope not in ("layer", "row"):
            raise ValueError(f"scope {self.scope!r}: must be 'layer' or 'row'")

    @property
    def name(self) -> str:
        """The word in recipes."""
        return "obc"

    @property
    def needs(self) -> Needs:
        """The Gram matrix."""
        return Needs.GRAM

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Select and compensate, in float64 but for the inverse of wide layers (see `eliminate`).

        Raises:
            DataError: the problem carries no Gram matrix.
            CalibrationError: the Gram matrix is not finite.
            SingularGramError: it stayed indefinite at every damping up to 1, or is all zero; or `damp` is so small that
                rounding makes the inverse of a tile indefinite.
            PatternError: a pattern that does not fit the weight.
        """
        quadratic = damped_quadratic(layer, self.damp, self.name)
        trace = _trace(layer, quadratic, _steps(layer, self.scope))
        return self._solution(layer, quadratic, trace)

    def trace(self, layer: LayerProblem) -> Trace:
        """Remove everything an N:M pattern allows, or all tiles, whatever `layer.sparsity`: every sparsity at once.

        A lane of the trace is a row, or the `rows` rows of a Block pattern's tiles; a tile one entry of it, or `cols`.
        Its increments are shares of the damped loss, per token. Raises as `prune` does.
        """
        return _trace(layer, damped_quadratic(layer, self.damp, self.name), _steps(layer, "layer"))

    def read(self, layer: LayerProblem, trace: Trace) -> LayerSolution:
        """Return what `prune` returns, from the `trace` of the same problem at any other sparsity."""
        return self._solution(layer, damped_quadratic(layer, self.damp, self.name), trace)

    def _solution(self, layer: LayerProblem, quadratic: DampedQuadratic, trace: Trace) -> LayerSolution:
        out, in_ = layer.weight.shape
        rows, cols = tile_of(layer.pattern)
        total = layer.pattern.removed(out, in_, layer.sparsity, layer.run, self.scope) // (rows * cols)
        if self.scope == "row" or isinstance(layer.pattern, NM):
            counts = torch.full((out // rows,), total // (out // rows), device=layer.weight.device)
        else:
            counts = trace.counts(total)
        kept = trace.keep(counts).repeat_interleave(cols, 1)  # (lanes, in)
        moment = quadratic.moment.view(out // rows, rows, in_)
        solved = solve_kept(quadratic.matrix, moment, kept).view(out, in_) * quadratic.scale
        weight = solved.float().contiguous()
        loss = layer.loss(weight)
        stats = {"damp": quadratic.damp, "dead_inputs": float(quadratic.dead)}
        return LayerSolution(weight, kept.repeat_interleave(rows, 0), loss, loss, stats, quadratic.notes)


def _steps(layer: LayerProblem, scope: Scope) -> int:
    """Return how many tiles a lane may lose: all of them where the lanes share one budget."""
    (out, in_), (_, cols) = layer.weight.shape, tile_of(layer.pattern)
    if isinstance(layer.pattern, NM) or scope == "row":
        return layer.pattern.removed(out, in_, layer.sparsity, layer.run, "row") // (out * cols)
    return 0 if layer.sparsity == 0 else in_ // cols


def _trace(layer: LayerProblem, quadratic: DampedQuadratic, steps: int) -> Trace:
    (out, in_), (rows, cols) = layer.weight.shape, tile_of(layer.pattern)
    quotas = None
    if isinstance(layer.pattern, NM):
        spans = layer.pattern.groups(in_, layer.run)
        widths = torch.tensor([stop - start for start, stop in spans], device=layer.weight.device)
        group = torch.arange(len(spans), device=layer.weight.device).repeat_interleave(widths)
        quotas = Quotas(group, (widths - layer.pattern.keep).clamp_min(0))
    try:
        return eliminate(quadratic.inverse, quadratic.start.view(out // rows, rows, in_), cols, steps, quotas)
    except SingularGramError as error:
        raise SingularGramError(f"layer {layer.name!r}: obc: {error}") from None
