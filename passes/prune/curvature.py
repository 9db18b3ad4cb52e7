"""The curvature of smooth losses, one for all problems or one each: products, solves and projections.

Everything is float64, on the device of the tensors given, one row a problem: a weight is (problems, d), a value
(problems,). Problem i depends on row i alone, so that one call serves many problems (the rows of a layer, the runs of
an experiment).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.errors import SingularGramError
from sparsify_compiler.problem import Gram

LARGEST_DAMP = 1.0
"""The damping past which a curvature is given up: the ridge then equals its mean diagonal."""

FIRST_DAMP = 1e-8
"""What damping starts from where none was asked and the matrix is not positive definite."""

CPU_BYTES = 1 << 27
"""Bytes of a stack of matrices worked on at once, `work_bytes` on a GPU."""

C = TypeVar("C")


class Curvature(Protocol):
    """A symmetric positive definite H for every problem, possibly damped."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Every step in which damping was raised, in words."""
        ...

    @property
    def ridge(self) -> Tensor:
        """Return (problems or 1,): what was added to the diagonal, in the unit of H."""
        ...

    def product(self, vectors: Tensor) -> Tensor:
        """Return H v for `vectors` (problems, d)."""
        ...

    def solve(self, vectors: Tensor) -> Tensor:
        """Return H⁻¹ v for `vectors` (problems, d)."""
        ...

    def project(self, target: Tensor, keep: Tensor) -> Tensor:
        """Return argmin ‖θ − target‖_H over θ that is zero off `keep` (problems, d) bool: the optimal OBS update."""
        ...

    def largest(self) -> Tensor:
        """Return (problems or 1,) the largest eigenvalue of H."""
        ...

    def dense(self) -> Tensor:
        """Return H, (problems or 1, d, d); DataError where only products are known."""
        ...

    def damped(self, damp: float) -> "Curvature":
        """Return H + ridge I with ridge = `damp` · mean diagonal, positive definite or an error."""
        ...


