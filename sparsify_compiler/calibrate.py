"""Walk a graph front to back: gather statistics of a segment through the pruned prefix, hand out its problems, go on.

Statistics of a segment are taken before any of its sites is pruned, as SparseGPT's and ALPS's own drivers do. Only
the values alive between two segments are kept per batch, on the host.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.checkpoint import Checkpoint, SavedSite
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import Graph, Site, Values
from sparsify_compiler.plan import Decision
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs, Targets
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.recipe import Rule
from sparsify_compiler.statistics import Moments, size_bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes the walk will hold: statistics of the largest segment, and boundary activations of all batches."""

    statistics_bytes: int
    boundary_bytes: int


@dataclass
class Walk:
    """One front-to-back walk; a `problem.ModelProblem` for the sites that `decisions` prunes.

    Iterate over `layers()` and `accept` one solution for every problem before asking for the next segment's first.
    `tokens` counts the rows each site saw; `starved` names sites that saw none: they are left dense. `finished` holds
    every pruned site, solved now or restored from the checkpoint.
    With `dense_targets` the dense model is walked alongside and problems carry `Targets`.
    """

    graph: Graph
    batches: Sequence[Batch]
    decisions: Sequence[Decision]
    checkpoint: Checkpoint | None = None
    progress: Progress = silent
    dense_targets: bool = False
    tokens: dict[str, int] = field(default_factory=dict)
    starved: list[str] = field(default_factory=list)
    finished: dict[str, SavedSite] = field(default_factory=dict)
    _pending: dict[str, dict[int, LayerSolution]] = field(default_factory=dict)
    _records: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chosen = {d.site.name: (d.site, d.rule) for d in self.decisions if d.rule is not None}
        self._dense: dict[str, Tensor] = {}
        self._dense_boundaries: list[Values] | None = None

    def layers(self) -> Iterator[LayerProblem]:
        """Yield every problem front to back; a site with groups yields one a group, `Site.problem_names` in order."""
        boundaries = [self._host(self.graph.enter(batch)) for batch in self.batches]
        if self.dense_targets:
            self._dense_boundaries = list(boundaries)
        last = max((site.segment for site, _ in self._chosen.values()), default=-1)
        for segment in self.graph.segments[: last + 1]:
            sites = [self._chosen[name] for name in segment.sites if name in self._chosen]
            stage = f"prune {segment.name}"
            self.progress(stage, segment.index, last + 1)
            saved = self.checkpoint.read(segment.index) if self.checkpoint is not None else None
            if saved is not None:
                self._restore(saved)
            elif sites:
                yield from self._segment_problems(segment.index, boundaries, sites)
                self._finish(segment.index, sites)
            if segment.index < last:
                self._advance(segment.index, boundaries)
        self.progress("prune", last + 1, last + 1)

    def accept(self, name: str, solution: LayerSolution, record: Mapping[str, Any] | None = None) -> None:
        """Take the solution of the problem `name`; `record` is what a checkpoint should remember of its site."""
        site_name, _, group = name.rpartition("[group ")
        site_name, index = (site_name, int(group.rstrip("]"))) if site_name else (name, 0)
        self._pending.setdefault(site_name, {})[index] = solution
        if record is not None:
            self._records[name] = record

    def loss(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """Return mean ‖y − y_dense‖² over the outputs of batch number `batch`, differentiable in `weights`.

        `weights` maps site names to (out, in), or (groups, out, in) where a site has groups.
        """
        lifted = {name: weight if weight.dim() == 3 else weight.unsqueeze(0) for name, weight in weights.items()}
        outputs = self._outputs(batch, lifted)
        with torch.no_grad():
            targets = self._outputs(batch, {name: self._dense_weight(name) for name in self._chosen})
        terms = [
            (new - target).square().mean()
            for new, target in zip(outputs, targets, strict=True)
            if new.is_floating_point()
        ]
        return torch.stack(terms).sum()

    def estimate(self) -> Estimate:
        """Estimate what `layers` will hold, from the first batch's boundary and the sites' sizes."""
        per_segment: dict[int, dict[str, int]] = {}
        for site, rule in self._chosen.values():
            held = per_segment.setdefault(site.segment, {})
            held[site.reads] = max(held.get(site.reads, 0), size_bytes(site.groups, site.in_, _needs(rule)))
        boundary = 0
        if self.batches:
            values = self.graph.enter(self.batches[0])
            boundary = max((_values_bytes(values), *self._boundary_sizes(values)))
        statistics = max((sum(held.values()) for held in per_segment.values()), default=0)
        return Estimate(statistics, boundary * len(self.batches))

    def _boundary_sizes(self, values: Values) -> Iterator[int]:
        """Run the first segment to see what crosses; later boundaries of a deep network are alike."""
        if len(self.graph.segments) > 1:
            with torch.no_grad():
                yield _values_bytes(self.graph.run_segment(0, values))

    def _segment_problems(
        self, index: int, boundaries: list[Values], sites: Sequence[tuple[Site, Rule]]
    ) -> Iterator[LayerProblem]:
        moments = self._gather(index, boundaries, sites)
        for site, rule in sites:
            seen = moments.get(site.reads)
            self.tokens[site.name] = seen.tokens if seen is not None else 0
            if seen is not None and seen.tokens == 0:
                self.starved.append(site.name)
                continue
            weight = self.graph.weight(site)
            if self.dense_targets:
                self._dense.setdefault(site.name, weight)
            for group, name in enumerate(site.problem_names()):
                yield self._problem(name, site, rule, weight[group], seen, group)

    def _problem(
        self, name: str, site: Site, rule: Rule, weight: Tensor, seen: Moments | None, group: int
    ) -> LayerProblem:
        gram = mean_square = targets = None
        if seen is not None:
            mean_square = seen.mean_square(group)
            weight = weight.to(mean_square.device)
            if seen.needs is not Needs.NORMS:
                gram = seen.gram(group)
            if seen.cross is not None and seen.dense_second is not None:
                dense = seen.dense_second[group] / seen.tokens
                energy = float(((weight.double() @ dense) * weight.double()).sum())
                targets = Targets(seen.cross[group] / seen.tokens, energy)
        return LayerProblem(
            name=name,
            weight=weight,
            pattern=rule.pattern,
            sparsity=rule.sparsity,
            run=site.run,
            mean_square=mean_square,
            gram=gram,
            targets=targets,
        )

    def _gather(self, index: int, boundaries: list[Values], sites: Sequence[tuple[Site, Rule]]) -> dict[str, Moments]:
        moments: dict[str, Moments] = {}
        names: dict[str, str] = {}
        for site, rule in sites:
            needs = _needs(rule)
            if self.dense_targets:
                needs = Needs.GRAM
            if not self.batches or site.layout is None or needs is Needs.NOTHING:
                continue
            known = moments.get(site.reads)
            if known is None or known.needs is Needs.NORMS:
                moments[site.reads] = Moments(site.layout, site.groups, site.in_, needs)
                names[site.reads] = site.name
        if not moments:
            return {}
        for number, values in enumerate(boundaries):
            dense_inputs = self._dense_inputs(index, number, moments) if self.dense_targets else {}

            def observe(
                key: str, x: Tensor, number: int = number, dense: dict[str, list[Tensor]] = dense_inputs
            ) -> None:
                if key in moments:
                    moments[key].add(x, names[key], number)
                    if dense:
                        moments[key].add_pair(x, dense[key].pop(0))

            with torch.no_grad():
                self.graph.run_segment(index, values, observe)
        return moments

    def _dense_inputs(self, index: int, number: int, moments: Mapping[str, Moments]) -> dict[str, list[Tensor]]:
        """Run the dense model's segment on its own boundary: collect what its sites read, and move it on."""
        assert self._dense_boundaries is not None
        collected: dict[str, list[Tensor]] = {key: [] for key in moments}

        def observe(key: str, x: Tensor) -> None:
            if key in collected:
                collected[key].append(x)

        with torch.no_grad():
            after = self.graph.run_segment(index, self._dense_boundaries[number], observe, self._dense)
        self._dense_boundaries[number] = self._host(after)
        return collected

    def _finish(self, index: int, sites: Sequence[tuple[Site, Rule]]) -> None:
        saved = {}
        for site, _ in sites:
            if site.name in self.starved:
                continue
            solutions = self._pending.pop(site.name, {})
            if len(solutions) != site.groups:
                raise CalibrationError(
                    f"site {site.name!r}: {len(solutions)} of its {site.groups} problems were solved; accept all of "
                    "them before asking for the next segment"
                )
            weight = torch.stack([solutions[group].weight for group in range(site.groups)]).cpu()
            keep = torch.stack([solutions[group].keep for group in range(site.groups)]).cpu()
            self.graph.set_weight(site, weight)
            records = {name: self._records[name] for name in site.problem_names() if name in self._records}
            saved[site.name] = SavedSite(weight, keep, {"tokens": self.tokens[site.name], "problems": records})
        self.finished.update(saved)
        if self.checkpoint is not None:
            self.checkpoint.write(index, saved)

    def _restore(self, saved: Mapping[str, SavedSite]) -> None:
        for name, site in saved.items():
            self.graph.set_weight(self._chosen[name][0], site.weight)
            self.tokens[name] = int(site.record["tokens"])
        self.finished.update(saved)

    def _advance(self, index: int, boundaries: list[Values]) -> None:
        """Replace every batch's boundary by the one after the segment, through the weights as they are now."""
        for number, values in enumerate(boundaries):
            with torch.no_grad():
                boundaries[number] = self._host(self.graph.run_segment(index, values))

    def _outputs(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        values = self.graph.enter(self.batches[batch])
        for segment in self.graph.segments:
            values = self.graph.run_segment(segment.index, values, weights=weights)
        return self.graph.outputs(values)

    def _dense_weight(self, name: str) -> Tensor:
        if name not in self._dense:
            raise CalibrationError(f"site {name!r}: the dense weight was not kept; walk with dense_targets=True")
        return self._dense[name]

    @staticmethod
    def _host(values: Values) -> Values:
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}


def _needs(rule: Rule) -> Needs:
    """Return the statistics a rule's sites want: a re-solve reads the Gram matrix whatever the method itself reads."""
    return Needs.GRAM if rule.refit or rule.method.needs is Needs.LOOKAHEAD else rule.method.needs


def _add(
    moments: Mapping[str, Moments],
    names: Mapping[str, str],
    number: int,
    dense: Mapping[str, list[Tensor]],
    key: str,
    x: Tensor,
) -> None:
    """Add what a site read in batch `number`, and what the dense model read there if it was walked alongside."""
    if key in moments:
        moments[key].add(x, names[key], number)
        if dense:
            moments[key].add_pair(x, dense[key].pop(0))


def _values_bytes(values: Values) -> int:
    return sum(v.numel() * v.element_size() for v in values.values() if isinstance(v, Tensor))
