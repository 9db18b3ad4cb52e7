"""What swaps of a kept tile for a removed one gain, exactly, and which of them can be made together."""

import torch
from torch import Tensor

PASSES = 6
"""How often the tiles that are left pair up again: more swaps a round, each pass worth less than the one before."""


def swap_gains(inverse: Tensor, cross: Tensor, own: Tensor, weight: Tensor, residual: Tensor, cols: int) -> Tensor:
    """Return what each swap of a kept tile I for a removed tile J gains, re-solved before and after: (n, R, K).

    For n lanes with kept columns Q and removed ones S: `inverse` M = (G_QQ)⁻¹ (n, Q, Q), `cross` G_SQ (n, S, Q), `own`
    the diagonal blocks G_JJ (n, R, cols, cols), `weight` M b_Q (n, Q, rows), `residual` b_S − G_SQ w (n, S, rows).
    Taking I out costs w_Iᵀ M_II⁻¹ w_I, turns the residual of J into r = r_J + A_JI M_II⁻¹ w_I with A = G_SQ M, and the
    Schur complement of J into Z = Z_J + A_JI M_II⁻¹ A_JIᵀ, Z_J = G_JJ − (A G_QS)_JJ; putting J in then gains rᵀ Z⁻¹ r.
    All float64 but `cross`, which for single columns may be float32: the gains are of its dtype.
    """
    if cols == 1:
        return _single_gains(inverse, cross, own[:, :, 0, 0], weight, residual)
    n, removed, rows = len(cross), own.shape[1], weight.shape[2]
    blocks = inverse.view(n, -1, cols, inverse.shape[1] // cols, cols).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    factor = torch.linalg.cholesky(blocks)  # (n, K, cols, cols)
    half = torch.linalg.solve_triangular(factor, weight.view(n, -1, cols, rows), upper=False)  # C⁻¹ w_I
    product = cross @ inverse
    by_tile = product.view(n, removed, cols, -1)
    schur = own - torch.einsum("nrcq,nrdq->nrcd", by_tile, cross.view(n, removed, cols, -1))
    pairs = product.view(n, removed, cols, -1, cols).permute(0, 1, 3, 2, 4)  # A_JI: (n, R, K, cols, cols)
    lean = torch.linalg.solve_triangular(factor[:, None].mT, pairs, upper=True, left=False)  # A_JI C⁻ᵀ
    after = torch.linalg.cholesky(schur[:, :, None] + lean @ lean.mT)
    moved = residual.view(n, removed, 1, cols, rows) + lean @ half[:, None]
    gained = torch.linalg.solve_triangular(after, moved, upper=False).square().sum(dim=(3, 4))
    return torch.sub(gained, half.square().sum(dim=(2, 3))[:, None])


def _single_gains(inverse: Tensor, cross: Tensor, own: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    dtype = cross.dtype
    pivots = inverse.diagonal(dim1=1, dim2=2)[:, :, None]
    half = weight / pivots.sqrt()  # (n, K, rows)
    lean = cross @ inverse.to(dtype)  # (n, R, K)
    schur = own - (lean * cross).sum(dim=2, dtype=torch.float64)
    floor = 10 * torch.finfo(dtype).eps  # less is rounding, against a diagonal of 1
    lean /= pivots.sqrt().transpose(1, 2).to(dtype)
    # Summed over the rows: (r + a h)ᵀ(r + a h) = rᵀr + 2 a rᵀh + a² hᵀh, with a = lean and h = half.
    mixed = (residual.to(dtype) @ half.to(dtype).transpose(1, 2)).mul_(lean).mul_(2)
    square = lean.square_()
    cost = half.square().sum(dim=2)[:, None].to(dtype)
    mixed += residual.square().sum(dim=2)[:, :, None].to(dtype)
    mixed.addcmul_(square, cost)
    return mixed.div_(square.add_(schur.clamp_min(floor)[:, :, None].to(dtype))).sub_(cost)


def disjoint_swaps(gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose swaps that share no tile from `gains` (n, R, K), which is overwritten: the best claims, `PASSES` times.

    In each pass every removed tile that is left claims its best partner among the kept ones that are left, and a
    partner goes to its best claim. Returns (n, R) each, best first: which removed tile (an index below R), which kept
    one, and the gain; those without a partner come last, with a gain of -inf. Ties: the lowest index first.
    """
    n, removed, kept = gains.shape
    rank = torch.arange(removed, device=gains.device).expand(n, removed)
    found = torch.full((n, removed), -torch.inf, dtype=gains.dtype, device=gains.device)
    partners = torch.zeros((n, removed), dtype=torch.int64, device=gains.device)
    for _ in range(PASSES):
        best, order = gains.amax(dim=2).sort(dim=1, descending=True, stable=True)
        partner = gains.argmax(dim=2).gather(1, order)
        first = torch.full((n, kept), removed, dtype=torch.int64, device=gains.device)
        first = first.scatter_reduce(1, partner, rank, "amin")
        wins = (first.gather(1, partner) == rank) & (best > 0)
        found = found.scatter(1, order, torch.where(wins, best, found.gather(1, order)))
        partners = partners.scatter(1, order, torch.where(wins, partner, partners.gather(1, order)))
        taken = torch.zeros((n, kept), dtype=torch.int64, device=gains.device).scatter_add(1, partner, wins.long()) > 0
        gains.masked_fill_((found > 0)[:, :, None] | taken[:, None, :], -torch.inf)
    best, order = found.sort(dim=1, descending=True, stable=True)
    return order, partners.gather(1, order), best
