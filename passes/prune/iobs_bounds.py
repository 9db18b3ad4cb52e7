"""What the theorems of I-OBS allow for the distance to the sparse minimiser, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.smooth import Smooth


@dataclass(frozen=True)
class Bound:
    """Upper bounds of the distance, (steps + 1, problems), NaN first: `tight`, and `printed` as in the paper."""

    tight: Tensor
    printed: Tensor


@dataclass(frozen=True)
class Rate:
    """‖θ_{t+1} − θ*‖ <= factor · (linear · e + quadratic · e²) with e = ‖θ_t − θ*‖; all (problems,).

    Both factors, `tight` and `printed`, are NaN where θ* has more non-zeros than are kept: no theorem speaks of that.
    """

    tight: Tensor
    printed: Tensor
    linear: Tensor
    quadratic: Tensor

    def along(self, distance: Tensor) -> Bound:
        """Return the bounds for the iterates whose distances are `distance` (steps + 1, problems)."""
        newton = self.linear * distance[:-1] + self.quadratic * distance[:-1].square()
        first = torch.full_like(distance[:1], float("nan"))
        # an infinite factor of nothing left by the Newton step: 0, as at every kept count below d
        printed = torch.where((newton == 0) & self.printed.isinf(), 0.0, self.printed * newton)
        return Bound(torch.cat([first, self.tight * newton]), torch.cat([first, printed]))


@dataclass(frozen=True)
class Constants:
    """Assumptions A2 to A4 of the paper, each (problems,) float64 (or one number for all).

    `convexity` μ: H ⪰ μ; `smoothness` L: H ⪯ L; `lipschitz` M: ‖H(a) − H(b)‖₂ <= M ‖a − b‖, 0 for a quadratic;
    `sparsity` k*: the non-zeros of the reference; `diagonal`: the mean diagonal of H, which damping is a share of.
    """

    convexity: Tensor
    smoothness: Tensor
    lipschitz: Tensor
    sparsity: Tensor
    diagonal: Tensor

    def compensated(self, d: int, kept: Tensor, step: float = 1.0, damp: float = 0.0) -> Rate:
        """Return Theorem 1 for a support no worse than top-k's: c = 1 + √(L/μ · (d − k)/(d − k*)).

        The paper prints that last ratio upside down (eq. 11 too), which is looser and infinite for k = d > k*. With
        k = d nothing is removed, so the tight c is 1; with k* = k = d the printed ratio is 1, as wherever k = k* < d.
        For η < 1 and a ridge δ, H + δ takes the place of H, and the Newton point is off by
        (1 − ημ/(μ + δ)) e + ηM e²/(2(μ + δ)).
        """
        kept = kept.double()
        ridge = damp * self.diagonal
        ratio = (d - kept) / (d - self.sparsity).clamp_min(1)
        condition = (self.smoothness + ridge) / (self.convexity + ridge)
        inverted = torch.where(self.sparsity == d, 1.0, 1 / ratio)
        factors = 1 + (condition * ratio).sqrt(), 1 + (condition * inverted).sqrt()
        return self._rate(*self._where_sparse(kept, *factors), step, ridge)

    def top_k(self, d: int, kept: Tensor, step: float = 1.0, damp: float = 0.0) -> Rate:
        """Return Lemma 3, c = 1 + √(k*/k); tight: c = 1 + √((d' − k)/(d' − k*)), d' = min(d, k + k*).

        Off the union of both supports, at most d' entries, T_k(θ⁺) and θ* are zero, so the average of the smallest
        squares may be taken inside it; for d' = k + k* that is the paper's ratio, and less where it covers everything.
        """
        kept = kept.double()
        union = torch.clamp(kept + self.sparsity, max=d)
        tight = (union - kept) / (union - self.sparsity).clamp_min(1)
        factors = 1 + tight.sqrt(), 1 + (self.sparsity / kept.clamp_min(1)).sqrt()
        return self._rate(*self._where_sparse(kept, *factors), step, damp * self.diagonal)

    def _where_sparse(self, kept: Tensor, tight: Tensor, printed: Tensor) -> tuple[Tensor, Tensor]:
        """Put NaN where the reference has more than `kept` non-zeros: k* <= k is the first assumption of both."""
        holds = self.sparsity <= kept
        return torch.where(holds, tight, torch.nan), torch.where(holds, printed, torch.nan)

    def _rate(self, tight: Tensor, printed: Tensor, step: float, ridge: Tensor) -> Rate:
        least = self.convexity + ridge
        # 1 − ημ/(μ + δ), written so that a full step without damping leaves exactly nothing
        linear = ((1 - step) * self.convexity + ridge) / least
        return Rate(tight, printed, linear, step * self.lipschitz / (2 * least))


def constants_along(problem: Smooth, points: Sequence[Tensor], reference: Tensor) -> Constants:
    """Estimate the constants of `problem` from its Hessians at `points` and `reference`, each (problems, d).

    Extreme eigenvalues over these Hessians, and the largest difference quotient to the one at `reference`. Exact for a
    quadratic. Otherwise M and L come out from below, μ from above: a bound made of them is indicative, not a proof.

    Raises:
        DataError: the problem gives its Hessian as products only.
    """
    reference = reference.double()
    base = problem.curvature(reference).dense()
    spectra = [torch.linalg.eigvalsh(base)]
    lipschitz = torch.zeros(len(base), dtype=torch.float64, device=reference.device)
    for point in points:
        other = problem.curvature(point.double()).dense()
        if other is base:
            continue
        gap = (point.double() - reference).norm(dim=1)
        change = torch.linalg.eigvalsh(other - base).abs().amax(dim=1)
        lipschitz = torch.maximum(lipschitz, torch.where(gap > 0, change / gap, 0.0))
        spectra.append(torch.linalg.eigvalsh(other))
    smallest = torch.stack([values[:, 0] for values in spectra]).amin(dim=0)
    largest = torch.stack([values[:, -1] for values in spectra]).amax(dim=0)
    diagonal = base.diagonal(dim1=1, dim2=2).mean(dim=1)
    return Constants(smallest, largest, lipschitz, (reference != 0).sum(dim=1), diagonal)


def hard_thresholding_ratio(d: int, kept: int, sparsity: int) -> float:
    """Return r with ‖T_k(x) − x‖² <= r ‖x − θ*‖² for every x and every θ* of `sparsity` <= `kept` non-zeros.

    (d − k)/(d − k*): the mean of the d − k smallest squares is at most that of any d − k*.
    """
    if not 0 <= sparsity <= kept <= d:
        raise ValueError(f"needs 0 <= sparsity {sparsity} <= kept {kept} <= d {d}")
    return (d - kept) / (d - sparsity) if kept < d else 0.0
