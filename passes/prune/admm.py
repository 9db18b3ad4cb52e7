"""ADMM over a sparsity pattern: least squares with one penalty schedule, one eigendecomposition for every penalty."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.algebra import damped_cholesky

Select = Callable[[Tensor], Tensor]
"""Scores (out, in) float32 -> keep (out, in) bool."""

LEAST_PENALTY = 1e-6
"""Below this share of the unit diagonal a smaller penalty changes no support: the search for a first one ends."""


@dataclass(frozen=True)
class Spectrum:
    """The matrix H = S⁻¹ (G + ridge I) S⁻¹, which has a unit diagonal, and its eigenvalues and eigenvectors.

    `matrix` (in, in) float32; `values` (in,), `vectors` (in, in) by columns and `scale` (in,) are float64. `scale` is
    the diagonal of S: the square root of the damped diagonal, 0 for inputs that were always zero, whose row and column
    are the identity's. `damp` is the share that was needed, `ridge` = damp · mean diagonal of G.
    """

    matrix: Tensor
    values: Tensor
    vectors: Tensor
    scale: Tensor
    damp: float
    ridge: float
    notes: tuple[str, ...] = ()

    def inverse_scale(self) -> Tensor:
        """Return the diagonal of S⁻¹ (in,) float64, 0 for inputs that were always zero."""
        return _inverse_or_zero(self.scale)

    def inverse(self, penalty: float) -> Tensor:
        """Return (H + penalty I)⁻¹ (in, in) float32, multiplied out in float64."""
        return ((self.vectors / (self.values + penalty)) @ self.vectors.t()).float()


def scaled_spectrum(gram: Tensor, damp: float) -> Spectrum:
    """Decompose the damped `gram` (in, in) float64, scaled to a unit diagonal.

    `damp` rises tenfold, each step noted, while the damped matrix is indefinite.

    Raises:
        CalibrationError: `gram` has entries that are not finite.
        SingularGramError: it is all zero, or indefinite at every damping up to 1.
    """
    _, used, notes = damped_cholesky(gram, damp)  # tells an indefinite matrix at a tenth of the decomposition's cost
    diagonal = gram.diagonal()
    ridge = used * float(diagonal.mean())
    scale = torch.where(diagonal == 0, 0.0, (diagonal + ridge).sqrt())
    inverse = _inverse_or_zero(scale)
    matrix = gram * inverse[:, None] * inverse
    matrix.diagonal().fill_(1.0)
    values, vectors = torch.linalg.eigh(matrix)
    least = len(matrix) * torch.finfo(values.dtype).eps  # below it rounding decides the sign
    return Spectrum(matrix.float(), values.clamp_min(least), vectors, scale, used, ridge, notes)


def _inverse_or_zero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


@dataclass(frozen=True)
class Schedule:
    """The penalty ρ and when to stop, as `ALPS` documents its fields of the same names."""

    rho: float
    every: int
    fast: float
    medium: float
    slow: float
    cut: float
    largest_rho: float
    settled: float
    settle_after: int
    most_iterations: int

    def turn(self, rho: float, iteration: int, change: float, started: bool) -> tuple[float, bool, bool]:
        """Return (factor for ρ, started, settled) after the share `change` of the kept entries moved.

        Where next to nothing moves before anything did, ρ holds the support: it is cut, and the descent begins anew.
        """
        started = started or change > 0.005
        if change > 0.1:
            factor = self.fast
        elif change > 0.005:
            factor = self.medium
        else:
            factor = self.slow if started else 1 / self.cut
        still = change == 0 and (started or rho * factor < LEAST_PENALTY)
        settled = still or (iteration > self.settle_after and change < self.settled)
        return min(rho * factor, self.largest_rho) / rho, started, settled


@dataclass(frozen=True)
class Descent:
    """`weight` (out, in) float32, zero off `keep` (out, in) bool, in scaled coordinates."""

    weight: Tensor
    keep: Tensor
    iterations: int
    rho: float
    settled: bool


@dataclass(frozen=True)
class _Candidate:
    weight: Tensor
    keep: Tensor
    loss: float


@dataclass(frozen=True)
class _Judge:
    """Projects a dense iterate and tells its loss, counted from the dense `start`; all float32."""

    start: Tensor
    slope: Tensor
    matrix: Tensor
    select: Select

    def project(self, dense: Tensor) -> _Candidate:
        keep = self.select(dense.square())
        weight = dense * keep
        change = weight - self.start
        # A difference to the start, so that nothing cancels; products in float32, their sum in float64.
        loss = change.mul_((change @ self.matrix).add_(self.slope)).sum(dtype=torch.float64)
        return _Candidate(weight, keep, float(loss))


def descend(start: Tensor, moment: Tensor, spectrum: Spectrum, select: Select, schedule: Schedule) -> Descent:
    """Minimise tr(B H Bᵀ) − 2 tr(B Mᵀ) over B that obey a pattern, by ADMM (Meng et al. 2024, "ALPS", Alg. 1).

    `start` and M = `moment` are (out, in) float64 in scaled coordinates, `select` projects onto the pattern by scores.

        B = (M − V + ρD)(H + ρI)⁻¹;  D = P(B + V/ρ);  V ← V + ρ(B − D)

    What is returned is the projected B of least loss among those at which ρ is reconsidered: the last of a large
    problem, but the supports of a small one come and go. Seven buffers of (out, in) float32 and three masks.
    """
    slope = (2 * (start @ spectrum.matrix.double() - moment)).float()
    start, moment = start.float(), moment.float()
    rho, started, settled = schedule.rho, False, False
    inverse = spectrum.inverse(rho)
    judge = _Judge(start, slope, spectrum.matrix, select)
    least = first = judge.project(start)
    before, entries = first.keep, max(int(first.keep.sum()), 1)
    aim, dual = first.weight.clone(), torch.zeros_like(start)  # D and V/ρ
    weight = torch.empty_like(start)
    iteration = 0
    while iteration < schedule.most_iterations:
        iteration += 1
        torch.mm(aim.sub_(dual).mul_(rho).add_(moment), inverse, out=weight)
        total = torch.add(weight, dual, out=aim)  # Z = B + V/ρ: D is Z on its mask, the next V/ρ is Z off it
        keep = select(total.square())
        torch.mul(total, ~keep, out=dual)
        total.mul_(keep)
        if iteration % schedule.every and iteration < schedule.most_iterations:
            continue
        least = min(least, judge.project(weight), key=lambda candidate: candidate.loss)
        change = int((keep ^ before).sum()) / entries
        before = keep
        factor, started, settled = schedule.turn(rho, iteration, change, started)
        if settled:
            break
        if factor < 1 and change > 0:
            aim.copy_(first.weight)
            dual.zero_()
        rho *= factor
        dual.div_(factor)
        inverse = spectrum.inverse(rho)
    return Descent(least.weight, least.keep, iteration, rho, settled)


def exponent(tensor: Tensor) -> float:
    """Return the power of two next above the largest size in `tensor`, 1 for zeros: dividing by it rounds nothing."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
