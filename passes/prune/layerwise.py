"""Prune a graph front to back, each site by its own rule, and keep what the report and a resumed run need."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sparsify_compiler.calibrate import Walk
from sparsify_compiler.passes.prune.expand import SiteExpansion
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.precision import whole_float32
from sparsify_compiler.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class ProblemRecord:
    """Numbers of one solved problem (one group of a site). Losses are per token, None without a Gram matrix."""

    loss_selected: float | None
    loss: float | None
    energy: float | None
    damp: float | None
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SiteOutcome:
    """One pruned site: `keep` (groups, out, in) bool, sums over its groups. The weight is the graph's.

    `refined` is what `Walk.refine` recorded of its segment, after the losses here were measured.
    """

    name: str
    keep: Tensor
    tokens: int
    loss_selected: float | None
    loss: float | None
    relative_error: float | None
    damp: float | None
    seconds: float
    notes: tuple[str, ...]
    refined: Mapping[str, Any] | None = None

    @property
    def sparsity(self) -> float:
        """The share removed that was realised."""
        return 1 - float(self.keep.sum()) / max(self.keep.numel(), 1)


def prune_layerwise(walk: Walk, expansions: Mapping[str, SiteExpansion] | None = None) -> dict[str, SiteOutcome]:
    """Solve every problem of `walk` by its site's rule and return the outcome of every pruned site, in order.

    `expansions` by site name go to the problems of their sites.

    Given:   %y = linear(%x, weight=%w)      # %w (768, 3072) dense
    Result:  %y = linear(%x, weight=%w1)     # %w1 has exact zeros, the graph is otherwise the same

    Raises:
        CalibrationError, SingularGramError, PatternError: as the methods and statistics do, naming the site.
    """
    rules = {
        name: decision.rule
        for decision in walk.decisions
        if decision.rule is not None
        for name in decision.site.problem_names()
    }
    given = {
        problem: partial(site.of_group, group)
        for decision in walk.decisions
        if (site := (expansions or {}).get(decision.site.name)) is not None
        for group, problem in enumerate(decision.site.problem_names())
    }
    with whole_float32():
        for problem in walk.layers():
            rule = rules[problem.name]
            start = time.perf_counter()
            if expansion := given.get(problem.name):
                problem = replace(problem, expansion=expansion(problem.weight.device))
            solution = prune_with(problem, rule.method, rule.refits, rule.swaps)
            record = _record(problem, solution, time.perf_counter() - start)
            walk.accept(problem.name, solution, asdict(record))
    return {name: _outcome(name, saved.keep, saved.record) for name, saved in walk.finished.items()}


def _record(problem: LayerProblem, solution: LayerSolution, seconds: float) -> ProblemRecord:
    return ProblemRecord(
        loss_selected=solution.loss_selected,
        loss=solution.loss,
        energy=problem.energy(),
        damp=solution.stats.get("damp"),
        seconds=seconds,
        notes=solution.notes,
    )


def _outcome(name: str, keep: Tensor, record: Mapping[str, Any]) -> SiteOutcome:
    problems: list[Mapping[str, Any]] = list(record["problems"].values())
    loss, energy = _total(problems, "loss"), _total(problems, "energy")
    damps = [problem["damp"] for problem in problems if problem["damp"] is not None]
    return SiteOutcome(
        name=name,
        keep=keep,
        tokens=int(record["tokens"]),
        loss_selected=_total(problems, "loss_selected"),
        loss=loss,
        relative_error=loss / energy if loss is not None and energy else None,
        damp=max(damps, default=None),
        seconds=sum(problem["seconds"] for problem in problems),
        notes=tuple(dict.fromkeys(note for problem in problems for note in problem["notes"])),
        refined=record.get("refined"),
    )


def _total(problems: list[Mapping[str, Any]], key: str) -> float | None:
    values = [problem[key] for problem in problems]
    return None if any(value is None for value in values) else float(sum(values))
