"""The search for swaps: in every round a shortlist of tiles a lane, and among them the best swap after the best."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.device_memory import work_bytes
from sparsify_compiler.passes.prune.exchange import Tableau, blocks_of, columns_of, exchange, rows_at
from sparsify_compiler.passes.prune.kept import factor_kept, require_factors
from sparsify_compiler.passes.prune.quadratic import DampedQuadratic
from sparsify_compiler.passes.prune.swap_gains import swap_gains

CPU_BYTES = 1 << 27
"""Bytes worked on at once, `work_bytes` on a GPU, in whole lanes; at least one lane is."""

WIDE, SHORT, LEAST = 128, 48, 8
"""Removed columns whose swaps a round weighs against every kept one, and columns of each kind among which it swaps.

At least `LEAST` tiles, however wide. With all of SmolLM2's columns in the first list losses differ by 0.1 %."""


@dataclass(frozen=True)
class Found:
    """`keep` (lanes, tiles) bool after all swaps, and the weights (lanes, rows, in) float64 `before` and `after` them.

    Both are optimal on their masks for the damped quadratic. `swaps` (lanes,) int64 counts the tiles that changed in
    every round; `rounds` is the most that a lane used.
    """

    keep: Tensor
    before: Tensor
    after: Tensor
    swaps: Tensor
    rounds: int


@dataclass
class _Lanes:
    """Some lanes: `slots` (n, K) int64 hold the kept tiles where `valid` (n, K) bool, else any; the last is not valid.

    `inverse` (n, K * cols, K * cols) is (G_QQ)⁻¹ on the valid slots; `weight` and `moment` are (n, rows, in). `seen`
    (n,) int64 counts the most promising removed tiles of which none was worth a swap, as the mask now is.
    """

    numbers: Tensor
    slots: Tensor
    valid: Tensor
    inverse: Tensor
    weight: Tensor
    moment: Tensor
    seen: Tensor

    def keep(self, tiles: int) -> Tensor:
        """Return the keep mask (n, tiles)."""
        kept = torch.zeros((len(self.slots), tiles), dtype=torch.int64, device=self.slots.device)
        return kept.scatter_add(1, self.slots, self.valid.long()) > 0

    def where(self, chosen: Tensor) -> "_Lanes":
        """Return the lanes that `chosen` (n,) bool marks."""
        return self if bool(chosen.all()) else _Lanes(*(part[chosen] for part in vars(self).values()))


@dataclass(frozen=True)
class _Shortlist:
    """Removed tiles `back` (n, R) with their `images` A_J (n, R * cols, Q), and the `slots` (n, K) of kept ones.

    `matrix` and `constant` are the tableau over both, kept ones first; `allowed` (n, R, K) marks the swaps that may be
    made, those which gain more than `least` (n,); `more` (n,) bool says that tiles not on the list may be worth it too.
    """

    back: Tensor
    images: Tensor
    slots: Tensor
    matrix: Tensor
    constant: Tensor
    allowed: Tensor
    least: Tensor
    more: Tensor


