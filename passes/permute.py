"""Put the input channels of N:M sites in an order that lets groups keep more, at no cost when the model runs.

Pool & Yu 2021, "Channel Permutations for N:M Sparsity": weights that share a group compete, and which do is decided by
the order of the input channels. Where the graph shows that the order is free, rows of the producers and columns of the
consumers change places together, and the model computes what it did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, padding
from sparsify_compiler.boundaries import Boundaries
from sparsify_compiler.channels import Channels, Member
from sparsify_compiler.frontends.layout import from_problem
from sparsify_compiler.graph import Graph, MatmulLayout, Observer, Site
from sparsify_compiler.passes.channel_order import order_columns
from sparsify_compiler.pattern import NM, Block
from sparsify_compiler.plan import Decision
from sparsify_compiler.problem import Needs
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.recipe import Rule
from sparsify_compiler.statistics import Moments

MOST_BATCHES = 16
"""Calibration batches that the mean squares are taken over, spread evenly: they settle early."""

MOST_ROWS = 4096
"""Rows of all sites that share channels that are searched over, spread evenly."""

MOST_DIFFERENCE = 1000.0
"""Largest ‖Y − Ŷ‖ / ‖Y‖ after reordering, in units of float32's precision: only sums are rounded in another order.

That is 1.2e-4. Orders of all free channels at once changed SmolLM2-135M by 9e-7 and stories260k by 4e-7; two channels
of one group that did not follow changed the latter by 1.5e-2 at least. Half precision alone rounds that much away, so
that outputs are always compared in float32.
"""


@dataclass(frozen=True)
class Permuted:
    """The decisions, with notes of what was done for each site, and notes on the whole."""

    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Gain:
    """Shares of the importance that N:M groups keep in the order before and now; `sites` share the order."""

    before: float
    now: float
    sites: int

    @property
    def fall(self) -> float:
        """Return by which share less is lost."""
        return (self.now - self.before) / (1 - self.before) if self.before < 1 else 0.0

    def words(self) -> str:
        """Say it in words."""
        shared = f", in one order for {self.sites} sites" if self.sites > 1 else ""
        kept = f"its groups keep {self.now:.1%} of the importance, {self.before:.1%} before"
        return f"input channels reordered: {kept}{shared}"


def permute_channels(
    graph: Graph,
    decisions: Sequence[Decision],
    batches: Sequence[Batch],
    example: Batch,
    sweeps: int,
    progress: Progress = silent,
) -> Permuted:
    """Reorder `graph`, which is dense yet, for the N:M rules of `decisions`: later steps see but another order.

    A weight counts w² · mean x², by how much the output's square would change without it if inputs were uncorrelated
    (Wanda's score, squared), or w² where what a rule keeps depends on no data; as a share of its site's sum. Sites that
    share an order so count alike, whatever their units: by how much of its own outputs, which is the error that the
    report gives, each one loses. The mean squares are the dense model's, in one pass over at most `MOST_BATCHES` of
    `batches`. Reordering is undone, and said so, where the outputs for `example` change by more than rounding.

    Departures from Pool & Yu, who use w²: input statistics, shares, and an order for each head. On real layers
    w² / [G⁻¹] gave a final loss 0.3 % lower than w² · mean x² and would need Gram matrices: it is not offered.

    Given:   %h = silu(linear(%x, %gate)) * linear(%x, %up);  %y = linear(%h, %down)   # %down (576, 1536) 2:4
    Result:  the same with rows of %gate and %up, and columns of %down, in another order

    Raises:
        CalibrationError: a batch does not fit the model, or inputs are not finite.
    """
    ruled = {d.site.name: _Ruled(d.site, d.rule) for d in decisions if d.rule is not None}
    found = graph.channels()
    fixed = {name: found.fixed[name] for name, at in ruled.items() if name in found.fixed and at.grouped}
    chosen: list[Channels] = []
    for channels in found.free:
        names = tuple(name for name in channels.sites if name in ruled and ruled[name].grouped)
        reason = _refusal(channels, [ruled[name] for name in names], list(ruled.values())) if names else None
        if reason is not None:
            fixed.update(dict.fromkeys(names, reason))
        elif names:
            chosen.append(replace(channels, sites=names))
    done: dict[str, Gain] = {}
    if chosen:
        before = _outputs(graph, example)
        squares = _mean_squares(graph, batches, [ruled[name] for channels in chosen for name in channels.sites])
        applied = _reorder(graph, chosen, ruled, squares, sweeps, fixed, done, progress)
        if not (difference := _difference(before, _outputs(graph, example))) <= 1:
            for channels, orders in reversed(applied):
                graph.reorder(channels, orders.argsort(dim=1))
            why = f"reordering changed the model's outputs by {difference:.1f} times what rounding may, and was undone"
            fixed.update(dict.fromkeys(done, why))
            done.clear()
    return _told(decisions, done, fixed)


@dataclass(frozen=True)
class _Ruled:
    """A site and the rule that prunes it."""

    site: Site
    rule: Rule

    @property
    def grouped(self) -> bool:
        """Say whether the order of its inputs decides what may be kept."""
        return isinstance(self.rule.pattern, NM)

    @property
    def reads_data(self) -> bool:
        """Say whether what is kept depends on the inputs."""
        return self.rule.needs is not Needs.NOTHING

    @property
    def input_axis(self) -> int:
        """The axis of the weight's own shape that its inputs lie along."""
        layout = self.site.layout
        return 0 if isinstance(layout, MatmulLayout) and layout.transposed else 1

    def member(self, channels: Channels) -> Member | None:
        """Return the weight's part in `channels`, or None."""
        return next((member for member in channels.members if member.parameter == self.site.parameter), None)

    def slower_inputs(self, channels: Channels) -> bool:
        """Say whether `channels` count its inputs, but not side by side: whole runs of them change places."""
        member = self.member(channels)
        if member is None:
            return False
        start = member.ends[self.input_axis - 1] if self.input_axis else 0
        return any(start <= at < member.ends[self.input_axis] - 1 for at in member.channels)


def _refusal(channels: Channels, readers: Sequence[_Ruled], ruled: Sequence[_Ruled]) -> str | None:
    """Say why an order of `channels` cannot be searched for the N:M sites `readers`, or None."""
    patterns = {str(reader.rule.pattern): reader.rule.pattern for reader in readers}
    if len(patterns) > 1:
        return f"sites of several patterns read them ({', '.join(sorted(patterns))})"
    for other in ruled:
        if isinstance(other.rule.pattern, Block) and other.member(channels) is not None:
            return f"{other.site.name} is pruned in blocks along them"
    (pattern,) = patterns.values()
    assert isinstance(pattern, NM)
    if channels.size <= pattern.of:
        return f"{channels.size} of them are one group of {pattern}"
    if channels.size % pattern.of and any(reader.site.run != channels.size for reader in readers):
        return f"groups of {pattern} cross from one {channels.size} of them into the next"
    return None


def _reorder(
    graph: Graph,
    chosen: Sequence[Channels],
    ruled: Mapping[str, _Ruled],
    squares: Mapping[str, Moments],
    sweeps: int,
    fixed: dict[str, str],
    done: dict[str, Gain],
    progress: Progress,
) -> list[tuple[Channels, Tensor]]:
    """Search and apply one order after another; fill `done`, and `fixed` where one came in another's way."""
    applied: list[tuple[Channels, Tensor]] = []
    stale: set[str] = set()  # sites whose mean squares are in the order before
    for number, channels in enumerate(chosen):
        progress("permute", number, len(chosen))
        if stale.intersection(channels.sites):
            fixed.update(dict.fromkeys(channels.sites, "blocks of them were put in another order before"))
            continue
        scores = _scores(graph, channels, [ruled[name] for name in channels.sites], squares)
        pattern = ruled[channels.sites[0]].rule.pattern
        assert isinstance(pattern, NM)
        found = [order_columns(block, pattern, sweeps) for block in scores]
        orders = torch.stack([block.order for block in found])
        total = float(scores.sum(dtype=torch.float64)) or 1.0
        gain = Gain(sum(f.kept_before for f in found) / total, sum(f.kept for f in found) / total, len(channels.sites))
        done.update(dict.fromkeys(channels.sites, gain))
        graph.reorder(channels, orders)
        applied.append((channels, orders))
        stale |= {name for name, at in ruled.items() if at.slower_inputs(channels)}
    progress("permute", len(chosen), len(chosen))
    return applied


def _scores(graph: Graph, channels: Channels, readers: Sequence[_Ruled], squares: Mapping[str, Moments]) -> Tensor:
    """Return what the readers' weights count, (blocks, rows, size) float32, at most `MOST_ROWS` rows of them all.

    That of every reader has the sum 1.
    """
    parts: list[Tensor] = []
    for reader in readers:
        site, member = reader.site, reader.member(channels)
        assert member is not None
        assert site.layout is not None
        scores = graph.weight(site).square()  # (groups, out, in)
        seen = squares.get(site.reads)
        if seen is not None and seen.tokens and reader.reads_data:
            means = torch.stack([seen.mean_square(group) for group in range(site.groups)])
            scores = scores.to(means.device) * means[:, None].float()
        rows = member.rows(from_problem(scores, site.layout, site.shape), reader.input_axis)
        rows = rows[:, :: -(-rows.shape[1] * len(readers) // MOST_ROWS)]
        rows = rows / rows.sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float32).tiny)
        # Weights may lie on the host while the graph runs elsewhere: one that reads no data is not where means are.
        parts.append(rows.to(parts[0].device) if parts else rows)
    return torch.cat(parts, dim=1)


def _mean_squares(graph: Graph, batches: Sequence[Batch], readers: Sequence[_Ruled]) -> dict[str, Moments]:
    """Take the mean square of every input of the sites, by `Site.reads`, through the dense model."""
    wanted = {
        reader.site.reads: Moments(reader.site.layout, reader.site.groups, reader.site.in_, Needs.NORMS)
        for reader in readers
        if reader.site.layout is not None and reader.reads_data
    }
    names = {reader.site.reads: reader.site.name for reader in readers}
    taken = batches[:: -(-len(batches) // MOST_BATCHES)] if wanted and len(batches) else ()
    hidden = [padding(batch) for batch in taken]
    boundaries = Boundaries(graph, taken)
    last = max((reader.site.segment for reader in readers), default=-1)

    def observer(number: int) -> Observer:
        def observe(key: str, x: Tensor) -> None:
            if key in wanted:
                wanted[key].add(x, names[key], number, hidden[number])

        return observe

    for index in range(last + 1 if len(taken) else 0):
        boundaries.advance(index, observe=observer)
    return wanted


def _outputs(graph: Graph, example: Batch) -> list[Tensor]:
    """Return the model's floating-point outputs for one batch, computed in float32 at least."""
    return [output for output in graph.exact_outputs(example) if output.is_floating_point()]


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest ‖Y − Ŷ‖ / ‖Y‖ of the outputs, in units of what rounding may change."""
    ratios = []
    allowed = MOST_DIFFERENCE * torch.finfo(torch.float32).eps  # float64 outputs may have been made of float32 products
    for old, new in zip(before, after, strict=True):
        scale = float(old.double().norm()) or 1.0
        ratios.append(float((new.double() - old.double()).norm()) / scale / allowed)
    return max(ratios, default=0.0)


def _told(decisions: Sequence[Decision], done: Mapping[str, Gain], fixed: Mapping[str, str]) -> Permuted:
    """Note at every site what was done, and sum it up."""
    notes = {name: f"its input channels stay in order: {reason}" for name, reason in fixed.items()}
    notes.update({name: gain.words() for name, gain in done.items()})
    marked = tuple(replace(d, notes=(*d.notes, notes[d.site.name])) if d.site.name in notes else d for d in decisions)
    if done:
        falls = sorted(gain.fall for gain in done.values())
        share = f"{falls[0]:.0%} to {falls[-1]:.0%}"
        text = f"{len(done)} of {len(notes)} N:M sites read their inputs in another order: they lose {share} less"
        return Permuted(marked, (f"permute: {text} importance by the estimate",))
    reasons = "; ".join(sorted(set(fixed.values()))) or "no site has an N:M pattern"
    return Permuted(marked, (f"permute: no channels were put in another order ({reasons})",))