@dataclass(frozen=True)
class DenseCurvature:
    """H given by its entries: `matrix` (problems or 1, d, d) float64, one for all where the first size is 1."""

    matrix: Tensor
    ridge: Tensor
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(matrix: Tensor) -> "DenseCurvature":
        """Wrap (d, d) or (problems, d, d), undamped."""
        stack = matrix.double() if matrix.dim() == 3 else matrix.double()[None]
        return DenseCurvature(stack, stack.new_zeros(len(stack)))

    @cached_property
    def _cholesky(self) -> tuple[Tensor, bool]:
        lower, failed = torch.linalg.cholesky_ex(self.matrix)
        return lower, not bool(failed.any())

    def is_definite(self) -> bool:
        """Say whether every H is positive definite; what this computes is kept for `factor`."""
        return self._cholesky[1]

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factors, like `matrix`.

        Raises:
            SingularGramError: an H is not positive definite.
        """
        if not self.is_definite():
            raise SingularGramError("the curvature is not positive definite; damp it")
        return self._cholesky[0]

    @cached_property
    def _largest(self) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(self.matrix)
        return values[:, -1]

    def product(self, vectors: Tensor) -> Tensor:
        """See `Curvature`."""
        if len(self.matrix) == 1:
            return vectors @ self.matrix[0]
        return torch.bmm(vectors[:, None, :], self.matrix)[:, 0]

    def solve(self, vectors: Tensor) -> Tensor:
        """See `Curvature`; two triangular solves with the Cholesky factor, which is kept."""
        if len(self.matrix) == 1:
            return torch.cholesky_solve(vectors.t(), self.factor[0]).t()
        # a stack of cholesky_solve takes eight times as long on a CPU, measured at (20, 784, 784)
        half = torch.linalg.solve_triangular(self.factor, vectors[:, :, None], upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return whole[:, :, 0]

    def project(self, target: Tensor, keep: Tensor) -> Tensor:
        """See `Curvature`; θ_Q = t_Q + H_QQ⁻¹ H_QS t_S by a Cholesky factor of each H_QQ (never of H⁻¹)."""
        which = torch.arange(len(target), device=target.device) if len(self.matrix) > 1 else None
        return project_rows(self.matrix, which, target, keep, self.product(target.masked_fill(keep, 0.0)))

    def largest(self) -> Tensor:
        """See `Curvature`."""
        return self._largest

    def dense(self) -> Tensor:
        """See `Curvature`."""
        return self.matrix

    @cached_property
    def _damped(self) -> dict[float, "DenseCurvature"]:
        return {}  # by damping: a quadratic asks for the same one in every step

    def damped(self, damp: float) -> "DenseCurvature":
        """See `Curvature`; damping rises tenfold for all problems, each step noted, while one of them is indefinite.

        Raises:
            SingularGramError: one is indefinite at every damping up to 1, or not finite.
        """
        if damp not in self._damped:
            self._damped[damp] = self._damp(damp)
        return self._damped[damp]

    def _damp(self, damp: float) -> "DenseCurvature":
        if not torch.isfinite(self.matrix).all():
            raise SingularGramError("the curvature has NaN or infinite entries; check the data and the weights")
        mean = self.matrix.diagonal(dim1=1, dim2=2).mean(dim=1)

        def at(used: float, notes: tuple[str, ...]) -> DenseCurvature | None:
            ridge = used * mean
            matrix = self.matrix + torch.diag_embed(ridge[:, None].expand(-1, self.matrix.shape[1]))
            raised = replace(self, matrix=matrix, ridge=ridge, notes=notes) if used else self
            return raised if raised.is_definite() else None

        return raise_damping(damp, at)


def raise_damping(damp: float, at: Callable[[float, tuple[str, ...]], C | None]) -> C:
    """Return the first curvature that `at`(damping, notes so far) finds definite, from `damp` tenfold and on to 1.

    Raises:
        SingularGramError: there is none.
    """
    notes: tuple[str, ...] = ()
    used = damp
    while used <= LARGEST_DAMP:
        if (found := at(used, notes)) is not None:
            return found
        higher = used * 10 or FIRST_DAMP
        notes += (f"the curvature is indefinite at damp {used:g}: raised to {higher:g}",)
        used = higher
    raise SingularGramError(
        f"the curvature is indefinite at every damping from {damp:g} to {LARGEST_DAMP:g}; "
        "give more data, or minimise from a point nearer to the solution"
    )


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factors of a stack of matrices.

    Raises:
        SingularGramError: one is not positive definite.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise SingularGramError("the curvature is not positive definite up to rounding; raise damp")
    return lower


def project_rows(matrix: Tensor, which: Tensor | None, target: Tensor, keep: Tensor, pull: Tensor) -> Tensor:
    """Return t_Q + H_QQ⁻¹ p_Q on the kept set Q of every row, zero elsewhere, with p = H t_S given as `pull`.

    `matrix` (stack, d, d); `which` (rows,) says whose H a row uses (None: the first for all). Rows are taken in chunks
    so that the H_QQ take at most `CPU_BYTES` (`work_bytes` on a GPU).
    """
    result = torch.zeros_like(target)
    width = int(keep.sum(dim=1).max()) if len(keep) else 0
    if width == 0:
        return result
    chunk = max(work_bytes(target.device, CPU_BYTES) // (8 * width**2), 1)
    identity = torch.eye(width, dtype=matrix.dtype, device=matrix.device)
    for first in range(0, len(target), chunk):
        rows = slice(first, first + chunk)
        kept, order = torch.sort(keep[rows].long(), dim=1, descending=True, stable=True)
        valid, columns = kept[:, :width] > 0, order[:, :width]  # (rows, width): Q first, padded
        owner = which[rows][:, None, None] if which is not None else torch.zeros_like(columns[:, :1, None])
        inner = matrix[owner, columns[:, :, None], columns[:, None, :]]
        inner = torch.where(valid[:, :, None] & valid[:, None, :], inner, identity)
        lower = cholesky(inner)
        right = pull[rows].gather(1, columns) * valid
        value = target[rows].gather(1, columns) + torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
        result[rows] = result[rows].scatter(1, columns, value * valid)
    return result


def damped_curvature(gram: Gram, damp: float, where: str) -> DenseCurvature:
    """Return M + λI, λ = `damp` · mean diagonal of M (raised tenfold and noted where indefinite), once for a shared M.

    Raises:
        SingularGramError: indefinite at every damping up to 1; the message begins with `where`.
    """
    try:
        return gram.cached(f"curvature at damp {damp!r}", lambda: DenseCurvature.of(gram.matrix).damped(damp))
    except SingularGramError as error:
        raise SingularGramError(f"{where}: {error}") from None