@dataclass(frozen=True)
class Search:
    """What stays the same while masks change.

    Tiles are `rows` x `cols`; `groups` (tiles,) int64 confines swaps to one group. A lane swaps in at most `rounds`
    rounds, and while a swap gains more than the share `least_gain` of what the lane has lost.
    """

    quadratic: DampedQuadratic
    rows: int
    cols: int
    groups: Tensor | None
    rounds: int
    least_gain: float

    def run(self, keep: Tensor) -> Found:
        """Search from `keep` (lanes, tiles) bool."""
        counts, tiles = keep.sum(dim=1), keep.shape[1]
        after = self.quadratic.start.view(len(keep), self.rows, -1) * (counts == tiles)[:, None, None]
        before, keep, swaps, used = after.clone(), keep.clone(), torch.zeros_like(counts), 0
        # Lanes that keep about as much come together: the widest sets the size of a chunk.
        order = counts.sort(stable=True).indices
        order = order[((counts > 0) & (counts < tiles))[order]]
        chunk = self._chunk(int(counts.max()), keep.device)
        for first in range(0, len(order), chunk):
            numbers = order[first : first + chunk]
            lanes = self._begin(keep[numbers], numbers)
            before[numbers] = lanes.weight
            for round_ in range(self.rounds):
                if not len(lanes.numbers):
                    break
                used = max(used, round_ + 1)
                made, more = self._round(lanes)
                swaps[lanes.numbers] += made
                keep[lanes.numbers] = lanes.keep(tiles)
                after[lanes.numbers] = lanes.weight
                lanes = lanes.where(more)
        return Found(keep, before, after, swaps, used)

    def _chunk(self, most: int, device: torch.device) -> int:
        cols, kept = self.cols, (most + 1) * self.cols
        wide, short = self._wide() * cols, max(SHORT, LEAST * cols)
        pairs = kept * wide * max(1, self.rows // cols)  # tiles hold rows x columns of residuals for every pair
        each = 8 * (2 * kept * kept + 4 * pairs + 8 * short * short)
        return max(work_bytes(device, CPU_BYTES) // each, 1)

    def _wide(self) -> int:
        return max(WIDE // self.cols, LEAST)

    def _begin(self, keep: Tensor, numbers: Tensor) -> _Lanes:
        cols, most = self.cols, int(keep.sum(dim=1).max()) + 1
        entries = keep.repeat_interleave(cols, 1)
        part = require_factors(factor_kept(self.quadratic.matrix, entries, numbers, most * cols))
        slots, valid = part.columns[:, ::cols] // cols, part.valid[:, ::cols].contiguous()
        moment = self.quadratic.moment.view(-1, self.rows, keep.shape[1] * cols)[numbers]
        lanes = _Lanes(numbers, slots, valid, torch.cholesky_inverse(part.lower), moment, moment, 0 * numbers)
        self._solve(lanes)
        return lanes

    def _solve(self, lanes: _Lanes) -> None:
        """Set the weights to M b_Q, and once more for what rounding left of b − G w."""
        at = columns_of(lanes.slots, self.cols)[:, None].expand(-1, self.rows, -1)
        valid = lanes.valid.repeat_interleave(self.cols, 1)[:, None]
        weight, residual = torch.zeros_like(lanes.moment), lanes.moment
        for _ in range(2):
            weight.scatter_add_(2, at, (residual.gather(2, at) * valid) @ lanes.inverse * valid)
            residual = lanes.moment - weight @ self.quadratic.matrix
        lanes.weight = weight

    def _round(self, lanes: _Lanes) -> tuple[Tensor, Tensor]:
        """Swap in `lanes`, changing them: how many tiles changed (n,) int64, and whether more may (n,) bool."""
        short = self._shortlist(lanes)
        kept, removed = short.slots.shape[1], short.back.shape[1]
        held = torch.arange(kept + removed, device=short.slots.device).repeat(len(short.slots), 1)
        tableau = Tableau(short.matrix.clone(), short.constant, kept, self.cols, held)
        active = torch.ones_like(short.least, dtype=torch.bool)
        for _ in range(kept):
            gains = tableau.gains().masked_fill_(~short.allowed, -torch.inf).flatten(1)
            pair = gains.argmax(dim=1)  # the first of equals
            active &= gains.gather(1, pair[:, None])[:, 0] > short.least
            if not bool(active.any()):
                break
            tableau.swap(pair // kept, pair % kept, active)
        made = (tableau.held[:, :kept] >= kept).sum(dim=1)
        if most := int(made.max()):
            beyond = kept + removed
            gone = tableau.held[:, kept:].masked_fill(tableau.held[:, kept:] >= kept, beyond).sort(dim=1).values
            come = tableau.held[:, :kept].masked_fill(tableau.held[:, :kept] < kept, beyond).sort(dim=1).values
            self._exchange(lanes, short, gone[:, :most], come[:, :most] - kept)
        lanes.seen = torch.where(made > 0, 0, lanes.seen + self._wide())
        return made, (made > 0) | short.more

    def _shortlist(self, lanes: _Lanes) -> _Shortlist:
        """Choose the removed tiles that can gain most, and the kept ones that gain most by going for one of them."""
        matrix, cols = self.quadratic.matrix, self.cols
        residual = lanes.moment - lanes.weight @ matrix
        start = self.quadratic.start.view(-1, *lanes.weight.shape[1:])[lanes.numbers]
        least = self.least_gain * ((start - lanes.weight) * lanes.moment).sum(dim=(1, 2))
        back, free, more = self._promising(lanes, residual, least)
        inside, valid = columns_of(lanes.slots, cols), lanes.valid.repeat_interleave(cols, 1)
        outside = columns_of(back, cols)
        cross = matrix[outside[:, :, None], inside[:, None, :]].mul_(valid[:, None])
        cross.mul_(free.repeat_interleave(cols, 1)[:, :, None])
        images = cross @ lanes.inverse
        by_tile = outside.view(*back.shape, cols)
        own = matrix[by_tile[:, :, :, None], by_tile[:, :, None, :]]
        own -= images.view(*back.shape, cols, -1) @ cross.view(*back.shape, cols, -1).mT
        weight = rows_at(lanes.weight.mT, inside) * valid[:, :, None]
        slope = rows_at(residual.mT, outside)
        gains = swap_gains(blocks_of(lanes.inverse, cols), images, own, weight, slope)
        allowed = free[:, :, None] & lanes.valid[:, None, :]
        if self.groups is not None:
            allowed &= self.groups[back][:, :, None] == self.groups[lanes.slots][:, None, :]
        gains.masked_fill_(~allowed, -torch.inf)
        few = max(SHORT // cols, LEAST)
        best = gains.amax(dim=2).sort(dim=1, descending=True, stable=True).indices[:, :few]
        gains, allowed, at = rows_at(gains, best), rows_at(allowed, best), columns_of(best, cols)
        slots = gains.amax(dim=1).sort(dim=1, descending=True, stable=True).indices[:, :few]
        chosen, images = columns_of(slots, cols), rows_at(images, at)
        schur = self._schur(outside.gather(1, at), images, rows_at(cross, at), free.gather(1, best))
        inner = rows_at(rows_at(lanes.inverse, chosen).mT, chosen)
        beside = rows_at(images.mT, chosen)  # (n, K cols, R cols)
        tableau = torch.cat((torch.cat((inner, -beside), dim=2), torch.cat((beside.mT, schur), dim=2)), dim=1)
        constant = torch.cat((rows_at(weight, chosen), -rows_at(slope, at)), dim=1)
        allowed = rows_at(allowed.mT, slots).mT
        return _Shortlist(back.gather(1, best), images, slots, tableau, constant, allowed, least, more)

    def _schur(self, columns: Tensor, images: Tensor, cross: Tensor, free: Tensor) -> Tensor:
        """Return Z = G_JJ − A_J G_QJ on `columns` (n, m), the identity's where tiles are not `free` (n, R) to come."""
        schur = self.quadratic.matrix[columns[:, :, None], columns[:, None, :]] - images @ cross.mT
        there = free.repeat_interleave(self.cols, 1)
        schur.mul_(there[:, :, None]).mul_(there[:, None, :])
        schur.diagonal(dim1=1, dim2=2).add_(~there)
        return schur

    def _promising(self, lanes: _Lanes, residual: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the removed tiles (n, R) that could gain most, the `seen` ones left out.

        The second (n, R) bool marks those that exist, the third (n,) bool where the next may gain more than `least`.
        No swap that puts J in gains more than r_Jᵀ Z_J⁻¹ r_J, and Z_J⁻¹ is at most (G⁻¹)_JJ.
        """
        blocks = blocks_of(self.quadratic.inverse[None], self.cols)[0]
        split = residual.view(len(residual), self.rows, -1, self.cols)
        bound = torch.einsum("nrtc,tcd,nrtd->nt", split, blocks, split)
        bound = bound.masked_fill(lanes.keep(bound.shape[1]), -torch.inf)
        bound, tiles = bound.sort(dim=1, descending=True, stable=True)
        beyond = torch.full_like(bound[:, :1], -torch.inf)
        wide = min(self._wide(), bound.shape[1])
        rank = (lanes.seen[:, None] + torch.arange(wide + 1, device=bound.device)).clamp_max(bound.shape[1])
        reach = torch.cat((bound, beyond), dim=1).gather(1, rank)
        return (
            tiles.gather(1, rank[:, :wide].clamp_max(bound.shape[1] - 1)),
            reach[:, :wide] > -torch.inf,
            reach[:, wide] > least,
        )

    def _exchange(self, lanes: _Lanes, short: _Shortlist, gone: Tensor, come: Tensor) -> None:
        """Take the shortlist's kept tiles `gone` (n, k) out of `lanes` and put its removed tiles `come` (n, k) in.

        Numbers beyond the lists stand for no swap, which ends in the last slot.
        """
        cols, kept, last = self.cols, short.slots.shape[1], lanes.slots.shape[1] - 1
        real = gone < kept
        gone, come = gone.clamp_max(kept - 1), come.clamp_max(short.back.shape[1] - 1)
        slots = short.slots.gather(1, gone).masked_fill(~real, last)
        at, valid = (
            columns_of(torch.cat((gone, come + kept), dim=1), cols),
            real.repeat(1, 2).repeat_interleave(cols, 1),
        )
        images = rows_at(short.images, columns_of(come, cols)) * real.repeat_interleave(cols, 1)[:, :, None]
        block = rows_at(rows_at(short.matrix, at).mT, at).mT * (valid[:, :, None] & valid[:, None, :])
        block.diagonal(dim1=1, dim2=2).add_(~valid)
        exchange(lanes.inverse, images, block, columns_of(slots, cols))
        for view in (lanes.inverse[:, last * cols :], lanes.inverse.mT[:, last * cols :]):
            view.zero_()
        lanes.inverse[:, last * cols :, last * cols :].diagonal(dim1=1, dim2=2).fill_(1.0)
        lanes.slots.scatter_(1, slots, torch.where(real, short.back.gather(1, come), lanes.slots[:, last:]))
        self._solve(lanes)
