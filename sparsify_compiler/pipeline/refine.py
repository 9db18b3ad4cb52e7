"""What a recipe's [reconstruct] and [distill] need of a job: the dense model's outputs, and rows of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsify_compiler.checkpoint import Checkpoint
from sparsify_compiler.export.report import StepReport
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.frontends.onnx_gradient import DifferentiableOnnx
from sparsify_compiler.frontends.torch import TorchGraph
from sparsify_compiler.graph import DifferentiableGraph, Graph
from sparsify_compiler.passes.prune.layerwise import SiteOutcome
from sparsify_compiler.passes.refine.distill import Distilled, distill
from sparsify_compiler.passes.refine.reselect import DiagonalReselect, site_mask
from sparsify_compiler.passes.refine.teacher import Distance, Divergence, RelativeError, Teacher, sums_to_one
from sparsify_compiler.pipeline.quality import is_language_model
from sparsify_compiler.pipeline.rounds import RoundData, forward_of_graph
from sparsify_compiler.plan import Decision
from sparsify_compiler.progress import Progress
from sparsify_compiler.steps import Distill


@dataclass(frozen=True)
class Lesson:
    """What [distill] trains towards, and what its epochs are chosen by: `data` says in words what that is."""

    training: Distance
    heldout: Distance
    data: str

    def size_bytes(self) -> int:
        """Count the bytes that are held of the dense model."""
        return self.training.teacher.size_bytes() + self.heldout.teacher.size_bytes()


def differentiable(graph: Graph) -> DifferentiableGraph:
    """Return a graph of the same weights whose segments give gradients.

    Raises:
        ModelError: an ONNX file has operators that give none here.
    """
    if isinstance(graph, OnnxGraph):
        return DifferentiableOnnx(graph)
    assert isinstance(graph, TorchGraph)
    return graph


def prepare_lesson(
    graph: Graph,
    decisions: Sequence[Decision],
    data: RoundData,
    moving: bool,
    progress: Progress,
) -> Lesson:
    """Run the dense model (`graph` is not pruned yet) on the batches to train on, and on those to choose by.

    `moving`: more of the graph will change than the weights of its sites.

    The loss is the KL divergence where the model is a causal language model, or a classifier that labels came with;
    else the relative error.

    Raises:
        ModelError: the graph gives no gradients.
    """
    graph = differentiable(graph)
    sites = [decision.site for decision in decisions if decision.rule is not None]
    training, chosen_by = (
        Teacher(graph, part, sites, progress, moving) for part in (data.training, data.heldout.batches)
    )
    distribution = data.heldout.labels is not None or is_language_model(forward_of_graph(graph), data.training[0])
    one, other = (_distance(teacher, distribution) for teacher in (training, chosen_by))
    return Lesson(one, other, data.heldout.description)


def learn(
    graph: Graph,
    decisions: Sequence[Decision],
    outcomes: Mapping[str, SiteOutcome],
    lesson: Lesson,
    settings: Distill,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> tuple[dict[str, SiteOutcome], Distilled]:
    """Distil the pruned `graph`, and return the outcomes of its sites with the masks they have now."""
    rules = {d.site: d.rule for d in decisions if d.rule is not None}
    chosen = {site.name: (site, rule.pattern) for site, rule in rules.items() if site.name in outcomes}
    reselect = None
    if settings.reselect:
        masks = (site_mask(site, pattern, outcomes[name].keep) for name, (site, pattern) in chosen.items())
        reselect = DiagonalReselect(tuple(masks), settings.reselect)
    done = distill(
        differentiable(graph),
        [site for site, _ in chosen.values()],
        {name: outcomes[name].keep for name in chosen},
        lesson.training,
        lesson.heldout,
        settings,
        reselect,
        progress,
        checkpoint=checkpoint,
    )
    return {name: replace(outcome, keep=done.keep[name]) for name, outcome in outcomes.items()}, done


def reconstruct_reports(outcomes: Mapping[str, SiteOutcome]) -> tuple[StepReport, ...]:
    """Return one row a segment that was reconstructed."""
    return tuple(
        StepReport("reconstruct", fit["name"], "relative error", fit["before"], fit["after"], None, fit["kept"])
        for fit in _fits(outcomes)
    )


def reconstruct_notes(outcomes: Mapping[str, SiteOutcome]) -> tuple[str, ...]:
    """Say what a reader must know of the segments' tuning."""
    fits = _fits(outcomes)
    kept = sum(fit["kept"] for fit in fits)
    others = "" if kept == len(fits) else ", the others' error did not fall"
    return (
        f"reconstruct: {kept} of {len(fits)} segments have tuned weights{others}; errors of sites are those before it",
        *(note for fit in fits for note in fit["notes"]),
    )


def _fits(outcomes: Mapping[str, SiteOutcome]) -> list[Mapping[str, Any]]:
    """Return what tuning did to each segment, once for all of its sites."""
    return list({each.refined["name"]: each.refined for each in outcomes.values() if each.refined is not None}.values())


def distill_reports(done: Distilled, lesson: Lesson) -> tuple[StepReport, ...]:
    """Return one row an epoch, the weights that it began with first."""
    return tuple(
        StepReport(
            step="distill",
            part=f"epoch {epoch.number}" if epoch.number else "as it was pruned",
            measure=lesson.heldout.words,
            before=None,
            after=epoch.training,
            heldout=epoch.heldout,
            kept=epoch.number == done.best,
            data=lesson.data,
        )
        for epoch in done.epochs
    )


def distill_notes(done: Distilled, lesson: Lesson, given: bool) -> tuple[str, ...]:
    """Say what a reader must know of the distillation; `given`: the user's held-out data chose among its epochs."""
    notes = [f"distill: {size(lesson.size_bytes())} more held what the dense model makes of every batch"]
    if done.best:
        notes.append("distill: weights of all sites moved; errors of sites are those before it")
    if given:
        notes.append(
            f"distill: epoch {done.best} was chosen on the held-out data that quality is measured on, which flatters "
            "that figure a little; measure on other data to be sure"
        )
    if done.changed:
        notes.append(f"distill: {done.changed:.3f} of the mask entries changed")
    return (*notes, *(f"distill: {note}" for note in done.notes))


def _distance(teacher: Teacher, distribution: bool) -> Distance:
    if not distribution:
        return RelativeError.of(teacher)
    return Divergence(teacher, probabilities=sums_to_one(teacher.outputs(0)[0]))
