"""What pruning a site costs the model as its sparsity grows: weighed once by the outputs, carried on by layer errors.

In SmolLM2's first layer SparseGPT's error is that of ALPS times a factor that changes by 5 to 29 % between sparsities
of 30 and 80 %, while the errors grow 29 to 280 times (prune/NOTES.md), so the cheap method gives the shape of the
curve. Relative errors summed over sites are a bad guide: in stories260k 0.005 in keys costs more than 0.08 in values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, padding
from sparsify_compiler.boundaries import Boundaries
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import Graph, Site
from sparsify_compiler.passes.budget import Curve, Share
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.plan import Decision
from sparsify_compiler.problem import LayerProblem, LayerSolution, Pruner
from sparsify_compiler.progress import Progress


def dense_walk(
    graph: Graph, batches: Sequence[Batch], decisions: Sequence[Decision], method: Pruner, progress: Progress
) -> Iterator[tuple[Site, list[LayerProblem]]]:
    """Yield every site that `decisions` prune with its problems, one a group, front to back through the dense model.

    Problems carry the statistics that `method` reads. Sites that no token reaches are left out. The weights stay.
    """
    probes = [
        replace(d, rule=replace(d.rule, method=method, refit=False, swaps=0)) for d in decisions if d.rule is not None
    ]
    sites = {name: probe.site for probe in probes for name in probe.site.problem_names()}

    def say(stage: str, done: int, total: int) -> None:
        progress(f"allocate{stage.removeprefix('prune')}", done, total)

    walk = Walk(graph, batches, probes, progress=say)
    problems: list[LayerProblem] = []
    for problem in walk.layers():
        walk.accept(problem.name, LayerSolution(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool)))
        problems.append(problem)
        site = sites[problem.name]
        if len(problems) == site.groups:
            yield site, problems
            problems = []


class Outputs:
    """The dense model's outputs on `count` batches, and how far they move when one weight is another.

    The graph must stay dense. Held per batch: the values before one segment, and on the host the outputs.
    """

    def __init__(self, graph: Graph, batches: Sequence[Batch]) -> None:
        """Run the dense model.

        Raises:
            CalibrationError: its outputs are not finite, all zero, or none is floating point.
        """
        self.count = len(batches)
        self._graph = graph
        self._segment = 0
        self._hidden = [padding(batch) for batch in batches]
        self._reached = Boundaries(graph, batches)
        self._dense = [[y.cpu() for y in self._run(number)] for number in range(len(batches))]
        self._energy = sum(_square(y) for outputs in self._dense for y in outputs)
        if not 0 < self._energy < float("inf"):
            raise CalibrationError(
                f"[allocate]: what the model returns has the sum of squares {self._energy:g} on {self.count} batches, "
                'so nothing can be measured by it; check the data, or allocate by = "owl"'
            )

    def moved(self, site: Site, weight: Tensor) -> float:
        """Return ‖Y − Ŷ‖² / ‖Y‖² over all floating-point outputs, with `weight` (groups, out, in) in the site's place.

        Padding under an `attention_mask` does not count. Sites come in the order of their segments.

        Raises:
            CalibrationError: Ŷ is not finite.
        """
        while self._segment < site.segment:
            self._reached.advance(self._segment)
            self._segment += 1
        error = 0.0
        for number, dense in enumerate(self._dense):
            changed = self._run(number, {site.name: weight})
            error += sum(_square(y - old.to(y.device)) for y, old in zip(changed, dense, strict=True))
        if not error < float("inf"):
            raise CalibrationError(f"[allocate]: with {site.name!r} pruned the outputs are not finite; check the data")
        return error / self._energy

    def _run(self, number: int, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Run a batch from the segment reached on, `weights` in it, and return its floating-point outputs."""
        values, hidden = self._reached.values[number], self._hidden[number]
        with torch.no_grad():
            for segment in self._graph.segments[self._segment :]:
                values = self._graph.run_segment(segment.index, values, weights=weights)
                weights = None
        outputs = [y for y in self._graph.outputs(values) if y.is_floating_point()]
        return outputs if hidden is None else [hidden.drop(y) for y in outputs]


@dataclass(frozen=True)
class Growth:
    """How a site's layer error grows: SparseGPT's, summed over its groups, at `sparsities` in increasing order.

    `weight` (groups, out, in) float32 is the pruned one at `sparsities[reference]`: the asked sparsity, or the highest
    where the asked one costs nothing.
    """

    sparsities: tuple[float, ...]
    errors: tuple[float, ...]
    reference: int
    weight: Tensor

    def curve(self, effect: float) -> Curve:
        """Return the site's cost by its sparsity, in proportion to its error, `effect` at the reference."""
        base = self.errors[self.reference]
        return Curve(self.sparsities, tuple(error / base * effect if base else 0.0 for error in self.errors))


def growth(problems: Sequence[LayerProblem], share: Share) -> Growth:
    """Prune a site from its lower bound to its upper, at up to five sparsities."""
    between = ((share.low + share.asked) // 2, (share.asked + share.high) // 2)
    counts = sorted({share.low, share.asked, share.high, *between})
    levels = [share.sparsity(count) for count in counts]
    errors, reference, weight = [], counts.index(share.asked), problems[0].weight.new_empty(0)
    for number, level in enumerate(levels):
        error, pruned = _prune(problems, level)
        errors.append(error)
        if number == reference or (number == len(levels) - 1 and not errors[reference]):
            reference, weight = number, pruned
    return Growth(tuple(levels), tuple(errors), reference, weight)


def _prune(problems: Sequence[LayerProblem], sparsity: float) -> tuple[float, Tensor]:
    """Return the sum of SparseGPT's layer errors at `sparsity`, and its weights (groups, out, in)."""
    solutions = [prune_with(replace(problem, sparsity=sparsity), SparseGPT(), refit=False) for problem in problems]
    error = sum(solution.loss for solution in solutions if solution.loss is not None)
    return max(error, 0.0), torch.stack([solution.weight for solution in solutions])


def _square(y: Tensor) -> float:
    return float(y.float().square().sum(dtype=torch.float64))
