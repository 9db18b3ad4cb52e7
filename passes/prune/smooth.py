"""Smooth losses over batches of independent vectors, with a gradient and a Hessian.

Everything is float64, on the device of the tensors given, one row a problem: see curvature.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.curvature import Curvature, DenseCurvature
from sparsify_compiler.passes.prune.curvature_products import ProductCurvature


class Smooth(Protocol):
    """A twice differentiable loss."""

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses (problems,) and their gradients (problems, d) at `weight`."""
        ...

    def curvature(self, weight: Tensor) -> Curvature:
        """Return the Hessian at `weight`, not yet damped."""
        ...


@dataclass(frozen=True)
class Quadratic:
    """f(θ) = ½ (θ − center)ᵀ H (θ − center) + offset, with `matrix` H (d, d) or (problems, d, d).

    `center` (problems, d) is the dense minimiser, `offset` (problems,) or 0 its loss. One product with H gives value
    and gradient, and neither loses digits to cancellation near the minimiser.
    """

    matrix: Tensor
    center: Tensor
    offset: Tensor | float = 0.0

    @staticmethod
    def least_squares(x: Tensor, y: Tensor) -> "Quadratic":
        """Return ½ ‖x θ − y‖² for `x` (problems, n, d) and `y` (problems, n): H = xᵀx, center = H⁻¹xᵀy.

        Raises:
            SingularGramError: xᵀx is singular: fewer rows than columns, or dependent columns.
        """
        x, y = x.double(), y.double()
        curvature = DenseCurvature.of(x.mT @ x)
        center = curvature.solve((x.mT @ y[:, :, None])[:, :, 0])
        residual = (x @ center[:, :, None])[:, :, 0] - y
        return Quadratic(curvature.matrix, center, residual.square().sum(dim=1) / 2)

    @cached_property
    def _curvature(self) -> DenseCurvature:
        return DenseCurvature.of(self.matrix)

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Smooth`."""
        delta = weight - self.center
        gradient = self._curvature.product(delta)
        return (delta * gradient).sum(dim=1) / 2 + self.offset, gradient

    def curvature(self, weight: Tensor) -> DenseCurvature:
        """See `Smooth`; the same object at every point, factorised once."""
        return self._curvature


@dataclass(frozen=True)
class Differentiable:
    """Any twice differentiable torch function `loss` from (problems, d) float64 to (problems,), row by row.

    `form` "matrix" builds (problems, d, d) Hessians by d double backward passes; "products" never forms one.
    """

    loss: Callable[[Tensor], Tensor]
    form: Literal["matrix", "products"] = "matrix"

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Smooth`."""
        with torch.enable_grad():
            point = weight.detach().requires_grad_()
            value = self.loss(point)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    def curvature(self, weight: Tensor) -> Curvature:
        """See `Smooth`."""
        with torch.enable_grad():
            point = weight.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(point).sum(), point, create_graph=True)

        def multiply(vectors: Tensor) -> Tensor:
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(vectors)
            (product,) = torch.autograd.grad(gradient, point, vectors, retain_graph=True)
            return product

        if self.form == "products":
            return ProductCurvature.of(multiply, point.detach())
        basis = torch.eye(point.shape[1], dtype=point.dtype, device=point.device)
        columns = [multiply(basis[i].expand_as(point)) for i in range(point.shape[1])]
        return DenseCurvature.of(torch.stack(columns, dim=2))
