"""What a recipe's [allocate] needs of a job: gradients of the model, and what its outputs are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.boundaries import Boundaries
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.allocate import Allocation, allocate
from sparsify_compiler.passes.sensitivity import DivergenceProbe, ErrorProbe, Sensitivity, refusing
from sparsify_compiler.pipeline.quality import Heldout, is_language_model
from sparsify_compiler.pipeline.refine import differentiable
from sparsify_compiler.plan import Decision
from sparsify_compiler.progress import Progress
from sparsify_compiler.steps import Allocate


def allocate_sites(
    graph: Graph,
    batches: Sequence[Batch],
    decisions: Sequence[Decision],
    step: Allocate,
    heldout: Heldout | None,
    progress: Progress,
) -> Allocation:
    """Run `passes.allocate` on the dense graph.

    Gradients are those of the KL divergence where the model is a causal language model, or a classifier that labels
    came with; else of the outputs' relative error.

    Raises:
        RecipeError, CalibrationError, SingularGramError: as `allocate`.
    """
    labelled = heldout is not None and heldout.labels is not None
    found = allocate(graph, batches, decisions, step, progress, partial(_sensitivity, graph, batches, labelled))
    if step.by != "error-curve" or step.weigh != "gradients":
        return found
    movable = [d.site for d in decisions if d.rule is not None and d.rule.pattern.fixed_sparsity() is None]
    held = size(4 * sum(site.groups * site.out * site.in_ for site in movable))
    return replace(found, notes=(*found.notes, f"allocate: {held} held how far the sites' weights move"))


def allocation_record(allocation: Allocation) -> dict[str, Any]:
    """Write down what an allocation made of every decision, as JSON can hold it."""
    sites = {
        d.site.name: (d.rule.sparsity if d.rule is not None else None, d.reason, d.asked, d.notes)
        for d in allocation.decisions
    }
    return {"notes": allocation.notes, "sites": sites}


def restored_allocation(decisions: Sequence[Decision], record: Mapping[str, Any]) -> Allocation:
    """Make of `decisions`, as they were before, what `allocation_record` wrote down."""
    made = []
    for decision in decisions:
        sparsity, reason, asked, notes = record["sites"][decision.site.name]
        rule = replace(decision.rule, sparsity=sparsity) if decision.rule is not None and sparsity is not None else None
        made.append(replace(decision, rule=rule, reason=reason, asked=asked, notes=tuple(notes)))
    return Allocation(tuple(made), tuple(record["notes"]))


def _sensitivity(graph: Graph, batches: Sequence[Batch], labelled: bool) -> Sensitivity:
    with refusing():
        trained = differentiable(graph)
    language = is_language_model(_walked(graph), batches[0])
    return Sensitivity(trained, DivergenceProbe(by_token=language) if language or labelled else ErrorProbe())


def _walked(graph: Graph) -> Forward:
    """Return the graph as a function of batches that names one which does not fit, as `Boundaries` do."""

    def forward(batch: Batch) -> tuple[Tensor, ...]:
        walked = Boundaries(graph, [batch])
        for segment in graph.segments:
            walked.advance(segment.index)
        return graph.outputs(walked.values[0])

    return forward
