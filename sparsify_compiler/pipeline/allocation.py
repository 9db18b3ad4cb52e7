"""What a recipe's [allocate] needs of a job: gradients of the model, and what its outputs are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import ModelError, RecipeError
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.graph import DifferentiableGraph, Graph, Site
from sparsify_compiler.passes.allocate import Allocation, allocate
from sparsify_compiler.passes.sensitivity import DivergenceProbe, Effects, ErrorProbe, Sensitivity
from sparsify_compiler.passes.weigh import weighed_by_gradients, weighed_by_outputs
from sparsify_compiler.pipeline.quality import Heldout, is_language_model
from sparsify_compiler.pipeline.refine import differentiable
from sparsify_compiler.pipeline.rounds import forward_of_graph
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
        RecipeError: gradients are asked of a model that gives none.
        CalibrationError, SingularGramError: as `allocate`.
    """
    if not takes_gradients(step):
        return allocate(graph, batches, decisions, step, weighed_by_outputs, progress)
    with refusing():
        trained = differentiable(graph)
    labelled = heldout is not None and heldout.labels is not None
    weigh = partial(weighed_by_gradients, partial(_effects, trained, labelled))
    found = allocate(graph, batches, decisions, step, weigh, progress)
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


def takes_gradients(step: Allocate) -> bool:
    """Say whether the step weighs sites by gradients of the model."""
    return step.by == "error-curve" and step.weigh == "gradients"


@contextmanager
def refusing() -> Iterator[None]:
    """Say what to do where a model gives no gradients: a ModelError inside becomes a RecipeError.

    It is refused, not weighed by its outputs instead: that runs the model half through once a site, where gradients
    cost five runs for all sites, and gives other sparsities; whoever runs it should choose.
    """
    try:
        yield
    except ModelError as error:
        raise RecipeError(
            '[allocate]: weigh = "gradients" cannot be had of this model; set weigh = "outputs", which measures site '
            f'by site and takes long on large models, or by = "owl" ({error})'
        ) from error


def _effects(
    graph: DifferentiableGraph,
    labelled: bool,
    batches: Sequence[Batch],
    changes: Mapping[str, tuple[Site, Tensor]],
    progress: Progress,
) -> Effects:
    """Predict by the distance that suits the model, on batches that the walk has run; see `passes.weigh.Predict`."""
    with refusing():
        language = is_language_model(forward_of_graph(graph), batches[0])
        probe = DivergenceProbe(by_token=language) if language or labelled else ErrorProbe()
        return Sensitivity(graph, probe).effects(batches, changes, progress)
