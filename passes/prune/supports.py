"""Which entries of a Newton point to keep: selectors for I-OBS, from magnitudes to the exhaustive search.

Given θ⁺ and a curvature H, the best support of k entries minimises the least ‖θ − θ⁺‖_H over θ on it (Wu et al. 2024,
"The Iterative Optimal Brain Surgeon", eq. 9 and Lemma 2). That is NP-hard; every selector here is a way to approach it,
and the weights on the support are solved for afterwards, whichever chose it. Scores tie to the lowest index.
"""

from dataclasses import dataclass
from itertools import combinations, islice
from math import comb
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.errors import DataError
from sparsify_compiler.passes.prune.curvature import CPU_BYTES, Curvature, cholesky, project_rows


class Selector(Protocol):
    """Chooses what to keep. An implementation is a frozen dataclass whose fields are its hyper-parameters."""

    @property
    def name(self) -> str:
        """The word in tables."""
        ...

    @property
    def beats_top_k(self) -> bool:
        """Whether its supports are never worse, once solved for, than those of the largest magnitudes.

        That is all the proof of Theorem 1 asks of a selector.
        """
        ...

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """Return bool (problems, d) with `kept` (problems,) int64 entries a row, for θ⁺ = `target` (problems, d).

        Raises:
            DataError: the selector reads the entries of H, and only products are known.
            SingularGramError: H is so nearly singular that rounding makes a part of it indefinite.
        """
        ...


@dataclass(frozen=True)
class TopK:
    """The largest |θ⁺|: the selector of Topk-I-OBS (Alg. 1, option 1). Works with products alone."""

    name: ClassVar[str] = "top-k"
    beats_top_k: ClassVar[bool] = True

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """See `Selector`."""
        return keep_counts(target.abs(), kept)


@dataclass(frozen=True)
class DiagonalOBS:
    """The largest (θ⁺_i)² / [H⁻¹]_ii, all at once: WoodFisher's and WoodTaylor's one-shot score."""

    name: ClassVar[str] = "diagonal OBS"
    beats_top_k: ClassVar[bool] = False

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """See `Selector`."""
        upper = inverse_factors(curvature.dense())
        return keep_counts(target.square() / upper.square().sum(dim=1), kept)  # [H⁻¹]_ii = Σ_j U_ji²


@dataclass(frozen=True)
class ColumnSweep:
    """One sweep from left to right as SparseGPT's: each removed entry is made up for by those that follow.

    `width` entries are chosen at a time, by θ² / U_ii² with Uᵀ U = H⁻¹, each span losing its equal share. Frantar &
    Alistarh 2023, "SparseGPT", Alg. 1, for one row a problem.
    """

    width: int = 128
    name: ClassVar[str] = "column sweep"
    beats_top_k: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width {self.width}: must be at least 1")

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """See `Selector`."""
        upper = inverse_factors(curvature.dense())
        d = target.shape[1]
        weight, keep, removed = target.clone(), torch.ones_like(target, dtype=torch.bool), d - kept
        for start in range(0, d, self.width):
            stop = min(start + self.width, d)
            count = removed * stop // d - removed * start // d
            pivots = upper.diagonal(dim1=1, dim2=2)[:, start:stop]
            span = keep_counts((weight[:, start:stop] / pivots).square(), (stop - start) - count)
            keep[:, start:stop] = span
            for i in range(start, stop):
                error = torch.where(keep[:, i], 0.0, weight[:, i] / upper[:, i, i])
                weight[:, i:] -= error[:, None] * upper[:, i, i:]
        return keep


@dataclass(frozen=True)
class Exhaustive:
    """Every support: the exact minimum (Alg. 1, option 2). For d up to about 20.

    `most_supports` bounds C(d, k). Of supports that tie, the first in lexicographic order wins.
    """

    most_supports: int = 200_000
    name: ClassVar[str] = "exhaustive"
    beats_top_k: ClassVar[bool] = True

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """See `Selector`.

        Raises:
            DataError: more supports than `most_supports`, or a curvature without entries.
        """
        matrix, keep = curvature.dense(), torch.ones_like(target, dtype=torch.bool)
        for count in sorted(set(kept.tolist())):
            rows = (kept == count).nonzero()[:, 0]
            own = matrix if len(matrix) == 1 else matrix[rows]
            keep[rows] = self._search(target[rows], own, count)
        return keep

    def _search(self, target: Tensor, matrix: Tensor, count: int) -> Tensor:
        problems, d = target.shape
        if comb(d, count) > self.most_supports:
            raise DataError(
                f"{comb(d, count)} supports of {count} in {d} entries are more than {self.most_supports}; "
                "choose greedy OBS or the swap search"
            )
        best = target.new_full((problems,), float("inf"))
        keep = torch.zeros_like(target, dtype=torch.bool)
        supports = combinations(range(d), count)
        chunk = max(work_bytes(target.device, CPU_BYTES) // (64 * problems * max(d, 1) ** 2), 1)
        while part := list(islice(supports, chunk)):
            index = torch.tensor(part, dtype=torch.long, device=target.device).reshape(len(part), count)
            options = torch.zeros(len(part), d, dtype=torch.bool, device=target.device).scatter_(1, index, True)
            costs = _costs(matrix, target, options)  # (problems, supports)
            least, first = costs.min(dim=1).values, costs.argmin(dim=1)
            better = least < best
            best = torch.where(better, least, best)
            keep = torch.where(better[:, None], options[first], keep)
        return keep


def _costs(matrix: Tensor, target: Tensor, options: Tensor) -> Tensor:
    """Return ‖θ − θ⁺‖_H² (problems, supports) of the optimal θ on each support of `options` (supports, d)."""
    problems, supports = len(target), len(options)
    points = target.repeat_interleave(supports, 0)  # problem-major
    keep = options.repeat(problems, 1)
    owner = torch.arange(problems, device=target.device).repeat_interleave(supports)
    which = owner if len(matrix) > 1 else None
    each = matrix[owner] if which is not None else matrix.expand(len(points), -1, -1)

    def product(vectors: Tensor) -> Tensor:
        return torch.bmm(each, vectors[:, :, None])[:, :, 0]

    delta = project_rows(matrix, which, points, keep, product(points.masked_fill(keep, 0.0))) - points
    return (delta * product(delta)).sum(dim=1).reshape(problems, supports)


def keep_counts(scores: Tensor, kept: Tensor) -> Tensor:
    """Mark the `kept` (problems,) largest of every row of `scores` (problems, d); ties keep the lowest index."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, rank < kept[:, None])


def inverse_factors(matrix: Tensor) -> Tensor:
    """Return upper U with Uᵀ U = H⁻¹ for every H of `matrix` (stack, d, d): one Cholesky, one triangular inverse.

    Raises:
        SingularGramError: an H is not positive definite in reverse order, as rounding can have it though H itself is.
    """
    lower = cholesky(matrix.flip(1, 2))
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return inverse.flip(1, 2)
