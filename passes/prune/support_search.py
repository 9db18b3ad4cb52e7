"""Selectors that walk from support to support: greedy OBS downwards, and exchanges of one entry for another.

Both work on one table a problem, the symmetric sweep of least squares (Goodnight 1979, "A Tutorial on the SWEEP
Operator"): with b = H θ⁺, Q the kept set and S the rest,

    T = [ −H_QQ⁻¹        H_QQ⁻¹ H_QS                θ_Q ]      θ_Q = H_QQ⁻¹ b_Q, the optimum on Q
        [  H_SQ H_QQ⁻¹   H_SS − H_SQ H_QQ⁻¹ H_QS    r_S ]      r_S = b_S − H_SQ θ_Q, what S misses

and moving one entry in or out of Q is one rank-one update of T.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.passes.prune.curvature import CPU_BYTES, Curvature, cholesky
from sparsify_compiler.passes.prune.supports import Selector, TopK

REFRESH = 64
"""Exchanges after which the table is built afresh, before rounding adds up."""


@dataclass(frozen=True)
class GreedyOBS:
    """Remove one entry after the other, each the one of least θ_i² / [H_QQ⁻¹]_ii on what is left, with compensation.

    ExactOBS / OBC (Frantar, Singh & Alistarh 2022, Alg. 1) for one row a problem.
    """

    name: ClassVar[str] = "greedy OBS"
    beats_top_k: ClassVar[bool] = False

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """See `Selector`; O(d² (d − k)) a problem."""
        matrix, keep = curvature.dense(), torch.ones_like(target, dtype=torch.bool)
        for rows, own in _chunks(matrix, target):
            keep[rows] = _shrink(own, target[rows], kept[rows])
        return keep


@dataclass(frozen=True)
class SwapSearch:
    """Exchange a kept entry for a removed one while that lowers the loss, the best of all pairs each time.

    The loss of every pair is exact, with all kept entries re-solved, so the result is a support that no single
    exchange improves. Exchanges must lower the loss by `tolerance` of ‖θ⁺‖_H²; there are at most `most_swaps` a
    problem. `start` gives the first support. The local search of CBS (Yu et al. 2022) and of SparseSwaps, which keeps
    the weights fixed, here with the optimal update inside.
    """

    start: Selector = field(default_factory=TopK)
    most_swaps: int = 1000
    tolerance: float = 1e-12
    name: ClassVar[str] = "swap search"

    @property
    def beats_top_k(self) -> bool:
        """As its start."""
        return self.start.beats_top_k

    def select(self, target: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
        """See `Selector`; O(d²) a problem and exchange."""
        matrix, keep = curvature.dense(), self.start.select(target, curvature, kept)
        for rows, own in _chunks(matrix, target):
            keep[rows] = self._improve(own, target[rows], keep[rows])
        return keep

    def _improve(self, matrix: Tensor, target: Tensor, keep: Tensor) -> Tensor:
        d = target.shape[1]
        energy = (target * torch.matmul(matrix, target[:, :, None])[:, :, 0]).sum(dim=1)
        table = _table(matrix, target, keep)
        for swap in range(self.most_swaps):
            change = _exchange(table, keep).reshape(len(keep), -1)
            least, pair = change.min(dim=1)
            active = least < -self.tolerance * energy
            if not bool(active.any()):
                break
            gone, come = pair // d, pair % d
            keep = _moved(keep, gone, ~active)
            keep = _moved(keep, come, ~active)
            if (swap + 1) % REFRESH:
                _pivot(table, gone, active)
                _pivot(table, come, active)
            else:
                table = _table(matrix, target, keep)
        return keep


def _exchange(table: Tensor, keep: Tensor) -> Tensor:
    """Return (problems, gone, come): by how much ‖θ − θ⁺‖_H² changes; +inf where the pair is not one of Q and S.

    Without i the loss is θ_i² / A_ii higher, A = H_QQ⁻¹, and entry j misses r_j + P_ji θ_i / A_ii with curvature
    s_j + P_ji² / A_ii, P = H_SQ A: what j then gains is the square of the first over the second.
    """
    inner, last = table[:, :-1, :-1], table[:, :-1, -1]
    diagonal = inner.diagonal(dim1=1, dim2=2)
    inverse = torch.where(keep, -diagonal, 1.0)[:, :, None]  # A_ii
    share = last[:, :, None] / inverse
    missing = last[:, None, :] + inner * share
    bend = torch.where(keep, 1.0, diagonal)[:, None, :] + inner.square() / inverse
    change = last[:, :, None] * share - missing.square() / bend
    return change.masked_fill(~(keep[:, :, None] & ~keep[:, None, :]), float("inf"))


def _shrink(matrix: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    keep = torch.ones_like(target, dtype=torch.bool)
    table = _table(matrix, target, keep)
    removed = target.shape[1] - kept
    for step in range(int(removed.max()) if len(removed) else 0):
        diagonal = table.diagonal(dim1=1, dim2=2)[:, :-1]
        scores = torch.where(keep, table[:, :-1, -1].square() / -diagonal, float("inf"))
        gone, active = scores.argmin(dim=1), removed > step
        _pivot(table, gone, active)
        keep = _moved(keep, gone, ~active)
    return keep


def _moved(keep: Tensor, entry: Tensor, stays: Tensor) -> Tensor:
    """Flip `entry` (problems,) of every row that does not stay."""
    return keep.scatter(1, entry[:, None], (keep.gather(1, entry[:, None])[:, 0] ^ ~stays)[:, None])


def _table(matrix: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Build T, (problems, d + 1, d + 1), for `keep`; the last corner is not used."""
    problems, d = target.shape
    matrix = matrix.expand(problems, -1, -1)
    pairs = keep[:, :, None] & keep[:, None, :]
    identity = torch.eye(d, dtype=matrix.dtype, device=matrix.device)
    lower = cholesky(torch.where(pairs, matrix, identity))
    inverse = torch.cholesky_inverse(lower) * pairs
    off = ~keep
    cross = inverse @ (matrix * off[:, None, :])  # H_QQ⁻¹ H_QS
    schur = (matrix - matrix @ cross) * (off[:, :, None] & off[:, None, :])
    lost = target * off
    value = (target + (cross @ lost[:, :, None])[:, :, 0]) * keep
    missing = (schur @ lost[:, :, None])[:, :, 0]  # b_S − H_SQ θ_Q = Schur θ⁺_S
    table = target.new_zeros(problems, d + 1, d + 1)
    table[:, :-1, :-1] = cross + cross.mT + schur - inverse
    table[:, :-1, -1] = table[:, -1, :-1] = value + missing
    return table


