"""Tune the kept weights of one segment so that it returns the dense model's values from the pruned prefix's.

Block-wise reconstruction, as in BRECQ (Li et al. 2021, arXiv 2102.05426, section 3.2) without its Fisher weights, for
weights with holes. It stands inside the walk: the next segment is pruned through the tuned one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.batches import padding
from sparsify_compiler.graph import DifferentiableGraph
from sparsify_compiler.passes.refine.train import SHORT, Schedule, add_gradients, train
from sparsify_compiler.precision import Precision, products
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.refinement import PrunedSegment, Refined
from sparsify_compiler.steps import Reconstruct


@dataclass(frozen=True)
class SegmentFit:
    """What tuning did to segment `name`: its relative error on the calibration batches before and after.

    The error is the sum over the values that leave the segment of ‖y − y_dense‖² / ‖y_dense‖². `kept` False: it did not
    fall, and the weights are those that pruning left.
    """

    name: str
    before: float
    after: float
    kept: bool
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the fields as a checkpoint's JSON gives them back."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class Reconstruction:
    """The `refinement.Refine` of a recipe's [reconstruct] table.

    `graph` runs the segments of the graph that is pruned, with gradients: that graph itself, or a view of it.

    Given:   %y = linear(%x, weight=%w1)     # %w1 has exact zeros; the dense model has %y0 here
    Result:  %y = linear(%x, weight=%w2)     # the same zeros, %y nearer %y0
    """

    graph: DifferentiableGraph
    settings: Reconstruct
    progress: Progress = silent
    seed: int = 0

    def __call__(self, segment: PrunedSegment) -> Refined:
        """Return the tuned weights, or none where their error on the calibration batches did not fall."""
        task = _Task(self.graph, segment)
        name = segment.graph.segments[segment.index].name
        if not task.energies:
            why = f"{name}: no floating-point value of finite energy leaves it, so there is nothing to reconstruct"
            return Refined({}, SegmentFit(name, 0.0, 0.0, kept=False, notes=(why,)).record())
        before = task.error(task.weights)
        keep = {name: site.keep.to(task.device) for name, site in segment.sites.items()}
        settings = self.settings
        schedule = Schedule(settings.epochs, settings.rate, settings.batches, seed=self.seed, decay=SHORT)

        def gradient(weights: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
            scale = len(segment.batches) / len(numbers)  # the size of the error over all batches, whatever a step takes
            return sum(task.add_gradient(weights, number, scale, settings.precision) for number in numbers)

        def ended(epoch: int, loss: float, weights: Mapping[str, Tensor], keep: Mapping[str, Tensor] | None) -> None:
            self.progress(f"reconstruct {name}, error {loss:.3g}", epoch, settings.epochs)

        trained = train(task.weights, keep, len(segment.batches), gradient, schedule, after_epoch=ended)
        after = task.error(task.weights)
        fit = SegmentFit(name, before, after, kept=after < before, notes=trained.notes)
        tuned = {name: weight.detach().cpu() for name, weight in task.weights.items()} if fit.kept else {}
        return Refined(tuned, fit.record())


class _Task:
    """One segment, how far it is from what it should return, and its weights, leaf tensors where the segment runs."""

    def __init__(self, graph: DifferentiableGraph, segment: PrunedSegment) -> None:
        self._graph, self._segment = graph, segment
        self._hidden = [padding(batch) for batch in segment.batches]
        self.energies = self._energies()
        with torch.no_grad():
            made = graph.run_segment(segment.index, segment.inputs[0])
        self.device = next((made[name].device for name in self.energies), torch.device("cpu"))
        self.weights = {
            name: site.weight.to(self.device, torch.float32, copy=True).requires_grad_()
            for name, site in segment.sites.items()
        }

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Return the relative error over all batches, in float32."""
        with torch.no_grad():
            return sum(float(self._error(weights, number)) for number in range(len(self._hidden)))

    def add_gradient(self, weights: Mapping[str, Tensor], number: int, scale: float, precision: Precision) -> float:
        """Add the gradient of one batch's error times `scale` to the weights' `grad`, and return that product."""
        with torch.enable_grad():
            with products(precision, self.device):
                loss = self._error(weights, number) * scale
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        add_gradients(weights, dict(zip(weights, found, strict=True)))
        return float(loss.detach())

    def _error(self, weights: Mapping[str, Tensor], number: int) -> Tensor:
        segment = self._segment
        made = self._graph.run_segment(segment.index, segment.inputs[number], weights=weights)
        terms = []
        for name, energy in self.energies.items():
            wanted = segment.targets[number][name].to(self.device, torch.float32, non_blocking=True)
            terms.append(self._shown(made[name].float() - wanted, number).square().sum() / energy)
        return torch.stack(terms).sum()

    def _energies(self) -> dict[str, float]:
        """Return ‖y‖² over all batches of every floating value that the segment makes, but for those it cannot be of.

        A value that was alive before passes through. An additive mask holds infinities, or is zero throughout.
        """
        first, before = self._segment.targets[0], self._segment.inputs[0]
        names = [n for n, v in first.items() if isinstance(v, Tensor) and v.is_floating_point() and n not in before]
        found = dict.fromkeys(names, 0.0)
        for number, values in enumerate(self._segment.targets):
            for name in names:
                found[name] += float(self._shown(values[name], number).square().sum(dtype=torch.float64))
        return {name: energy for name, energy in found.items() if math.isfinite(energy) and energy > 0}

    def _shown(self, value: Tensor, number: int) -> Tensor:
        """Leave out the rows that are padding in batch `number`."""
        hidden = self._hidden[number]
        return value if hidden is None else hidden.drop(value)
