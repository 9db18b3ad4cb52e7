"""Tune all pruned sites at once towards the dense model's outputs, segment by segment in memory.

Knowledge distillation of the model into its own sparse self, as Kurtic et al. 2023 (arXiv 2310.06927, section 3) do for
language models, but on the calibration data alone and for a few epochs. Masks may be selected anew on the way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial

import torch
from torch import Tensor

from sparsify_compiler.boundaries import run_graph
from sparsify_compiler.checkpoint import Checkpoint
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import DifferentiableGraph, Site
from sparsify_compiler.passes.gradients import backpropagate
from sparsify_compiler.passes.refine.teacher import Distance
from sparsify_compiler.passes.refine.train import (
    SHORT,
    Gradient,
    Reselect,
    Schedule,
    TrainingState,
    add_gradients,
    train,
)
from sparsify_compiler.precision import Precision, products
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.steps import Distill

WARMUP = 0.05
"""The share of the steps over which the rate rises: Adam's first steps are as long as its later ones."""

STATE = "distill"
"""What a checkpoint calls the state of this."""


@dataclass(frozen=True)
class Epoch:
    """The losses after epoch `number`, 0 before the first: the mean while training, and on the held-out batches."""

    number: int
    training: float | None
    heldout: float


@dataclass(frozen=True)
class Distilled:
    """Every epoch, and the number of the best on held-out batches: the graph has its weights, `keep` is its masks.

    `changed` is the share of mask entries that differ from those it began with.
    """

    epochs: tuple[Epoch, ...]
    best: int
    keep: Mapping[str, Tensor]
    changed: float
    notes: tuple[str, ...] = ()


def distill(
    graph: DifferentiableGraph,
    sites: Sequence[Site],
    keep: Mapping[str, Tensor],
    training: Distance,
    heldout: Distance,
    settings: Distill,
    reselect: Reselect | None = None,
    progress: Progress = silent,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> Distilled:
    """Train the weights of `sites` on the batches of `training`, and leave `graph` with those best on `heldout`.

    `keep` (groups, out, in) bool by site name are the masks; pruned weights stay exactly zero. What training began with
    counts as epoch 0, so the held-out loss never rises; of equal losses the earlier epoch wins. Weights and Adam's
    moments are float32 where the graph runs, beside a copy of the best weights on the host. With a `checkpoint` every
    epoch is written down, 18 bytes a weight, and a run that was cut short goes on after its last whole epoch.

    Given:   %y = linear(%x, weight=%w1)     # %w1 has exact zeros
    Result:  %y = linear(%x, weight=%w2)     # the same zeros, or as many elsewhere with `reselect`

    Raises:
        CalibrationError: the graph gives no gradients, or the pruned model's held-out loss is not finite.
    """
    device = training.teacher.outputs(0)[0].device
    weights = {s.name: graph.weight(s).to(device).requires_grad_() for s in sites}
    best = _Best(graph, heldout, {name: mask.to(device) for name, mask in keep.items()})
    begin = best.restore(checkpoint)
    if begin is None:
        best.offer(0, None, weights, best.keep)

    schedule = Schedule(settings.epochs, settings.rate, settings.batches, WARMUP, seed, SHORT)
    count = len(training.teacher.batches)
    steps = schedule.steps(count)

    def say(step: int) -> None:
        done = (len(best.epochs) - 1) * steps // settings.epochs + step
        progress(f"distill, {heldout.words} {best.epochs[-1].heldout:.4g}", done, steps)

    def ended(epoch: int, loss: float, weights: Mapping[str, Tensor], keep: Mapping[str, Tensor] | None) -> None:
        assert keep is not None
        best.offer(epoch, loss, weights, keep)
        say(0)

    remember = partial(best.write, checkpoint) if checkpoint is not None else None
    say(0)
    gradient = _gradient(graph, {site.name: site for site in sites}, training, settings.precision, device)
    trained = train(weights, best.keep, count, gradient, schedule, reselect, ended, begin, remember, say)
    for site in sites:
        graph.set_weight(site, best.weights[site.name])
    final = {name: mask.cpu() for name, mask in best.keep.items()}
    moved = sum(int((mask != keep[name].cpu()).sum()) for name, mask in final.items())
    entries = sum(mask.numel() for mask in final.values())
    return Distilled(tuple(best.epochs), best.number, final, moved / max(entries, 1), trained.notes)


def _gradient(
    graph: DifferentiableGraph,
    sites: Mapping[str, Site],
    training: Distance,
    precision: Precision,
    device: torch.device,
) -> Gradient:
    """Return the gradient of the training loss as `train` takes it."""

    def gradient(weights: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
        loss = 0.0
        for number in numbers:
            batch, objective = training.teacher.batches[number], training.objective(number)
            with products(precision, device):
                value, found = backpropagate(graph, batch, objective, sites, weights)
            add_gradients(weights, {name: slope.div_(len(numbers)) for name, slope in found.items()})
            loss += value / len(numbers)
        return loss

    return gradient


@dataclass
class _Best:
    """The epochs so far, and the weights (on the host) and masks of the best on held-out batches."""

    graph: DifferentiableGraph
    heldout: Distance
    keep: Mapping[str, Tensor]
    epochs: list[Epoch] = field(default_factory=list)
    number: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, number: int, loss: float | None, weights: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> None:
        heldout = self._measure(weights)
        if not self.epochs and not math.isfinite(heldout):
            raise CalibrationError(
                f"[distill]: {self.heldout.words} is {heldout} before any training; check the pruned model's dtype, or "
                "prune less"
            )
        if not self.epochs or heldout < self.epochs[self.number].heldout:
            self.number, self.keep = number, dict(keep)
            self.weights.clear()  # before the new copy is made
            self.weights = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        self.epochs.append(Epoch(number, loss, heldout))

    def write(self, checkpoint: Checkpoint, state: TrainingState) -> None:
        """Write down an epoch's end: what training goes on from, and the best so far."""
        best = {f"best.{name}": weight for name, weight in self.weights.items()}
        best |= {f"best-keep.{name}": mask.to("cpu", copy=True) for name, mask in self.keep.items()}
        record = {"losses": state.losses, "best": self.number, "epochs": [astuple(epoch) for epoch in self.epochs]}
        checkpoint.write_state(STATE, {**state.tensors, **best}, record)

    def restore(self, checkpoint: Checkpoint | None) -> TrainingState | None:
        """Read what `write` wrote, if it did; return what training goes on from."""
        found = checkpoint.read_state(STATE) if checkpoint is not None else None
        if found is None:
            return None
        tensors, record = found
        self.number, self.epochs = record["best"], [Epoch(*epoch) for epoch in record["epochs"]]
        self.keep = {name: tensors.pop(f"best-keep.{name}").to(mask.device) for name, mask in self.keep.items()}
        self.weights = {name: tensors.pop(f"best.{name}") for name in self.keep}
        return TrainingState(tuple(record["losses"]), tensors)

    def _measure(self, weights: Mapping[str, Tensor]) -> float:
        batches = self.heldout.teacher.batches
        total = 0.0
        with torch.no_grad():
            for number, batch in enumerate(batches):
                total += float(self.heldout.objective(number)(run_graph(self.graph, batch, weights)))
        return total / len(batches)
