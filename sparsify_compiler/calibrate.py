"""Walk a graph front to back: gather statistics of a segment through the pruned prefix, hand out its problems, go on.

Statistics of a segment are taken before any of its sites is pruned, as SparseGPT's and ALPS's own drivers do. Only
the values alive between two segments are kept per batch; see `boundaries` for where.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, Padding, padding
from sparsify_compiler.boundaries import GPU_SHARE, Boundaries, boundary_bytes, run_graph
from sparsify_compiler.checkpoint import Checkpoint, SavedSite
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import Graph, Site
from sparsify_compiler.plan import Decision
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs, Targets
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.recipe import Rule
from sparsify_compiler.refinement import PrunedSegment, Refine
from sparsify_compiler.statistics import Estimate, Moments, largest_bytes


@dataclass(frozen=True)
class FinishedSite:
    """A pruned site: `keep` (groups, out, in) bool and what was recorded of it. Its weight is the graph's."""

    keep: Tensor
    record: Mapping[str, Any]


@dataclass
class Walk:
    """One front-to-back walk; a `problem.ModelProblem` for the sites that `decisions` prunes.

    Iterate over `layers()` and `accept` one solution for every problem before asking for the next segment's first.
    `tokens` counts the rows each site saw (not those an `attention_mask` hides); `starved` names sites that saw none:
    they are left dense. `finished` holds every pruned site, solved now or restored from the checkpoint. `notes` say
    what a report should.
    With `dense_targets` the dense model is walked alongside and problems carry `Targets`. A further round over a graph
    that is already pruned gives the dense weights (groups, out, in) by site name as `dense_weights`: they stay what
    problems are measured against, and what the graph holds, where it is something else, becomes their `start`.
    With `refine` the dense model is walked alongside for its sake.
    """

    graph: Graph
    batches: Sequence[Batch]
    decisions: Sequence[Decision]
    checkpoint: Checkpoint | None = None
    progress: Progress = silent
    dense_targets: bool = False
    dense_weights: Mapping[str, Tensor] | None = None
    refine: Refine | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    starved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: dict[str, FinishedSite] = field(default_factory=dict)
    _pending: dict[str, dict[int, LayerSolution]] = field(default_factory=dict)
    _records: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chosen = {d.site.name: (d.site, d.rule) for d in self.decisions if d.rule is not None}
        self._groups = {
            problem: (site.name, group)
            for site, _ in self._chosen.values()
            for group, problem in enumerate(site.problem_names())
        }
        self._dense: dict[str, Tensor] = {}
        self._dense_boundaries: Boundaries | None = None

    def layers(self) -> Iterator[LayerProblem]:
        """Yield every problem front to back; a site with groups yields one a group, `Site.problem_names` in order."""
        boundaries = Boundaries(self.graph, self.batches)
        if self.dense_targets or self.refine is not None:
            self._dense_boundaries = copy(boundaries)
        last = max((site.segment for site, _ in self._chosen.values()), default=-1)
        solved = self.checkpoint.finished() if self.checkpoint is not None else frozenset()
        unsolved = max((site.segment for site, _ in self._chosen.values() if site.segment not in solved), default=-1)
        for segment in self.graph.segments[: last + 1]:
            sites = [self._chosen[name] for name in segment.sites if name in self._chosen]
            stage = f"prune {segment.name}"
            self.progress(stage, segment.index, last + 1)
            saved = self.checkpoint.read(segment.index) if self.checkpoint is not None else None
            if self._dense_boundaries is not None:
                given = self.dense_weights or {}
                self._dense.update({s.name: given.get(s.name, self.graph.weight(s)) for s, _ in sites})
            if saved is None and sites:
                yield from self._segment_problems(segment.index, boundaries, sites)
            if self._dense_boundaries is not None and segment.index < unsolved + (self.refine is not None):
                self._dense_boundaries.advance(segment.index, self._dense)
                if not self.dense_targets:
                    self._dense.clear()
            if saved is not None:
                self._restore(saved, sites)
            elif sites:
                self._finish(segment.index, sites, boundaries)
            if segment.index < unsolved:
                boundaries.advance(segment.index)
        self._note_waiting([boundaries, *([self._dense_boundaries] if self._dense_boundaries else [])])
        self.progress("prune", last + 1, last + 1)

    def accept(self, name: str, solution: LayerSolution, record: Mapping[str, Any] | None = None) -> None:
        """Take the solution of the problem `name`; `record` is what a checkpoint should remember of its site."""
        site_name, group = self._groups[name]
        self._pending.setdefault(site_name, {})[group] = solution
        if record is not None:
            self._records[name] = record

    def loss(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """Return mean ‖y − y_dense‖² over the outputs of batch number `batch`, differentiable in `weights`.

        `weights` maps problem names to (out, in); a site with groups needs all of its problems.
        """
        if not self.dense_targets:
            raise CalibrationError("the dense weights were not kept; walk with dense_targets=True")
        parts: dict[str, dict[int, Tensor]] = {}
        for name, weight in weights.items():
            site, group = self._groups[name]
            parts.setdefault(site, {})[group] = weight
        lifted = {site: torch.stack([groups[group] for group in sorted(groups)]) for site, groups in parts.items()}
        outputs = run_graph(self.graph, self.batches[batch], lifted)
        with torch.no_grad():
            targets = run_graph(self.graph, self.batches[batch], self._dense)
        terms = [
            (new - target).square().mean()
            for new, target in zip(outputs, targets, strict=True)
            if new.is_floating_point()
        ]
        return torch.stack(terms).sum()

    def estimate(self) -> Estimate:
        """Estimate what `layers` will hold, from the first batch's boundary and the sites' sizes."""
        needs = [(s, Needs.GRAM if self.dense_targets else _needs(rule)) for s, rule in self._chosen.values()]
        boundary = boundary_bytes(self.graph, self.batches[0]) if self.batches else 0
        statistics = largest_bytes(needs) if self.batches else 0
        if self.dense_targets:  # XᵀX, X_prunedᵀ X_dense and X_denseᵀ X_dense
            statistics *= 3
        if self.dense_targets or self.refine is not None:
            boundary *= 2
        return Estimate(statistics, boundary * len(self.batches))

    def _segment_problems(
        self, index: int, boundaries: Boundaries, sites: Sequence[tuple[Site, Rule]]
    ) -> Iterator[LayerProblem]:
        moments = self._gather(index, boundaries, sites)
        for site, rule in sites:
            seen = moments.get(site.reads)
            self.tokens[site.name] = seen.tokens if seen is not None else 0
            if seen is not None and seen.tokens == 0:
                self.starved.append(site.name)
                continue
            now = self.graph.weight(site)
            dense = (self.dense_weights or {}).get(site.name)
            moved = dense is not None and not torch.equal(now.to(dense.device), dense)
            for group, name in enumerate(site.problem_names()):
                problem = self._problem(name, site, rule, (now if dense is None else dense)[group], seen, group)
                yield replace(problem, start=now[group].to(problem.weight.device)) if moved else problem

    def _note_waiting(self, walked: Sequence[Boundaries]) -> None:
        """Say where a GPU had no room for the values between segments: their copies cost time."""
        waited = sum(each.host_bytes for each in walked) / 1e9
        if waited:
            self.notes.append(
                f"{waited:.2g} GB of the values between segments waited in the host's memory: all of them take more "
                f"than 1/{GPU_SHARE} of what is free on the GPU"
            )

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

    def _gather(self, index: int, boundaries: Boundaries, sites: Sequence[tuple[Site, Rule]]) -> dict[str, Moments]:
        moments: dict[str, Moments] = {}
        names: dict[str, str] = {}
        for site, rule in sites:
            needs = Needs.GRAM if self.dense_targets else _needs(rule)
            if not self.batches or site.layout is None or needs is Needs.NOTHING:
                continue
            known = moments.get(site.reads)
            if known is None or known.needs is Needs.NORMS:
                moments[site.reads] = Moments(site.layout, site.groups, site.in_, needs)
                names[site.reads] = site.name
        if not moments:
            return {}
        for number, batch in enumerate(self.batches):
            dense = self._dense_inputs(index, number, moments) if self.dense_targets else {}
            hidden = padding(batch)
            boundaries.run(index, number, partial(_add, moments, names, number, dense, hidden))
        return moments

    def _dense_inputs(self, index: int, number: int, moments: Mapping[str, Moments]) -> dict[str, list[Tensor]]:
        """Run the dense model's segment on its own boundary and collect what its sites read."""
        assert self._dense_boundaries is not None
        collected: dict[str, list[Tensor]] = {key: [] for key in moments}

        def observe(key: str, x: Tensor) -> None:
            if key in collected:
                collected[key].append(x)

        self._dense_boundaries.run(index, number, observe, self._dense)
        return collected

    def _finish(self, index: int, sites: Sequence[tuple[Site, Rule]], boundaries: Boundaries) -> None:
        saved: dict[str, SavedSite] = {}
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
        if self.refine is not None and saved and self.batches:
            saved = self._refined(self.refine, index, saved, boundaries)
        if self.checkpoint is not None:
            self.checkpoint.write(index, saved)
        self.finished.update({name: FinishedSite(site.keep, site.record) for name, site in saved.items()})

    def _refined(
        self, refine: Refine, index: int, saved: Mapping[str, SavedSite], boundaries: Boundaries
    ) -> dict[str, SavedSite]:
        assert self._dense_boundaries is not None
        targets = self._dense_boundaries.values
        refined = refine(PrunedSegment(self.graph, index, saved, self.batches, boundaries.values, targets))
        for name, weight in refined.weights.items():
            self.graph.set_weight(self._chosen[name][0], weight)
        return {
            name: replace(
                site,
                weight=refined.weights.get(name, site.weight),
                record={**site.record, "refined": refined.record},
            )
            for name, site in saved.items()
        }

    def _restore(self, saved: Mapping[str, SavedSite], sites: Sequence[tuple[Site, Rule]]) -> None:
        self.starved.extend(site.name for site, _ in sites if site.name not in saved)
        for name, site in saved.items():
            self.graph.set_weight(self._chosen[name][0], site.weight)
            self.tokens[name] = int(site.record["tokens"])
            self.finished[name] = FinishedSite(site.keep, site.record)


def _needs(rule: Rule) -> Needs:
    """Return the statistics a rule's sites want: a re-solve reads the Gram matrix whatever the method itself reads."""
    return Needs.GRAM if rule.refits or rule.needs is Needs.LOOKAHEAD else rule.needs


def _add(
    moments: Mapping[str, Moments],
    names: Mapping[str, str],
    number: int,
    dense: Mapping[str, list[Tensor]],
    hidden: Padding | None,
    key: str,
    x: Tensor,
) -> None:
    """Add what a site read in batch `number`, and what the dense model read there if it was walked alongside."""
    if key in moments:
        moments[key].add(x, names[key], number, hidden)
        if dense:
            moments[key].add_pair(x, dense[key].pop(0), names[key], number, hidden)
