"""Practical I-OBS over a network: prune front to back again and again, each round from the dense weights.

Wu et al. 2024 (I-OBS, arXiv 2408.17163), Alg. 2: every round takes a new batch, new Gram matrices through the network
as it is pruned by then, and a new mask; one round is the one-shot method itself. Departures: later rounds are measured
against the dense model's outputs (`Targets`), and the round is chosen on held-out data.

The trap: on one fixed input X with the dense outputs as targets, the full Newton step from any weight ends at the same
point, the least-squares optimum, so a round on the layer quadratic returns what the round before returned. Iterating
changes something only through what differs between two rounds: the batch, the inputs through the newly pruned prefix
(within a segment too: the first round's statistics there are of dense sites), a method that takes part of the step from
`LayerProblem.start`, a method that does not find the optimum, the gradient of the model's own loss at the pruned
weights (`Expand`), or tuning in between (`Tune`). So every `Round` says what differed, and rounds end where nothing
did.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint, digest
from sparsify_compiler.errors import DataError
from sparsify_compiler.graph import Graph, Site
from sparsify_compiler.passes.prune.expand import Expand
from sparsify_compiler.passes.prune.layerwise import SiteOutcome, prune_layerwise
from sparsify_compiler.plan import Decision
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.refinement import Refine

Measure = Callable[[Mapping[str, Tensor]], float]
"""The held-out loss of the graph as it is now, lower is better; given the dense weights (groups, out, in) by site."""

Tune = Callable[[Sequence[Batch], Mapping[str, Tensor], Mapping[str, Tensor]], tuple[str, ...]]
"""Called as tune(batches, dense weights, masks) after every round but the last: changes the graph, returns notes."""


@dataclass(frozen=True)
class Round:
    """What one round did.

    `number` counts from 1; `part` of `parts` (both from 1) is the set of calibration batches it took, of `batches`
    batches. `error` is the sum of the sites' relative errors on those batches, None without Gram matrices: against the
    layer's own inputs in the first round, against the dense model's in later ones. `heldout` is the held-out loss after
    it; `changed` the share of mask entries that differ from the round before and `moved` the number of sites whose
    weight does (None in the first round). `differed` names what the round's problems had that those of the round before
    had not: "batches", "prefix" (weights before a site), "Gram", in the second round "targets", and the "gradient" of
    the model's own loss or "fine-tuning" in between where there were such.
    """

    number: int
    part: int
    parts: int
    batches: int
    error: float | None
    heldout: float
    changed: float | None
    moved: int | None
    differed: tuple[str, ...]


@dataclass(frozen=True)
class Rounds:
    """Every round, and the outcome of every pruned site in round number `best`, whose weights the graph now has.

    `starved` names sites that no token reached in any round up to the best: they are dense.
    """

    sites: Mapping[str, SiteOutcome]
    rounds: tuple[Round, ...]
    best: int
    starved: tuple[str, ...]
    notes: tuple[str, ...]


def prune_in_rounds(
    graph: Graph,
    sets: Sequence[Sequence[Batch]],
    decisions: Sequence[Decision],
    count: int,
    measure: Measure,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
    expand: Expand | None = None,
    tune: Tune | None = None,
    refine: Refine | None = None,
) -> Rounds:
    """Prune `graph` `count` times and leave it with the weights of the round whose held-out loss is lowest.

    Round t takes `sets[t - 1]`, or the only set where there is but one. The first is `prune_layerwise` bit for bit.
    Later ones start from the dense weights with free masks, have `Targets` (the dense model's outputs on their own
    tokens) and the weight of the round before as `start`; a site that no token of a round's set reaches keeps the
    weight it has. Of equal losses the earlier round wins. On the host this holds the dense weights and the best
    round's, both float32, whatever `count` is. A `checkpoint` keeps every round's segments, and neither expansions nor
    tuned weights: a resumed run makes them again. `expand` is called before every round, `tune` between rounds.

    Given:   %y = linear(%x, weight=%w1)     # %w1 from the round before; dense %w and its outputs are remembered
    Result:  %y = linear(%x, weight=%w2)     # %w2 has exact zeros, perhaps elsewhere

    Raises:
        DataError: `count` below 1, or neither one set nor one a round.
        CalibrationError, SingularGramError, PatternError: as `prune_layerwise`.
    """
    if count < 1 or len(sets) not in (1, count):
        raise DataError(f"{count} rounds on {len(sets)} sets of calibration batches: give one set, or one a round")
    sites = [decision.site for decision in decisions if decision.rule is not None]
    state = _State(graph, sites)
    notes: list[str] = []
    for number in range(1, count + 1):
        batches = sets[min(number, len(sets)) - 1]
        expansions = expand(batches, state.dense) if expand is not None else None
        walk = Walk(
            graph,
            batches,
            decisions,
            checkpoint.of_round(number) if checkpoint is not None else None,
            _within(progress, number, count),
            dense_targets=number > 1,
            dense_weights=state.dense if number > 1 else None,
            refine=refine,
        )
        outcomes = prune_layerwise(walk, expansions)
        notes += (note for note in walk.notes if note not in notes)
        state.add(len(sets), len(walk.batches), outcomes, measure(state.dense), expansions is not None)
        if number < count and state.settled():
            notes.append(_fixed_point(number, count))
            break
        if tune is not None and number < count:
            notes += tune(batches, state.dense, state.keep())
            state.tuned = True
    state.restore()
    starved = tuple(site.name for site in sites if site.name not in state.best_sites)
    return Rounds(state.best_sites, tuple(state.rounds), state.best, starved, tuple(notes))


def _fixed_point(number: int, count: int) -> str:
    return (
        f"rounds: round {number} of {count} left every weight as it was, on the same batches and through the same "
        "prefix: a fixed point, later rounds would return the same; give every round batches of its own"
    )


class _State:
    """What goes from round to round."""

    def __init__(self, graph: Graph, sites: Sequence[Site]) -> None:
        self._graph = graph
        self._sites = sites
        self._several = len({site.segment for site in sites}) < len(sites)
        self.dense = {site.name: graph.weight(site).cpu() for site in sites}
        self.rounds: list[Round] = []
        self.tuned = False
        self.best = 0
        self.best_sites: dict[str, SiteOutcome] = {}
        self._best_weights: dict[str, Tensor] = {}
        self._latest: dict[str, SiteOutcome] = {}
        self._digests: dict[str, str] = {}

    def keep(self) -> dict[str, Tensor]:
        """Return every pruned site's mask of the latest round that reached it."""
        return {name: outcome.keep for name, outcome in self._latest.items()}

    def add(
        self, parts: int, batches: int, outcomes: Mapping[str, SiteOutcome], heldout: float, expanded: bool
    ) -> None:
        """Take the outcome of a round that just ended, and keep its weights where it is the best so far."""
        number = len(self.rounds) + 1
        digests = {site.name: digest((self._graph.weight(site),)) for site in self._sites}
        moved = sum(digests[name] != old for name, old in self._digests.items()) if self.rounds else None
        errors = [outcome.relative_error for outcome in outcomes.values()]
        self.rounds.append(
            Round(
                number=number,
                part=min(number, parts),
                parts=parts,
                batches=batches,
                error=None if None in errors else sum(error for error in errors if error is not None),
                heldout=heldout,
                changed=_changed(self._latest, outcomes) if self.rounds else None,
                moved=moved,
                differed=self._differed(parts, moved, expanded),
            )
        )
        self._latest.update(outcomes)
        self._digests = digests
        if not self.best or heldout < self.rounds[self.best - 1].heldout:
            self.best, self.best_sites = number, dict(self._latest)
            self._best_weights.clear()  # before the new copy is made
            self._best_weights = {site.name: self._graph.weight(site).cpu() for site in self._sites}

    def settled(self) -> bool:
        """Say whether the next round would see and return what the last one did."""
        return self.rounds[-1].parts == 1 and self.rounds[-1].moved == 0 and not self.tuned

    def restore(self) -> None:
        """Put the best round's weights into the graph."""
        if self.best < len(self.rounds):
            for site in self._sites:
                self._graph.set_weight(site, self._best_weights[site.name])

    def _differed(self, parts: int, moved: int | None, expanded: bool) -> tuple[str, ...]:
        """Name what the statistics of the round just ended have that those of the one before had not."""
        if moved is None:
            return ()
        before = self.rounds[-1].moved  # None: sites of one segment saw each other dense in the first round
        prefix = moved > 0 or self.tuned or (self._several and before != 0)
        found = {
            "batches": parts > 1,
            "prefix": prefix,
            "Gram": parts > 1 or prefix,
            "targets": len(self.rounds) == 1,
            "gradient": expanded and (parts > 1 or self.tuned or before != 0),
            "fine-tuning": self.tuned,
        }
        return tuple(name for name, different in found.items() if different)


def _changed(before: Mapping[str, SiteOutcome], after: Mapping[str, SiteOutcome]) -> float:
    """Return the share of mask entries that differ, over the sites that both rounds pruned."""
    both = [(before[name].keep, outcome.keep) for name, outcome in after.items() if name in before]
    return sum(int((old != new).sum()) for old, new in both) / max(sum(new.numel() for _, new in both), 1)


def _within(progress: Progress, number: int, count: int) -> Progress:
    """Say of every stage which round it is in."""
    if count == 1:
        return progress
    return lambda stage, done, total: progress(f"round {number} of {count}: {stage}", done, total)
