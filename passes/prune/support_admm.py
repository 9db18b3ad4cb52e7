"""The support on which ADMM settles: ALPS for one row a problem."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.passes.prune.curvature import CPU_BYTES, Curvature
from sparsify_compiler.passes.prune.supports import keep_counts

FLOOR = 1e-4
"""The penalty below which a support that never moved is believed."""

CHECK = 3
"""Iterations between two looks at how much the support still changes."""


@dataclass(frozen=True)
class ADMM:
    """Split the loss from the count of entries, and raise the penalty ρ while the support settles.

    Meng et al. 2024, "ALPS", Alg. 1 and its ρ schedule, after scaling H to a unit diagonal: W = (H + ρI)⁻¹(Hθ⁺ − V +
    ρD); D = T_k(W + V/ρ); V += ρ(W − D). One eigendecomposition serves every ρ. Every 3 iterations ρ grows by 1.3, 1.2
    or 1.1 where more than k/10, more than k/200 or any entries came or went, as in `ALPS`, and falls by 5 while the
    support never moved from that of θ⁺. A problem whose support stood still is done, as are all after
    `most_iterations`. Its D is not used further: the caller solves on the support.
    """

    penalty: float = 0.1
    most_iterations: int = 300
    name: ClassVar[str] = "ADMM"
    beats_top_k: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.penalty <= 0 or self.most_iterations < 1:
            raise ValueError(f"penalty {self.penalty} and most_iterations {self.most_iterations} must be positive")

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """See `Selector`."""
        matrix = curvature.dense()
        scale = matrix.diagonal(dim1=1, dim2=2).rsqrt()  # (stack, d)
        keep = torch.ones_like(target, dtype=torch.bool)
        entries = work_bytes(matrix.device, CPU_BYTES) // 8
        size = max(entries // target.shape[1] ** 2, 1) if len(matrix) > 1 else max(len(target), 1)
        for first in range(0, len(target), size):
            rows = slice(first, first + size)
            own = slice(None) if len(matrix) == 1 else rows
            scaled = matrix[own] * scale[own][:, :, None] * scale[own][:, None, :]
            keep[rows] = self._settle(scaled, target[rows] / scale[own], kept[rows])
        return keep

    def _settle(self, matrix: Tensor, target: Tensor, kept: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        turned = _apply(vectors.mT, target) * values  # Uᵀ H θ⁺
        keep = keep_counts(target.abs(), kept)
        sparse, dual = target * keep, torch.zeros_like(target)
        rho = target.new_full((len(target), 1), self.penalty)
        before = keep
        done = torch.zeros_like(kept, dtype=torch.bool)
        moved = torch.zeros_like(done)
        for iteration in range(1, self.most_iterations + 1):
            right = turned + _apply(vectors.mT, rho * sparse - dual)
            point = _apply(vectors, right / (values + rho))
            wanted = point + dual / rho
            keep = torch.where(done[:, None], keep, keep_counts(wanted.abs(), kept))
            sparse = wanted * keep
            dual = dual + rho * (point - sparse)
            if iteration % CHECK == 0:
                changed = (keep != before).sum(dim=1)
                moved = moved | (changed > 0)
                done = done | ((changed == 0) & (moved | (rho[:, 0] < FLOOR)))
                if bool(done.all()):
                    break
                growth = torch.where(changed * 10 > kept, 1.3, torch.where(changed * 200 > kept, 1.2, 1.1))
                rho = rho * torch.where(moved, growth, 0.2)[:, None].to(rho)
                before = keep
        return keep


def _apply(stack: Tensor, vectors: Tensor) -> Tensor:
    """Return A_i v_i for `stack` (problems or 1, d, d) and `vectors` (problems, d)."""
    if len(stack) == 1:
        return vectors @ stack[0].mT
    return torch.bmm(stack, vectors[:, :, None])[:, :, 0]
