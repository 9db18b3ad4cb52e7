"""Greedy optimal brain surgery, batched: remove tile after tile from many rows at once, and remember the order.

Frantar & Alistarh 2022, "Optimal Brain Compression", section 4 and Alg. 1. A *lane* is a set of rows that lose the same
inputs, so that one inverse serves all of them: one row, or the rows of a tile. Removing the inputs T from a lane with
inverse P and weights w (rows, in) costs Σ over rows w_T P_TT⁻¹ w_Tᵀ; the survivors become w − w_T P_TT⁻¹ P_T: and
P − P_:T P_TT⁻¹ P_T:.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.errors import SingularGramError

PANEL = 32
"""Columns whose downdates of the inverse are put off and then done as one product, which keeps them in the caches."""

CPU_BYTES = 1 << 25
"""Bytes of inverses worked on at once, near the caches of a CPU; `work_bytes` on a GPU. Peak use is fourfold."""

SINGLE = 256
"""Above this many inputs, single columns keep their inverse in float32: half the traffic, which sets the speed."""


@dataclass(frozen=True)
class Trace:
    """What greedy removal did to every lane: one run holds every sparsity.

    `order` (lanes, steps) int64 is the tile removed at each step, `increments` (lanes, steps) float64 what that added
    to the damped loss ((W − Ŵ)(G + ridge I)(W − Ŵ)ᵀ per row, summed over the lane's rows). `tiles` counts the tiles.
    """

    order: Tensor
    increments: Tensor
    tiles: int

    def keep(self, counts: Tensor) -> Tensor:
        """Return the keep mask (lanes, tiles) after the first `counts` (lanes,) removals of every lane."""
        lanes, steps = self.order.shape
        gone = torch.arange(steps, device=counts.device) < counts[:, None]  # (lanes, steps)
        keep = torch.ones(lanes, self.tiles, dtype=torch.bool, device=counts.device)
        return keep.scatter(1, self.order, ~gone)

    def counts(self, total: int) -> Tensor:
        """Split `total` removals over the lanes, (lanes,) int64: the cheapest next removal of any lane each time.

        A lane's increments need not rise (removing one of two opposed weights makes the other cheap), but its steps
        must come in order. Sorting their running maxima gives just that: once a dear step is paid for, the cheaper ones
        behind it follow at once. Among equal costs the lanes of highest index lose first.
        """
        lanes, steps = self.order.shape
        keys = self.increments.cummax(dim=1).values.flip(0).reshape(-1)
        chosen = keys.sort(stable=True).indices[:total] // max(steps, 1)
        return torch.bincount(chosen, minlength=lanes).flip(0)


@dataclass(frozen=True)
class Quotas:
    """Groups of tiles of which only so many may go: `group` (tiles,) int64, `most` (groups,) int64."""

    group: Tensor
    most: Tensor


def eliminate(inverse: Tensor, weight: Tensor, cols: int, steps: int, quotas: Quotas | None = None) -> Trace:
    """Remove `steps` tiles of `cols` columns from every lane, at each step the one that costs least.

    `inverse` (in, in) float64 is that of the damped Gram scaled to a unit diagonal, `weight` (lanes, rows, in) float64
    is in the same units. Of equal costs the highest index goes, except that tiles of zero weight go before others.
    Weights, costs and the diagonal blocks of the inverse are float64; the inverse itself is float32 above `SINGLE`
    inputs for single columns. Memory: four times `CPU_BYTES` (`work_bytes` on a GPU), at least four
    inverses.

    Raises:
        SingularGramError: rounding made the inverse of a tile indefinite, as it can where that of G nearly is singular.
    """
    lanes, _, in_ = weight.shape
    wide = cols > 1 or in_ <= SINGLE
    start = inverse.to(torch.float64 if wide else torch.float32)
    budget = work_bytes(weight.device, CPU_BYTES)
    chunk = max(budget // (start.element_size() * in_ * in_), 1)
    parts = [
        _eliminate(start, inverse, weight[first : first + chunk], cols, steps, quotas)
        for first in range(0, lanes, chunk)
    ]
    order, increments = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Trace(order, increments, in_ // cols)


@dataclass
class _Lanes:
    """The state of a chunk, over the tiles that were left when it was last shortened: n of them, `cols` wide."""

    inverse: Tensor  # (lanes, n * cols, n * cols), without the downdates of `panel`
    weight: Tensor  # (lanes, rows, n * cols) float64
    blocks: Tensor  # (lanes, n, cols, cols) float64: the diagonal blocks of the inverse, downdated
    tiles: Tensor  # (lanes, n) int64: which tile this is
    barrier: Tensor  # (lanes, n) float64: 0, or infinity for what may not go (any more)
    gone: Tensor  # (lanes, n) bool
    panel: Tensor  # (lanes, used, n * cols): the downdates still to do are panelᵀ panel
    failed: Tensor  # () bool: a block lost its definiteness to rounding; looked at once a panel, as a GPU waits for it
    used: int = 0


def _eliminate(
    start: Tensor, inverse: Tensor, weight: Tensor, cols: int, steps: int, quotas: Quotas | None
) -> tuple[Tensor, Tensor]:
    lanes = len(weight)
    state = _begin(start, inverse, weight, cols)
    order = torch.empty(lanes, steps, dtype=torch.int64, device=weight.device)
    increments = torch.empty(lanes, steps, dtype=torch.float64, device=weight.device)
    left = quotas.most.expand(lanes, -1).clone() if quotas else None
    if quotas and left is not None:
        state.barrier.masked_fill_(left[:, quotas.group].gather(1, state.tiles) == 0, torch.inf)
    for step in range(steps):
        factor, share = _shares(state, cols)
        # argmin returns the first of equals, and tiles are listed from the highest index down.
        chosen = share.square().sum(dim=(2, 3)).add_(state.barrier).argmin(dim=1, keepdim=True)  # (lanes, 1)
        tile = state.tiles.gather(1, chosen)
        order[:, step : step + 1] = tile
        increments[:, step] = _remove(state, chosen, factor, share, cols)
        if quotas and left is not None:
            group = quotas.group[tile]  # (lanes, 1)
            left.scatter_add_(1, group, torch.full_like(group, -1))
            full = (quotas.group[state.tiles] == group) & (left.gather(1, group) == 0)
            state.barrier.masked_fill_(full, torch.inf)
        if state.used + cols > state.panel.shape[1] and step + 1 < steps:
            _shorten(state, cols)
    _require_definite(state)
    return order, increments


def _begin(start: Tensor, inverse: Tensor, weight: Tensor, cols: int) -> _Lanes:
    lanes, _, in_ = weight.shape
    n, device = in_ // cols, weight.device
    tiles = torch.arange(n - 1, -1, -1, device=device).expand(lanes, n).contiguous()
    columns = _columns(tiles[:1], cols)[0]
    ordered = inverse[columns][:, columns]
    blocks = ordered.reshape(n, cols, n, cols).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return _Lanes(
        inverse=start[columns][:, columns].expand(lanes, in_, in_).contiguous(),
        weight=weight[:, :, columns].clone(),
        blocks=blocks.expand(lanes, n, cols, cols).clone(),
        tiles=tiles,
        barrier=torch.zeros(lanes, n, dtype=torch.float64, device=device),
        gone=torch.zeros(lanes, n, dtype=torch.bool, device=device),
        panel=torch.empty(lanes, max(PANEL // cols, 1) * cols, in_, dtype=start.dtype, device=device),
        failed=torch.zeros((), dtype=torch.bool, device=device),
    )


def _columns(tiles: Tensor, cols: int) -> Tensor:
    """Return the columns (lanes, n * cols) of tiles (lanes, n)."""
    inside = torch.arange(cols, device=tiles.device)
    return (tiles[:, :, None] * cols + inside).flatten(1)


def _shares(state: _Lanes, cols: int) -> tuple[Tensor, Tensor]:
    """Return C (lanes, n, cols, cols) lower with C Cᵀ = P_TT, and C⁻¹ w_Tᵀ (lanes, n, cols, rows): its squares cost."""
    lanes, rows, _ = state.weight.shape
    split = state.weight.reshape(lanes, rows, -1, cols).permute(0, 2, 3, 1)
    if cols == 1:
        # A unit diagonal of the damped Gram makes every Schur complement at least 1: less is rounding.
        factor = state.blocks.clamp_min(1.0).sqrt()
        return factor, split / factor
    # Removed tiles hold rounding only; the barrier keeps them out, and the identity lets the factorisation pass.
    identity = torch.eye(cols, dtype=torch.float64, device=split.device)
    factor, failed = torch.linalg.cholesky_ex(torch.where(state.gone[:, :, None, None], identity, state.blocks))
    state.failed |= (failed > 0).any()
    return factor, torch.linalg.solve_triangular(factor, split, upper=False)


def _remove(state: _Lanes, chosen: Tensor, factor: Tensor, share: Tensor, cols: int) -> Tensor:
    """Remove tile `chosen` (lanes, 1) from every lane; return what that costs (lanes,) float64."""
    lanes, _, width = state.weight.shape
    n = width // cols
    where = (torch.arange(lanes, device=chosen.device) * n + chosen[:, 0]).contiguous()
    pending = state.inverse.view(lanes * n, cols, width).index_select(0, where)
    if state.used:
        panel = state.panel[:, : state.used, :width]
        inside = _columns(chosen, cols)[:, None, :].expand(lanes, state.used, cols)
        pending.baddbmm_(panel.gather(2, inside).transpose(1, 2), panel, alpha=-1)
    lower = factor.view(lanes * n, cols, cols).index_select(0, where)
    part = share.reshape(lanes * n, cols, -1).index_select(0, where)  # (lanes, cols, rows)
    if cols == 1:
        line = pending.double() / lower  # (lanes, cols, width)
        state.blocks.view(lanes, 1, n).addcmul_(line, line, value=-1)
    else:
        line = torch.linalg.solve_triangular(lower, pending.double(), upper=False)
        by_tile = line.view(lanes, cols, n, cols)
        state.blocks.sub_(torch.einsum("lktc,lktd->ltcd", by_tile, by_tile))
    state.weight.baddbmm_(part.transpose(1, 2), line, alpha=-1)
    state.barrier.scatter_(1, chosen, torch.inf)
    state.gone.scatter_(1, chosen, True)
    state.panel[:, state.used : state.used + cols, :width] = line
    state.used += cols
    return part.square().sum(dim=(1, 2))


def _shorten(state: _Lanes, cols: int) -> None:
    """Do the downdates that were put off and drop the removed tiles: as many in every lane."""
    _require_definite(state)  # costs that are not a number would choose a tile that is gone
    lanes = len(state.gone)
    left = (~state.gone).nonzero()[:, 1].view(lanes, -1)
    columns = _columns(left, cols)
    width, shorter = state.inverse.shape[2], columns.shape[1]
    start = torch.arange(lanes, device=columns.device)[:, None] * width
    rows = state.inverse.view(lanes * width, width).index_select(0, (start + columns).view(-1))
    panel = state.panel[:, : state.used, :width].gather(2, columns[:, None].expand(-1, state.used, -1))
    across = columns[:, None].expand(-1, shorter, -1)
    state.inverse = rows.view(lanes, shorter, width).gather(2, across).baddbmm_(panel.transpose(1, 2), panel, alpha=-1)
    state.weight = state.weight.gather(2, columns[:, None].expand(-1, state.weight.shape[1], -1))
    state.blocks = state.blocks.gather(1, left[:, :, None, None].expand(-1, -1, cols, cols))
    state.tiles, state.barrier = state.tiles.gather(1, left), state.barrier.gather(1, left)
    state.gone = torch.zeros_like(state.tiles, dtype=torch.bool)
    state.used = 0


def _require_definite(state: _Lanes) -> None:
    if bool(state.failed):
        raise SingularGramError("the curvature is not positive definite up to rounding; raise damp")
