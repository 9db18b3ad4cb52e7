"""What a recipe asks of the model's own loss: its gradient before a round, and tuning between rounds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import RecipeError
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.graph import DifferentiableGraph, Graph, Site
from sparsify_compiler.passes.gradients import DenseOutputs, ModelLoss, NextToken
from sparsify_compiler.passes.prune.expand import Expand, SiteExpansion, expand
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.rounds import Tune
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.passes.refine.finetune import finetune
from sparsify_compiler.pipeline.allocation import refusing, takes_gradients
from sparsify_compiler.pipeline.quality import is_language_model
from sparsify_compiler.pipeline.refine import differentiable
from sparsify_compiler.pipeline.rounds import forward_of_graph
from sparsify_compiler.plan import TRAINING_STEPS, Decision
from sparsify_compiler.problem import Needs
from sparsify_compiler.progress import Progress
from sparsify_compiler.recipe import Recipe
from sparsify_compiler.steps import FineTune

GRADIENTS = (Needs.GRADIENT, Needs.FISHER)
"""What methods need that take the gradient of the model's own loss."""

LossAt = Callable[[Mapping[str, Tensor]], ModelLoss]
"""The loss, given the dense weights (groups, out, in) by site name."""


@dataclass(frozen=True)
class OwnLoss:
    """`expand` and `tune` as `prune_in_rounds` takes them, None where nobody asks; `notes` for the report."""

    expand: Expand | None = None
    tune: Tune | None = None
    notes: tuple[str, ...] = ()


def check_trainable(graph: Graph, decisions: Sequence[Decision], recipe: Recipe) -> None:
    """Refuse training that cannot be done on `graph`, or would be lost; nothing is run, so ask before any pass.

    Raises:
        RecipeError: a method would not see what fine-tuning did, or [allocate] weighs by gradients of a model without.
        ModelError: a method or a step that trains takes gradients, and an ONNX file has operators that give none here.
    """
    if recipe.finetune is not None:
        _check_starts(decisions)
    if recipe.allocate is not None and takes_gradients(recipe.allocate):
        with refusing():
            differentiable(graph)
    methods = (decision.rule.method for decision in decisions if decision.rule is not None)
    if any(word in TRAINING_STEPS for word in recipe.steps()) or any(method.needs in GRADIENTS for method in methods):
        differentiable(graph)


def own_loss(
    graph: Graph, decisions: Sequence[Decision], recipe: Recipe, batches: Sequence[Batch], progress: Progress
) -> OwnLoss:
    """Prepare what needs the model's own loss: that of the tokens themselves, or the distance to the dense outputs.

    `check_trainable` has found that it can be had. `graph` is dense when this is called.
    """
    needing = {
        decision.site.name: decision.rule.method.needs
        for decision in decisions
        if decision.rule is not None and decision.rule.method.needs in GRADIENTS
    }
    if not needing and recipe.finetune is None:
        return OwnLoss()
    trained = differentiable(graph)
    sites = {d.site.name: d.site for d in decisions if d.rule is not None}
    language = is_language_model(forward_of_graph(graph), batches[0])

    def loss(dense: Mapping[str, Tensor]) -> ModelLoss:
        return NextToken() if language else DenseOutputs(forward_of_graph(graph, dense))

    asked = {name: sites[name] for name in needing}
    weighing = frozenset(name for name, needs in needing.items() if needs is Needs.FISHER)

    def expansions(batches: Sequence[Batch], dense: Mapping[str, Tensor]) -> Mapping[str, SiteExpansion]:
        return expand(trained, batches, asked, loss(dense), weighing, progress)

    notes = [f"the model's own loss is {loss({}).words}"]
    if needing:
        held = sum(4 * s.groups * s.out * s.in_ for s in asked.values())
        held += sum(8 * asked[name].groups * asked[name].in_ ** 2 for name in weighing)
        notes.append(f"woodtaylor: {size(held)} more held the gradient and the curvature of all its sites")
    if needing and recipe.rounds == 1 and not language:
        notes.append(
            "woodtaylor: its one round begins at the dense model, whose distance to its own outputs has no gradient: "
            "no step was taken, its solver alone pruned, with rows weighed by what they do to the outputs; ask for "
            "more rounds for steps"
        )
    tune = None if recipe.finetune is None else partial(_tune, trained, sites, loss, recipe.finetune, progress)
    return OwnLoss(expansions if needing else None, tune, tuple(notes))


def _tune(
    graph: DifferentiableGraph,
    sites: Mapping[str, Site],
    loss: LossAt,
    settings: FineTune,
    progress: Progress,
    batches: Sequence[Batch],
    dense: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
) -> tuple[str, ...]:
    """Tune the sites that a round reached; see `rounds.Tune`."""
    tuned = finetune(graph, batches, [sites[name] for name in keep], loss(dense), settings, keep, progress=progress)
    masked = "kept weights" if settings.masked else "all weights of the pruned sites"
    losses = " ".join(f"{value:.4g}" for value in tuned.losses) or "no whole epoch"
    return (f"fine-tuning of {masked} between rounds, mean loss of its epochs: {losses}", *tuned.notes)


def _check_starts(decisions: Sequence[Decision]) -> None:
    """Refuse methods that prune the dense weights anew: what tuning did would be lost on them."""
    for decision in decisions:
        if decision.rule is not None and not isinstance(decision.rule.method, IOBS | WoodTaylor):
            raise RecipeError(
                f"the recipe asks for finetune, but {decision.rule.method.name!r} of {decision.site.name!r} prunes the "
                "dense weights anew in every round; choose iobs or woodtaylor (each can hold the method as its solver)"
            )
