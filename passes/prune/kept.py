"""Exact work on kept sets: inverses of G on the kept columns of many rows at once, and the weights they give."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.errors import SingularGramError

CPU_BYTES = 1 << 27
"""Bytes of matrices factored at once, `work_bytes` on a GPU; the peak is about four times that, or four matrices where
one is larger."""


@dataclass(frozen=True)
class KeptLanes:
    """Some lanes (rows that share a kept set) and their kept columns.

    `lanes` (n,) int64 are their numbers, `columns` (n, width) int64 their columns, kept ones first and in order,
    `valid` (n, width) bool marks the kept ones, and `lower` (n, width, width) float64 is the Cholesky factor of the
    kept part of the matrix, the identity where not valid. `failed` (n,) bool marks lanes on whose kept part the matrix
    is not positive definite: they have no factor.
    """

    lanes: Tensor
    columns: Tensor
    valid: Tensor
    lower: Tensor
    failed: Tensor


def kept_lanes(matrix: Tensor, keep: Tensor) -> Iterator[KeptLanes]:
    """Factor `matrix` (in, in) float64, positive definite, on the kept columns of every lane of `keep` (lanes, in).

    Lanes of similar width come together, in chunks of `CPU_BYTES` of factors (`work_bytes` on a GPU).
    """
    counts = keep.sum(dim=1)
    by_width = counts.sort(stable=True).indices
    budget = work_bytes(matrix.device, CPU_BYTES) // matrix.element_size()
    widths = counts[by_width].tolist()
    first = 0
    while first < len(widths):
        # The widest lane of a chunk sets its size; the next chunk is at most as wide as all columns.
        last = first + max(budget // max(widths[first], 1) ** 2, 1)
        while last > first + 1 and (min(last, len(widths)) - first) * widths[min(last, len(widths)) - 1] ** 2 > budget:
            last = first + (last - first) // 2
        lanes = by_width[first:last]
        width = widths[min(last, len(widths)) - 1]
        yield factor_kept(matrix, keep[lanes], lanes, width)
        first = last


def factor_kept(matrix: Tensor, keep: Tensor, lanes: Tensor, width: int) -> KeptLanes:
    """Factor `matrix` on the kept sets `keep` (n, in) of the `lanes` (n,), none of more than `width` columns."""
    columns = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
    valid = keep.gather(1, columns)
    square = matrix[columns[:, :, None], columns[:, None, :]]
    square.mul_(valid[:, :, None]).mul_(valid[:, None, :])
    square.diagonal(dim1=1, dim2=2).add_(~valid)
    lower, failed = torch.linalg.cholesky_ex(square)
    return KeptLanes(lanes, columns, valid, lower, failed > 0)


def require_factors(part: KeptLanes) -> KeptLanes:
    """Return `part`, every lane of which has a factor. Raises SingularGramError where one has not."""
    if bool(part.failed.any()):
        raise SingularGramError("the Gram matrix is indefinite on the kept columns; give more calibration tokens")
    return part


def solve_kept(matrix: Tensor, moment: Tensor, keep: Tensor) -> Tensor:
    """Return ŵ (lanes, rows, in) float64, zero off `keep` (lanes, in), with (matrix ŵ)_Q = moment_Q on the kept Q.

    `matrix` (in, in) float64 is positive definite, `moment` (lanes, rows, in) float64.

    Raises:
        SingularGramError: the matrix is not positive definite on some kept set.
    """
    weight = torch.zeros_like(moment)
    for part in map(require_factors, kept_lanes(matrix, keep)):
        across = part.columns[:, None].expand(-1, moment.shape[1], -1)
        right = moment[part.lanes].gather(2, across) * part.valid[:, None]
        value = torch.cholesky_solve(right.transpose(1, 2), part.lower).transpose(1, 2)
        # A column that is not valid holds an exact zero: the identity there maps zero to zero.
        weight[part.lanes] = weight[part.lanes].scatter(2, across, value)
    return weight
