"""Sparse recovery without a Hessian: k-IHT, and the stochastic I-OBS with a rank-one curvature."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.iobs import Point, top_k
from sparsify_compiler.passes.prune.iobs_bounds import Constants, Rate
from sparsify_compiler.passes.prune.smooth import Smooth


@dataclass(frozen=True)
class IHT:
    """k-IHT, θ ← T_k(θ − (step / L) ∇f): Blumensath & Davies 2009; Wu et al. 2024, Lemma 1.

    `smoothness` is L; None takes the largest eigenvalue of the Hessian at each point.
    """

    step: float = 1.0
    smoothness: float | None = None
    name: ClassVar[str] = "k-IHT"

    def __post_init__(self) -> None:
        if self.step <= 0 or (self.smoothness is not None and self.smoothness <= 0):
            raise ValueError(f"step {self.step} and smoothness {self.smoothness} must be positive")

    def advance(self, problem: Smooth, point: Point, kept: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """See `iobs.Update`."""
        if self.smoothness is None:
            largest = problem.curvature(point.weight).largest().expand(len(kept))[:, None]
        else:
            largest = point.weight.new_full((1, 1), self.smoothness)
        return *top_k(point.weight - self.step / largest * point.gradient, kept), ()

    def rate(self, constants: Constants, d: int, kept: Tensor) -> Rate | None:
        """None: its guarantee is linear and asks for k far above k*."""
        return None


@dataclass(frozen=True)
class StochasticIOBS:
    """θ ← T_k(θ − g / (λ + ‖E_Q g‖² / ‖g‖)), Q the support of θ, E_Q g the gradient on it: O(d) a step.

    Wu et al. 2024, App. B.1, Lemma 4, for curvatures up to λI + E[g gᵀ / ‖g‖]. `regularization` is λ > 0, in the unit
    of the Hessian.
    """

    regularization: float
    name: ClassVar[str] = "stochastic I-OBS"

    def __post_init__(self) -> None:
        if self.regularization <= 0:
            raise ValueError(f"regularization {self.regularization}: must be positive")

    def advance(self, problem: Smooth, point: Point, kept: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """See `iobs.Update`; the gradient is that of the batch drawn for the step, where there are batches."""
        size = point.gradient.norm(dim=1)
        inside = (point.gradient * point.keep).square().sum(dim=1)
        share = torch.where(size > 0, inside / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
        moved = point.weight - point.gradient / (self.regularization + share)[:, None]
        return *top_k(moved, kept), ()

    def rate(self, constants: Constants, d: int, kept: Tensor) -> Rate | None:
        """None: Lemma 4 is about one step's model, not a distance."""
        return None
