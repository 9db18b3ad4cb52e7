"""ALPS: the mask and the weights drawn towards each other by ADMM, then a few conjugate-gradient steps on the mask."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune.admm import Descent, Schedule, Spectrum, descend, exponent, scaled_spectrum
from sparsify_compiler.passes.prune.algebra import MaskedLeastSquares, checked_gram, solve_masked_cg
from sparsify_compiler.pattern import Scope
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs


@dataclass(frozen=True)
class ALPS:
    """Meng, Behdin, Wang & Mazumder 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning", Alg. 1-2.

    Minimises ‖X Ŵᵀ − X_dense Wᵀ‖² / tokens + ridge ‖W − Ŵ‖² over weights that obey the pattern, with inputs scaled to
    a unit second moment. `damp` in (0, 1] is the ridge as a share of the Gram's mean diagonal, raised tenfold (and
    noted) where the matrix is indefinite.

    The penalty starts at `rho` (> 0, a share of the unit diagonal). After every `every` iterations it grows by `fast`,
    `medium` or `slow` (>= 1) where more than a tenth, more than 0.5 % or any of the kept entries moved (those that came
    and those that went both count), up to `largest_rho`; where less than that moved at the very first, it is divided by
    `cut` (> 1) and the iteration begins anew. It stops when nothing moved, when less than the share `settled` moved
    after `settle_after` iterations, or after `most_iterations`. `polish` iterations of conjugate gradients on the
    damped problem end it.
    `scope` "row" removes the same count from every row of an unstructured or block pattern.

    Departures: of the projected iterates at which the penalty is reconsidered the one of least loss is taken. On large
    correlated problems that is the last, as in the paper; in small ones, or with inputs that hardly mix, the last can
    be worse than magnitude's. Counts are exact, ties keep the lowest index, N:M groups never cross a run; dense targets
    are read where given; inputs that never fired lose their weights first; tiles of a Block pattern, which the paper
    does not treat, are projected by their sum of squares in the scaled weights. One float64 eigendecomposition serves
    every penalty and every site that shares the Gram matrix; the iteration is float32, in units of the largest weight.
    """

    damp: float = 0.01
    rho: float = 0.1
    every: int = 3
    fast: float = 1.3
    medium: float = 1.2
    slow: float = 1.1
    cut: float = 5.0
    largest_rho: float = 1e6
    settled: float = 3e-4
    settle_after: int = 30
    most_iterations: int = 300
    polish: int = 10
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie in (0, 1], a share of the Gram's mean diagonal")
        if not 0 < self.rho <= self.largest_rho:
            raise ValueError(f"rho {self.rho}: must lie in (0, largest_rho = {self.largest_rho}]")
        if not 1 <= self.slow <= self.medium <= self.fast or not self.cut > 1:
            raise ValueError(
                f"slow {self.slow}, medium {self.medium}, fast {self.fast}, cut {self.cut}: "
                "must have 1 <= slow <= medium <= fast and cut > 1"
            )
        if self.every < 1 or self.most_iterations < 1 or self.settle_after < 0 or self.polish < 0 or self.settled < 0:
            raise ValueError(
                f"every {self.every}, most_iterations {self.most_iterations}: must be at least 1; "
                f"settle_after {self.settle_after}, settled {self.settled}, polish {self.polish}: at least 0"
            )
        if self.scope not in ("layer", "row"):
            raise ValueError(f"scope {self.scope!r}: must be layer or row")

    @property
    def name(self) -> str:
        """The word in recipes."""
        return "alps"

    @property
    def needs(self) -> Needs:
        """The Gram matrix."""
        return Needs.GRAM

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Select by ADMM and polish; where nothing is to go, return the weight as it is, without `stats`.

        `stats` hold "damp", "dead_inputs", "admm_iterations" and the last "rho".

        Raises:
            DataError: the problem carries no Gram matrix.
            CalibrationError: the Gram matrix is not finite.
            SingularGramError: it stayed indefinite at every damping up to 1, or is all zero.
            PatternError: a pattern that does not fit the weight.
        """
        gram = checked_gram(layer, self.name)
        out, in_ = layer.weight.shape
        spectrum = self._spectrum(layer.name, gram)
        if not layer.pattern.removed(out, in_, layer.sparsity, layer.run, self.scope):
            loss = layer.loss(layer.weight)
            keep = torch.ones_like(layer.weight, dtype=torch.bool)
            return LayerSolution(layer.weight.float().clone(), keep, loss, loss, notes=spectrum.notes)
        moment = _moment(layer, gram, spectrum)
        descent = self._descend(layer, spectrum, moment)
        weight = self._polish(gram, spectrum, moment, descent)
        loss = layer.loss(weight)
        stats = {
            "damp": spectrum.damp,
            "dead_inputs": float((spectrum.scale == 0).sum()),
            "admm_iterations": float(descent.iterations),
            "rho": descent.rho,
        }
        notes = spectrum.notes
        if not descent.settled:
            notes = (*notes, f"alps: the mask still changed after {descent.iterations} iterations")
        return LayerSolution(weight, descent.keep, loss, loss, stats, notes)

    def _spectrum(self, name: str, gram: Gram) -> Spectrum:
        try:
            return gram.cached(
                f"scaled spectrum at damp {self.damp!r}", lambda: scaled_spectrum(gram.matrix, self.damp)
            )
        except CalibrationError as error:  # SingularGramError is one
            raise type(error)(f"layer {name!r}: alps: {error}") from None

    def _select(self, layer: LayerProblem, scores: Tensor) -> Tensor:
        return layer.pattern.select(scores, layer.sparsity, layer.run, self.scope)

    def _descend(self, layer: LayerProblem, spectrum: Spectrum, moment: Tensor) -> Descent:
        """Run ADMM in scaled coordinates and units of the largest entry, so that no float32 square underflows."""
        start = layer.weight.to(spectrum.scale) * spectrum.scale  # (out, in)
        unit, inverse = exponent(start), spectrum.inverse_scale()
        schedule = Schedule(**{field.name: getattr(self, field.name) for field in fields(Schedule)})
        descent = descend(
            start / unit,
            moment * (inverse / unit),
            spectrum,
            lambda scores: self._select(layer, scores),
            schedule,
        )
        return replace(descent, weight=(descent.weight * (inverse * unit)).float())

    def _polish(self, gram: Gram, spectrum: Spectrum, moment: Tensor, descent: Descent) -> Tensor:
        """Return the weight (out, in) float32 after conjugate gradients from the descent's on its mask."""
        if not self.polish:
            return descent.weight
        damped = gram.matrix.clone()
        damped.diagonal().add_(spectrum.ridge)
        # Kept weights of inputs that never fired stay zero.
        free = MaskedLeastSquares(damped, moment, descent.keep & (spectrum.scale > 0), descent.weight)
        return solve_masked_cg(free, most_iterations=self.polish).weight.float()


def _moment(layer: LayerProblem, gram: Gram, spectrum: Spectrum) -> Tensor:
    """Return W Cᵀ + ridge W (out, in) float64: the right-hand side of the damped problem."""
    cross = gram.matrix if layer.targets is None else layer.targets.cross
    weight = layer.weight.to(cross)
    return weight @ cross.t() + spectrum.ridge * weight
