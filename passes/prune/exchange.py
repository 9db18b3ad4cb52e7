"""Swapping kept tiles for removed ones without solving anew: principal pivots of a tableau.

For a kept set Q and the rest S of the columns of G, the weights x and the gradient v = G x − b are bound by

    x_Q = w + M v_Q − Aᵀ x_S,    v_S = −r + A v_Q + Z x_S,
    M = G_QQ⁻¹,  A = G_SQ M,  Z = G_SS − A G_QS,  w = M b_Q,  r = b_S − G_SQ w,

with v_Q = 0 and x_S = 0 at the optimum on Q. The tableau [[M, −Aᵀ], [A, Z]] over some of the tiles, with the constants
(w, −r), knows all about swaps among them: to swap I for J is to exchange the roles of (x_I, v_J) and (v_I, x_J), after
which it is the tableau of the new kept set (a principal pivot transform, Tucker 1960).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.swap_gains import swap_gains


def columns_of(tiles: Tensor, cols: int) -> Tensor:
    """Return the columns (n, tiles * cols) of `tiles` (n, tiles), each `cols` wide."""
    if cols == 1:
        return tiles
    return (tiles[:, :, None] * cols + torch.arange(cols, device=tiles.device)).flatten(1)


def rows_at(matrix: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` (n, m) of `matrix` (n, ., k): (n, m, k)."""
    return matrix.gather(1, index[:, :, None].expand(-1, -1, matrix.shape[2]))


def blocks_of(matrix: Tensor, cols: int) -> Tensor:
    """Return the diagonal blocks (n, tiles, cols, cols) of `matrix` (n, tiles * cols, tiles * cols)."""
    tiles = matrix.shape[1] // cols
    split = matrix.reshape(len(matrix), tiles, cols, tiles, cols)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


@dataclass
class Tableau:
    """Some tiles of n lanes: `kept` slots first, then slots for removed tiles, `cols` columns each, N slots in all.

    `matrix` (n, N * cols, N * cols) and `constant` (n, N * cols, rows) are float64. `held` (n, N) int64 is the tile in
    each slot, numbered by the slot it began in. `swap` changes all three.
    """

    matrix: Tensor
    constant: Tensor
    kept: int
    cols: int
    held: Tensor

    def gains(self) -> Tensor:
        """Return what each swap gains: (n, removed slots, kept slots)."""
        width = self.kept * self.cols
        return swap_gains(
            blocks_of(self.matrix[:, :width, :width], self.cols),
            self.matrix[:, width:, :width],
            blocks_of(self.matrix[:, width:, width:], self.cols),
            self.constant[:, :width],
            self.constant[:, width:].neg(),
        )

    def swap(self, removed: Tensor, kept: Tensor, active: Tensor) -> None:
        """Swap what the slots `removed` and `kept` (n,) of their kinds hold, in the lanes `active` (n,) bool.

        With e the columns of both and B = T_ee, T becomes T − (T_:e + I_:e) B⁻¹ (T_e: − I_e:) and the constant t turns
        into t − (T_:e + I_:e) B⁻¹ t_e; then the two change places, so that slots keep their kind.
        """
        slots = torch.stack((kept, removed + self.kept), dim=1)  # (n, 2)
        at = columns_of(slots, self.cols)
        lane = torch.arange(len(slots), device=slots.device)[:, None]
        rows = self.matrix[lane, at]  # (n, 2 cols, N cols)
        block = rows.gather(2, at[:, None].expand(-1, at.shape[1], -1))
        unit = torch.zeros_like(rows).scatter_(2, at[:, :, None], 1.0)
        share = torch.linalg.solve(block, torch.cat((rows - unit, self.constant[lane, at]), dim=2))
        share *= active[:, None, None]
        across = (rows_at(self.matrix.mT, at) + unit).mT
        self.matrix.baddbmm_(across, share[:, :, : rows.shape[2]], alpha=-1)
        self.constant.baddbmm_(across, share[:, :, rows.shape[2] :], alpha=-1)
        order = torch.where(active[:, None], slots.flip(1), slots)
        changed = columns_of(order, self.cols)
        self.matrix[lane, at] = self.matrix[lane, changed]
        self.matrix.mT[lane, at] = self.matrix.mT[lane, changed]
        self.constant[lane, at] = self.constant[lane, changed]
        self.held[lane, slots] = self.held[lane, order]


def exchange(inverse: Tensor, images: Tensor, block: Tensor, at: Tensor) -> None:
    """Turn `inverse` M (n, Q, Q), kept columns in slots, into that of another kept set, in place: many swaps at once.

    The columns in the slots `at` (n, k) go, and k others J come into these slots. `images` A_J (n, k, Q) and `block`
    (n, 2 k, 2 k), the tableau on those that go and those that come, in this order, are of the old kept set. A swap
    whose images are zero and whose block is the identity's leaves nothing but rubbish in its slot.
    """
    half, width = images.shape[1], images.shape[2]
    lines = torch.cat((rows_at(inverse, at) * images.any(dim=2, keepdim=True), images), dim=1)
    identity = torch.eye(2 * half, dtype=block.dtype, device=block.device)
    right = torch.cat((lines, identity[:, half:].expand(len(block), -1, -1)), dim=2)
    solved = torch.linalg.solve(block, right)
    share, corner = solved[:, :, :width], solved[:, half:, width:]
    across = torch.cat((lines[:, :half], -lines[:, half:]), dim=1).mT
    inverse.baddbmm_(across, share, alpha=-1)
    lane = torch.arange(len(at), device=at.device)[:, None]
    inverse[lane, at] = -share[:, half:]
    inverse.mT[lane, at] = -share[:, half:]
    inverse[lane[:, :, None], at[:, :, None], at[:, None, :]] = corner
