"""What swaps of a kept tile for a removed one gain, exactly: all pairs of two lists of tiles at once."""

import torch
from torch import Tensor

LEAST = 1e-12
"""Below it a pivot of a matrix with unit diagonal is rounding."""


def swap_gains(pivots: Tensor, pairs: Tensor, schur: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return what each swap of a kept tile I for a removed tile J gains, re-solved before and after: (n, R, K).

    For n lanes with kept set Q, M = (G_QQ)⁻¹ and A_J = G_JQ M: `pivots` M_II (n, K, cols, cols), `pairs` A_JI
    (n, R * cols, K * cols), `schur` Z_J = G_JJ − A_J G_QJ (n, R, cols, cols), `weight` w_I = (M b_Q)_I
    (n, K * cols, rows), `residual` r_J = (b − G w)_J (n, R * cols, rows), all float64.
    Taking I out costs w_Iᵀ M_II⁻¹ w_I, turns r_J into r = r_J + A_JI M_II⁻¹ w_I and Z_J into
    Z = Z_J + A_JI M_II⁻¹ A_JIᵀ; putting J in then gains rᵀ Z⁻¹ r.
    """
    n, removed, cols, _ = schur.shape
    if cols == 1:
        return _single_gains(pivots[:, :, 0, 0], pairs, schur[:, :, 0, 0], weight, residual)
    rows = weight.shape[2]
    factor, _ = torch.linalg.cholesky_ex(pivots)  # (n, K, cols, cols)
    half = torch.linalg.solve_triangular(factor, weight.view(n, -1, cols, rows), upper=False)  # C⁻¹ w_I
    split = pairs.view(n, removed, cols, -1, cols).permute(0, 1, 3, 2, 4)  # A_JI: (n, R, K, cols, cols)
    lean = torch.linalg.solve_triangular(factor[:, None].mT, split, upper=True, left=False)  # A_JI C⁻ᵀ
    after, indefinite = torch.linalg.cholesky_ex(schur[:, :, None] + lean @ lean.mT)
    moved = residual.view(n, removed, 1, cols, rows) + lean @ half[:, None]
    gained = torch.linalg.solve_triangular(after, moved, upper=False).square().sum(dim=(3, 4))
    gains = torch.sub(gained, half.square().sum(dim=(2, 3))[:, None])
    # A block that rounding made indefinite tells nothing: no swap.
    return gains.masked_fill((indefinite > 0) | gains.isnan(), -torch.inf)


def _single_gains(pivots: Tensor, pairs: Tensor, schur: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    root = pivots.clamp_min(LEAST).rsqrt()
    half = weight * root[:, :, None]  # (n, K, rows)
    lean = pairs * root[:, None]  # (n, R, K)
    # Summed over the rows: (r + a h)ᵀ(r + a h) = rᵀr + 2 a rᵀh + a² hᵀh, with a = lean and h = half.
    gained = (residual @ half.mT).mul_(lean).mul_(2)
    gained += residual.square().sum(dim=2)[:, :, None]
    cost = half.square().sum(dim=2)[:, None]
    square = lean.square_()
    gained.addcmul_(square, cost)
    return gained.div_(square.add_(schur.clamp_min(LEAST)[:, :, None])).sub_(cost)
