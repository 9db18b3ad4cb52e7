"""Tune the weights between two rounds of pruning towards the model's own loss, segment by segment in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.boundaries import run_graph
from sparsify_compiler.graph import DifferentiableGraph, Site
from sparsify_compiler.passes.gradients import ModelLoss, backpropagate
from sparsify_compiler.passes.refine.train import Schedule, Trained, add_gradients, train
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.steps import FineTune


def finetune(
    graph: DifferentiableGraph,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    loss: ModelLoss,
    settings: FineTune,
    keep: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Trained:
    """Train the weights of `sites` on `batches` by Adam and leave `graph` with them; the mean loss is that of a term.

    Wu et al. 2024 (I-OBS), section 5: between rounds the whole model is tuned on the round's calibration data, pruned
    weights included, and the next round prunes it again with masks free. Theirs then prunes the tuned model for its own
    sake. Here it is where the next round starts (`LayerProblem.start`), and the dense model's outputs stay the target
    of its layer problems: a model tuned on little data is no better teacher than the dense one, and errors of one
    round would be the aim of the next. With a small `step`, iobs prunes the tuned weights as the paper does.

    `keep` (groups, out, in) bool by site name keeps pruned weights zero, where `settings.masked`. The rate falls to
    zero along a cosine. Weights and Adam's moments are float32 where the graph runs: 12 bytes a weight, beside what
    `backpropagate` holds. A loss that is not finite leaves the weights as they were, which a note says. The order
    of the batches is drawn from `seed`.

    Raises:
        CalibrationError: the graph gives no gradients.
    """
    with torch.no_grad():  # a graph says where it runs by what it makes
        device = run_graph(graph, batches[0])[0].device
    weights = {site.name: graph.weight(site).to(device).requires_grad_() for site in sites}
    by_name = {site.name: site for site in sites}
    masks = {n: keep[n].to(w.device) for n, w in weights.items()} if settings.masked and keep is not None else None

    def gradient(weights: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
        terms = max(sum(loss.count(batches[number]) for number in numbers), 1)
        total = 0.0
        for number in numbers:
            batch = batches[number]
            value, found = backpropagate(graph, batch, loss.objective(batch), by_name, weights)
            add_gradients(weights, {name: slope.div_(terms) for name, slope in found.items()})
            total += value
        return total / terms

    def ended(epoch: int, loss: float, weights: object, keep: object) -> None:
        progress("fine-tune", epoch, settings.epochs)

    progress("fine-tune", 0, settings.epochs)
    schedule = Schedule(settings.epochs, settings.rate, settings.batches, seed=seed)
    trained = train(weights, masks, len(batches), gradient, schedule, after_epoch=ended)
    if trained.notes:  # a loss that was lost: of its weights nothing is known
        return replace(trained, notes=(*trained.notes, "the weights stay as they were before the fine-tuning"))
    for site in sites:
        graph.set_weight(site, weights[site.name])
    return trained
