"""The curvature of smooth losses by its products alone: nothing of size d x d, solves by conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sparsify_compiler.errors import DataError, SingularGramError
from sparsify_compiler.passes.prune.curvature import raise_damping

PROBES = 16
"""Random vectors that estimate the mean diagonal of a curvature."""

BENT = "the curvature is not positive along a search direction; raise damp"


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
        return self._solve(vectors, torch.ones_like(vectors, dtype=torch.bool))

    def project(self, target: Tensor, keep: Tensor) -> Tensor:
        """See `Curvature`; CG on H_QQ. Raises SingularGramError as `solve` does."""
        pull = self.product(target.masked_fill(keep, 0.0))
        return (target + self._solve(pull, keep)).masked_fill(~keep, 0.0)

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
        """See `Curvature`; damping rises tenfold for all problems, each step noted, while one of them is indefinite.

        The mean diagonal is estimated from 16 random sign vectors with a fixed seed. H is taken to be definite where
        conjugate gradients from another such vector meet no direction without curvature: that costs one more solve.

        Raises:
            SingularGramError: one is indefinite at every damping up to 1.
        """

        def at(used: float, notes: tuple[str, ...]) -> ProductCurvature | None:
            ridge = self.ridge + used * self._mean_diagonal if used else self.ridge
            raised = replace(self, ridge=ridge, notes=notes)
            return raised if raised._is_definite() else None

        return raise_damping(damp, at)

    @cached_property
    def _mean_diagonal(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        mean = torch.zeros_like(self.like[:, 0])
        for _ in range(PROBES):
            signs = self._signs(generator)
            mean += (signs * self.multiply(signs)).mean(dim=1) / PROBES
        return mean.clamp_min(0)

    def _is_definite(self) -> bool:
        signs = self._signs(torch.Generator().manual_seed(1))
        return self._descend(signs, torch.ones_like(signs, dtype=torch.bool))[1] != BENT

    def _signs(self, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 2, self.like.shape, generator=generator).to(self.like) * 2 - 1

    def _solve(self, right: Tensor, keep: Tensor) -> Tensor:
        result, fault = self._descend(right, keep)
        if fault is not None:
            raise SingularGramError(fault)
        return result

    def _descend(self, right: Tensor, keep: Tensor) -> tuple[Tensor, str | None]:
        """Return H_QQ⁻¹ b by conjugate gradients, and what is wrong with it."""
        result = torch.zeros_like(right)
        remainder = right * keep
        direction = remainder.clone()
        squared = remainder.square().sum(dim=1)
        goal = squared * self.tolerance**2
        for _ in range(self.most_iterations):
            active = squared > goal
            if not bool(active.any()):
                return result, None
            product = self.product(direction) * keep
            bend = (direction * product).sum(dim=1)
            if bool((active & (bend <= 0)).any()):
                return result, BENT
            length = torch.where(active, squared / bend, 0.0)[:, None]
            result += length * direction
            remainder -= length * product
            previous, squared = squared, torch.where(active, remainder.square().sum(dim=1), squared)
            direction = torch.where(active[:, None], remainder + (squared / previous)[:, None] * direction, 0.0)
        if bool((squared > goal).any()):
            unfinished = f"did not reach {self.tolerance:g} in {self.most_iterations} products"
            return result, f"conjugate gradients {unfinished}; raise damp"
        return result, None
