"""The linear algebra of layer-wise pruning: damped factors, and least squares on a given keep mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.errors import CalibrationError, DataError, PatternError, SingularGramError
from sparsify_compiler.passes.prune.kept import kept_lanes
from sparsify_compiler.problem import Gram, LayerProblem

LARGEST_DAMP = 1.0
"""The damping past which a factorisation is given up: the ridge then equals the mean diagonal."""

OTHER_METHOD = "choose wanda or magnitude"

FIRST_RIDGE, LARGEST_RIDGE = 1e-8, 1e-2
"""Ridge of the exact solve, as a share of the unit diagonal: raised a hundredfold where a factorisation fails."""

REFRESH = 15
"""Iterations after which float64 recomputes the gradient: more, and float32 forgets the directions it came from."""


@dataclass(frozen=True)
class InverseFactor:
    """`upper` U (in, in) float32 with Uᵀ U = (G + ridge I)⁻¹, ridge = `damp` · mean diagonal of G.

    `dead` (in,) bool marks inputs that were always zero.
    """

    upper: Tensor
    dead: Tensor
    damp: float
    notes: tuple[str, ...] = ()


def inverse_factor(gram: Tensor, damp: float) -> InverseFactor:
    """Factorise the inverse of the damped `gram` (in, in) float64, one Cholesky and one triangular inverse.

    With J the order reversed, J (G + ridge I) J = L Lᵀ gives U = J L⁻¹ J. `damp` rises tenfold, each step noted, while
    the matrix is indefinite.

    Raises:
        CalibrationError: `gram` has entries that are not finite.
        SingularGramError: it is all zero, or indefinite at every damping up to 1.
    """
    lower, used, notes = damped_cholesky(gram.flip(0, 1), damp)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return InverseFactor(inverse.flip(0, 1).float().contiguous(), gram.diagonal() == 0, used, notes)


def damped_cholesky(gram: Tensor, damp: float, instead: str = OTHER_METHOD) -> tuple[Tensor, float, tuple[str, ...]]:
    """Return lower L (in, in) float64 with L Lᵀ = `gram` + damp · mean diagonal · I, the damping used, and notes.

    The damping rises tenfold, each step noted, while the matrix is indefinite; `instead` is what an error offers.

    Raises:
        CalibrationError: `gram` has entries that are not finite.
        SingularGramError: it is all zero, or indefinite at every damping up to 1.
    """
    require_finite(gram)
    mean, least = torch.stack((gram.diagonal().mean(), gram.diagonal().amin())).tolist()
    if least < 0:
        raise SingularGramError(
            f"the Gram matrix has {least:g} on its diagonal, and a mean of squares cannot be negative; "
            "gather the statistics anew"
        )
    if mean == 0:
        raise SingularGramError(
            "the Gram matrix is all zero: no calibration input reached this layer; "
            "give data that does, or keep the layer dense"
        )
    notes: list[str] = []
    used = damp
    while used <= LARGEST_DAMP:
        damped = gram.clone(memory_format=torch.contiguous_format)
        damped.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return lower, used, tuple(notes)
        notes.append(f"the Gram matrix is indefinite at damp {used:g}: raised to {used * 10:g}")
        used *= 10
    raise SingularGramError(
        f"the Gram matrix is indefinite at every damping from {damp:g} to {used / 10:g}; "
        f"give more calibration tokens, or {instead} for this layer"
    )


def require_finite(gram: Tensor) -> None:
    """Raise CalibrationError unless every entry of `gram` is finite."""
    if not torch.isfinite(gram).all():
        raise CalibrationError(
            "the Gram matrix has NaN or infinite entries; check the calibration data and the activations on it"
        )


@dataclass(frozen=True)
class MaskedLeastSquares:
    """For every row: minimise ŵᵀGŵ − 2 ŵᵀb over ŵ that is zero off `keep`, where G is (in, in), b a row of `moment`.

    `moment` (out, in) float64 is W Cᵀ, C = XᵀX_dense / tokens (C = G without dense targets), so that the optimum
    solves (G ŵ)_Q = b_Q on the kept columns Q. `start` (out, in) is zero off `keep`. Solvers move only entries
    that `keep` marks and whose input fired; where the optimum is not unique they stay near `start`.
    """

    gram: Tensor
    moment: Tensor
    keep: Tensor
    start: Tensor

    def scale(self) -> Tensor:
        """Return (in,) factors s for which diag(s) G diag(s) has a unit diagonal; 0 for inputs that never fired."""
        diagonal = self.gram.diagonal()
        return torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).rsqrt(), 0.0)

    def rows(self, rows: slice | Tensor) -> "MaskedLeastSquares":
        """Return the problem of some rows."""
        return MaskedLeastSquares(self.gram, self.moment[rows], self.keep[rows], self.start[rows])

    def gradient(self, weight: Tensor) -> Tensor:
        """Return b − Gŵ on the kept entries, 0 elsewhere: minus half the gradient at `weight` (out, in) float64."""
        return (self.moment - weight @ self.gram).mul_(self.keep)


@dataclass(frozen=True)
class MaskedSolution:
    """`weight` (out, in) float64, zero off the mask; `relative_gradient` (out,): ‖s(b − Gŵ)_Q‖ / ‖s b_Q‖ per row.

    `last_gain` (out,) is the share of a row's whole gain that its last `REFRESH` iterations brought: what is left to
    gain is of that order (0 after an exact solve). `iterations` is the most any row took; `ridge` the largest that an
    exact solve needed (0: none).
    """

    weight: Tensor
    relative_gradient: Tensor
    last_gain: Tensor
    iterations: int = 0
    ridge: float = 0.0


def solve_masked_cg(
    problem: MaskedLeastSquares, tolerance: float = 1e-6, most_iterations: int = 150, settled: float = 0.0
) -> MaskedSolution:
    """Solve by conjugate gradients on the mask, all rows at once with a step size each, Jacobi preconditioned.

    A row is done at a relative gradient of `tolerance`, or when `REFRESH` iterations brought no more than the share
    `settled` of what it gained so far: on a Gram without full rank the gradient never gets small in every direction.

    Products run in float32; every 15 iterations float64 recomputes the gradient, and the search directions carry on
    from it, so that the `relative_gradient` returned is a float64 one. Rows that need more than `most_iterations`
    come back short of `tolerance`. On a GPU the end is looked for every `ask_every` iterations.
    """
    scale = problem.scale()
    scaled = (problem.gram * scale[:, None] * scale).float()
    chunk = chunk_rows(problem.keep.shape[1], problem.keep.device)
    parts = [
        _descend(problem.rows(slice(first, first + chunk)), scale, scaled, tolerance, most_iterations, settled)
        for first in range(0, len(problem.keep), chunk)
    ]
    return MaskedSolution(
        torch.cat([part.weight for part in parts]),
        torch.cat([part.relative_gradient for part in parts]),
        torch.cat([part.last_gain for part in parts]),
        max(part.iterations for part in parts),
    )


def _descend(
    problem: MaskedLeastSquares,
    scale: Tensor,
    scaled: Tensor,
    tolerance: float,
    most_iterations: int,
    settled: float,
) -> MaskedSolution:
    tiny, smallest = torch.finfo(torch.float64).tiny, torch.finfo(torch.float32).tiny
    weight, keep = problem.start.double(), problem.keep.float()
    target = _norm(problem.moment * problem.keep * scale).clamp_min(tiny)
    gradient = problem.gradient(weight) * scale
    # float32 sees every row's gradient in units of its first length, so that nothing underflows.
    unit = _norm(gradient).clamp_min(tiny)[:, None]
    goal = (tolerance * target / unit[:, 0]).clamp_max(1.0).square().float()
    remainder = (gradient / unit).float()
    direction, step, product = remainder.clone(), torch.zeros_like(remainder), torch.empty_like(remainder)
    squared = _dot(remainder, remainder)
    iteration, every = 0, ask_every(weight.device)
    total, recent = torch.zeros_like(squared), torch.zeros_like(squared)
    last = torch.ones_like(squared)
    while iteration < most_iterations and (iteration % every or bool(((squared > goal) & (last > settled)).any())):
        iteration += 1
        torch.mm(direction, scaled, out=product).mul_(keep)
        curvature = _dot(direction, product)
        # Rounding can leave no curvature in a direction without data: that row stands still and is told by its size.
        length = torch.where(curvature > 0, squared / curvature, 0.0)[:, None]
        step.addcmul_(length, direction)
        recent.addcmul_(length[:, 0], squared)  # the loss falls by αₖ‖rₖ‖²
        remainder.addcmul_(length, product, value=-1)
        previous, squared = squared, _dot(remainder, remainder)
        turn = torch.where(previous > 0, squared / previous, 0.0)
        reached = iteration % every == 0 and bool((squared <= goal).all())
        if reached or iteration % REFRESH == 0 or iteration == most_iterations:
            weight += step.double() * unit * scale
            step.zero_()
            total += recent
            last = torch.where(curvature > 0, recent / total.clamp_min(smallest), 1.0)  # standing still is no end
            recent.zero_()
            gradient = problem.gradient(weight) * scale
            remainder = (gradient / unit).float()
            believed, squared = squared, _dot(remainder, remainder)
            # A gradient well above the one believed means directions made of rounding: such a row starts afresh.
            turn = torch.where(squared <= 4 * believed, squared / previous.clamp_min(smallest), 0.0)
        torch.addcmul(remainder, turn[:, None], direction, out=direction)
    return MaskedSolution(weight, _norm(gradient) / target, last.double(), iteration)


def solve_masked_exactly(problem: MaskedLeastSquares, ridge: float = FIRST_RIDGE, steps: int = 3) -> MaskedSolution:
    """Solve with a float64 Cholesky factor a row of G on the kept columns, scaled to a unit diagonal.

    `ridge`, a share of the diagonal, holds the row to `start` in directions of less curvature than that; each of
    `steps` with the same factor shrinks its effect once more. For rows whose factorisation fails it is a hundred times
    more, and one step is all they get: in a direction of negative curvature another one leads further out.

    Raises:
        SingularGramError: G is indefinite on some row's kept columns at every ridge up to `LARGEST_RIDGE`.
    """
    scale = problem.scale()
    scaled = problem.gram * scale[:, None] * scale
    moment = problem.moment * scale
    # Columns that never fired keep `start`; Gᵢⱼ = 0 there, so they do not enter the other columns' equations.
    keep = problem.keep & (scale > 0)
    fired = torch.where(scale > 0, scale, 1.0)
    value = problem.start.double() / fired
    left, used = torch.arange(len(keep), device=keep.device), ridge
    while True:
        damped = scaled.clone()
        damped.diagonal().add_(used)
        failed = [torch.empty(0, dtype=torch.int64, device=keep.device)]
        for part in kept_lanes(damped, keep[left]):
            rows = left[part.lanes]
            for _ in range(steps if used == ridge else 1):
                residual = (moment[rows] - value[rows] @ scaled).gather(1, part.columns) * part.valid
                change = torch.cholesky_solve(residual[:, :, None], part.lower)[:, :, 0]
                change = torch.where(part.valid & ~part.failed[:, None], change, 0.0)
                value[rows] = value[rows].scatter_add(1, part.columns, change)
            failed.append(rows[part.failed])
        left = torch.cat(failed).sort().values
        if not len(left):
            break
        if used >= LARGEST_RIDGE:
            raise SingularGramError(
                f"the Gram matrix on the kept columns is indefinite at every ridge up to {used:g} of its diagonal; "
                "give more calibration tokens, or set refit = false for this layer"
            )
        used *= 100
    weight = value * fired
    target = _norm(moment * problem.keep).clamp_min(torch.finfo(torch.float64).tiny)
    size = _norm(problem.gradient(weight) * scale) / target
    return MaskedSolution(weight, size, torch.zeros_like(size), ridge=used)


def ask_every(device: torch.device) -> int:
    """Return after how many iterations to ask whether all rows are done: a GPU would stand still for the answer.

    A row that goes on past its end takes steps of next to nothing, so that a GPU's answer is no worse.
    """
    return REFRESH if device.type == "cuda" else 1


def chunk_rows(in_: int, device: torch.device) -> int:
    """Return how many rows to work on at once: five float32 buffers stay near a CPU's caches, and memory is bounded."""
    return max(work_bytes(device, 1 << 25) // (64 * in_), 64)  # 64 bytes a weight: the five, and some in float64


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left[:, None, :], right[:, :, None])[:, 0, 0]


def _norm(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1).sqrt()


def checked_gram(layer: LayerProblem, method: str) -> Gram:
    """Return the Gram matrix that `method` needs, for a weight that its pattern fits.

    Raises:
        PatternError: the pattern does not fit the weight.
        DataError: the problem carries no Gram matrix.
    """
    out, in_ = layer.weight.shape
    if reason := layer.pattern.misfit(out, in_, layer.run):
        raise PatternError(f"layer {layer.name!r}: {reason}")
    if layer.gram is None:
        raise DataError(
            f"layer {layer.name!r}: {method} needs a Gram matrix, found none; give calibration data or choose magnitude"
        )
    return layer.gram
