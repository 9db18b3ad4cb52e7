"""OBC: row by row, the weight that costs least goes, and all that are left make up for it, one removal at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, DataError, PatternError
from sparsify_compiler.passes.prune.algebra import damped_cholesky
from sparsify_compiler.passes.prune.elimination import Quotas, Trace, eliminate
from sparsify_compiler.passes.prune.kept import solve_kept
from sparsify_compiler.pattern import NM, Block, Scope
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
            SingularGramError: it stayed indefinite at every damping up to 1, or is all zero.
            PatternError: a pattern that does not fit the weight.
        """
        quadratic = _quadratic(layer, self.damp)
        trace = _trace(layer, quadratic, _steps(layer, self.scope))
        return self._solution(layer, quadratic, trace)

    def trace(self, layer: LayerProblem) -> Trace:
        """Remove everything an N:M pattern allows, or all tiles, whatever `layer.sparsity`: every sparsity at once.

        A lane of the trace is a row, or the `rows` rows of a Block pattern's tiles; a tile one entry of it, or `cols`.
        Its increments are shares of the damped loss, per token. Raises as `prune` does.
        """
        return _trace(layer, _quadratic(layer, self.damp), _steps(layer, "layer"))

    def read(self, layer: LayerProblem, trace: Trace) -> LayerSolution:
        """Return what `prune` returns, from the `trace` of the same problem at any other sparsity."""
        return self._solution(layer, _quadratic(layer, self.damp), trace)

    def _solution(self, layer: LayerProblem, quadratic: "_Quadratic", trace: Trace) -> LayerSolution:
        out, in_ = layer.weight.shape
        rows, cols = _tile(layer)
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


@dataclass(frozen=True)
class _Shared:
    """What sites with the same input share, in units in which the damped Gram has a unit diagonal.

    `scale` (in,): a weight is `scale` times its value here. `matrix` and `inverse` (in, in) float64 are G + ridge and
    its inverse in these units; `ridge` is in the Gram's.
    """

    scale: Tensor
    matrix: Tensor
    inverse: Tensor
    ridge: float
    damp: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Quadratic:
    """‖ŵ − start‖² in the norm of `matrix`, per row, in the units of `_Shared`; `moment` = `start` · `matrix`."""

    matrix: Tensor
    inverse: Tensor
    scale: Tensor
    start: Tensor
    moment: Tensor
    damp: float
    dead: int
    notes: tuple[str, ...]


def _shared(gram: Tensor, damp: float) -> _Shared:
    lower, used, notes = damped_cholesky(gram, damp)
    ridge = used * float(gram.diagonal().mean())
    matrix = gram.clone()
    matrix.diagonal().add_(ridge)
    scale = matrix.diagonal().rsqrt()
    inverse = torch.cholesky_inverse(lower) / scale[:, None] / scale
    return _Shared(scale, matrix * scale[:, None] * scale, inverse, ridge, used, notes)


def _quadratic(layer: LayerProblem, damp: float) -> _Quadratic:
    out, in_ = layer.weight.shape
    if reason := layer.pattern.misfit(out, in_, layer.run):
        raise PatternError(f"layer {layer.name!r}: {reason}")
    gram = layer.gram
    if gram is None:
        raise DataError(
            f"layer {layer.name!r}: obc needs a Gram matrix, found none; give calibration data or choose magnitude"
        )
    try:
        shared = gram.cached(f"inverse at damp {damp!r}, unit diagonal", lambda: _shared(gram.matrix, damp))
    except CalibrationError as error:  # SingularGramError is one
        raise type(error)(f"layer {layer.name!r}: obc: {error}") from None
    dead = gram.matrix.diagonal() == 0
    dense = layer.weight.to(gram.matrix).masked_fill(dead, 0.0)
    if layer.targets is None:
        start = dense / shared.scale
        moment = start @ shared.matrix
    else:
        moment = (dense @ layer.targets.cross.t() + shared.ridge * dense) * shared.scale
        start = moment @ shared.inverse
    return _Quadratic(
        shared.matrix, shared.inverse, shared.scale, start, moment, shared.damp, int(dead.sum()), shared.notes
    )


def _tile(layer: LayerProblem) -> tuple[int, int]:
    return (layer.pattern.rows, layer.pattern.cols) if isinstance(layer.pattern, Block) else (1, 1)


def _steps(layer: LayerProblem, scope: Scope) -> int:
    """Return how many tiles a lane may lose: all of them where the lanes share one budget."""
    (out, in_), (_, cols) = layer.weight.shape, _tile(layer)
    if isinstance(layer.pattern, NM) or scope == "row":
        return layer.pattern.removed(out, in_, layer.sparsity, layer.run, "row") // (out * cols)
    return 0 if layer.sparsity == 0 else in_ // cols


def _trace(layer: LayerProblem, quadratic: _Quadratic, steps: int) -> Trace:
    (out, in_), (rows, cols) = layer.weight.shape, _tile(layer)
    quotas = None
    if isinstance(layer.pattern, NM):
        spans = layer.pattern.groups(in_, layer.run)
        widths = torch.tensor([stop - start for start, stop in spans], device=layer.weight.device)
        group = torch.arange(len(spans), device=layer.weight.device).repeat_interleave(widths)
        quotas = Quotas(group, (widths - layer.pattern.keep).clamp_min(0))
    return eliminate(quadratic.inverse, quadratic.start.view(out // rows, rows, in_), cols, steps, quotas)