def _pivot(table: Tensor, entry: Tensor, active: Tensor) -> None:
    """Move `entry` (problems,) in or out of Q where `active`, changing `table`; it is in if its pivot is negative."""
    rows = torch.arange(len(table), device=table.device)
    column = table[rows, entry]  # (problems, d + 1), a row by symmetry
    pivot = column.gather(1, entry[:, None])
    scale = torch.where(active[:, None], 1 / pivot, 0.0)
    table.baddbmm_((column * scale)[:, :, None], column[:, None, :], alpha=-1)
    new = column * (scale * pivot.sign())
    new.scatter_(1, entry[:, None], -scale)
    new = torch.where(active[:, None], new, column)
    table[rows, entry] = new
    table[rows, :, entry] = new


def _chunks(matrix: Tensor, target: Tensor) -> list[tuple[slice, Tensor]]:
    """Cut the problems so that a handful of tables stay within `CPU_BYTES` (`work_bytes` on a GPU)."""
    problems, d = target.shape
    size = max(work_bytes(matrix.device, CPU_BYTES) // (8 * (d + 1) ** 2), 1)
    slices = [slice(first, min(first + size, problems)) for first in range(0, problems, size)]
    return [(rows, matrix if len(matrix) == 1 else matrix[rows]) for rows in slices]
