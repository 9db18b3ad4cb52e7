"""The curvature of smooth losses, a matrix or its products a problem: products, solves and projections.

Everything is float64, on the device of the tensors given, one row a problem: a weight is (problems, d), a value
(problems,). Problem i depends on row i alone, so that one call serves many problems (the rows of a layer, the runs of
an experiment).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.errors import DataError, SingularGramError
from sparsify_compiler.problem import Gram

LARGEST_DAMP = 1.0
"""The damping past which a curvature is given up: the ridge then equals its mean diagonal."""

FIRST_DAMP = 1e-8
"""What damping starts from where none was asked and the matrix is not positive definite."""

CPU_BYTES = 1 << 27
"""Bytes of a stack of matrices worked on at once, `work_bytes` on a GPU."""

PROBES = 16
"""Random vectors that estimate the mean diagonal of a curvature known by its products."""


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
        notes: list[str] = []
        used = damp
        while used <= LARGEST_DAMP:
            ridge = used * mean
            matrix = self.matrix + torch.diag_embed(ridge[:, None].expand(-1, self.matrix.shape[1]))
            raised = replace(self, matrix=matrix, ridge=ridge, notes=tuple(notes))
            if raised.is_definite():
                return raised if used else self
            higher = used * 10 or FIRST_DAMP
            notes.append(f"the curvature is indefinite at damp {used:g}: raised to {higher:g}")
            used = higher
        raise SingularGramError(
            f"the curvature is indefinite at every damping from {damp:g} to {LARGEST_DAMP:g}; "
            "give more data, or minimise from a point nearer to the solution"
        )


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
        lower, failed = torch.linalg.cholesky_ex(inner)
        if bool(failed.any()):
            raise SingularGramError("the curvature on a kept set is not positive definite; damp it")
        right = pull[rows].gather(1, columns) * valid
        value = target[rows].gather(1, columns) + torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
        result[rows] = result[rows].scatter(1, columns, value * valid)
    return result


@dataclass(frozen=True)
class ProductCurvature:
    """H given by its products: `multiply` maps (problems, d) to H v; solves run by conjugate gradients.

    A solve ends at a residual of `tolerance` times the right side, at most `most_iterations` products later.
    """

    multiply: Callable[[Tensor], Tensor]
    like: Tensor
    ridge: Tensor
    tolerance: float = 1e-10
    most_iterations: int = 1000
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(multiply: Callable[[Tensor], Tensor], like: Tensor) -> "ProductCurvature":
        """Wrap a product; `like` (problems, d) gives sizes, type and device."""
        return ProductCurvature(multiply, like, like.new_zeros(len(like)))

    def product(self, vectors: Tensor) -> Tensor:
        """See `Curvature`."""
        return self.multiply(vectors) + self.ridge[:, None] * vectors

    def solve(self, vectors: Tensor) -> Tensor:
        """See `Curvature`.

        Raises:
            SingularGramError: H is not positive along a search direction, or the iterations do not end.
        """
        return self._descend(vectors, torch.ones_like(vectors, dtype=torch.bool))

    def project(self, target: Tensor, keep: Tensor) -> Tensor:
        """See `Curvature`; CG on H_QQ. Raises SingularGramError as `solve` does."""
        pull = self.product(target.masked_fill(keep, 0.0))
        return (target + self._descend(pull, keep)).masked_fill(~keep, 0.0)

    def largest(self) -> Tensor:
        """See `Curvature`; 50 steps of the power method from a fixed start, so from below, by a few percent."""
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(self.like.shape, generator=generator, dtype=torch.float64).to(self.like.device)
        size = vectors.square().sum(dim=1).sqrt()
        for _ in range(50):
            vectors = self.product(vectors / size[:, None].clamp_min(torch.finfo(torch.float64).tiny))
            size = vectors.square().sum(dim=1).sqrt()
        return size

    def dense(self) -> Tensor:
        """Refuse: nothing of size d x d is formed behind the user's back."""
        raise DataError(
            "this selector reads the entries of the Hessian, and the problem gives only products with it; "
            "choose top-k, or let the problem form its matrix"
        )

    def damped(self, damp: float) -> "ProductCurvature":
        """See `Curvature`; the mean diagonal is estimated from 16 random sign vectors with a fixed seed."""
        if damp == 0:
            return self
        generator = torch.Generator().manual_seed(0)
        mean = torch.zeros_like(self.like[:, 0])
        for _ in range(PROBES):
            signs = torch.randint(0, 2, self.like.shape, generator=generator).to(self.like) * 2 - 1
            mean += (signs * self.multiply(signs)).mean(dim=1) / PROBES
        return replace(self, ridge=self.ridge + damp * mean.clamp_min(0))

    def _descend(self, right: Tensor, keep: Tensor) -> Tensor:
        result = torch.zeros_like(right)
        remainder = right * keep
        direction = remainder.clone()
        squared = remainder.square().sum(dim=1)
        goal = squared * self.tolerance**2
        for _ in range(self.most_iterations):
            active = squared > goal
            if not bool(active.any()):
                return result
            product = self.product(direction) * keep
            bend = (direction * product).sum(dim=1)
            if bool((active & (bend <= 0)).any()):
                raise SingularGramError("the curvature is not positive along a search direction; raise damp")
            length = torch.where(active, squared / bend, 0.0)[:, None]
            result += length * direction
            remainder -= length * product
            previous, squared = squared, torch.where(active, remainder.square().sum(dim=1), squared)
            direction = torch.where(active[:, None], remainder + (squared / previous)[:, None] * direction, 0.0)
        if bool((squared > goal).any()):
            raise SingularGramError(
                f"conjugate gradients did not reach {self.tolerance:g} in {self.most_iterations} products; raise damp"
            )
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
