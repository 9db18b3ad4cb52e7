"""The model's own loss without labels, and its gradient through a graph, one segment's activations at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsify_compiler.batches import Batch, main_tensor, sample_count
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import DifferentiableGraph, Observer, Site, Values

Objective = Callable[[tuple[Tensor, ...]], Tensor]
"""Maps the model's outputs on one batch to a scalar, differentiably."""


class ModelLoss(Protocol):
    """What a model is to do on calibration data without labels, as a sum over the terms of each batch."""

    @property
    def words(self) -> str:
        """What the loss is, for the report."""
        ...

    def count(self, batch: Batch) -> int:
        """Return how many terms a batch has: predicted tokens, or samples."""
        ...

    def objective(self, batch: Batch) -> Objective:
        """Return the sum of a batch's terms."""
        ...

    def probe(self, batch: Batch, number: int) -> Objective | None:
        """Return what has the loss's curvature as its squared gradient, in the mean; None: the objective itself."""
        ...


@dataclass(frozen=True)
class NextToken:
    """The negative log likelihood of every token but a window's first, given those before it.

    Its own gradients, one a token, give the empirical Fisher matrix. Tokens that an `attention_mask` hides, and those
    after one that it hides, have no term.
    """

    @property
    def words(self) -> str:
        """See `ModelLoss`."""
        return "the cross-entropy of the calibration tokens themselves"

    def count(self, batch: Batch) -> int:
        """See `ModelLoss`."""
        return int((_labels(batch) >= 0).sum())

    def objective(self, batch: Batch) -> Objective:
        """See `ModelLoss`."""

        def summed(outputs: tuple[Tensor, ...]) -> Tensor:
            logits = outputs[0][:, :-1].flatten(0, 1).float()
            labels = _labels(batch).flatten().to(logits.device)
            return cross_entropy(logits, labels, ignore_index=-1, reduction="sum")

        return summed

    def probe(self, batch: Batch, number: int) -> Objective | None:
        """See `ModelLoss`."""
        return None


@dataclass(frozen=True)
class DenseOutputs:
    """½ ‖y − y_dense‖² over all outputs of a sample; `dense` runs the dense model.

    Its Hessian is JᵀJ up to what vanishes at the dense model, J the derivative of the outputs, and that is the mean of
    (Jᵀε)(Jᵀε)ᵀ over random signs ε: the probe, which has a gradient where the loss itself has none. An output's logits
    are compared too, not their probabilities: a graph does not say which outputs are logits.
    """

    dense: Callable[[Batch], tuple[Tensor, ...]]

    @property
    def words(self) -> str:
        """See `ModelLoss`."""
        return "half the squared distance to the dense model's outputs"

    def count(self, batch: Batch) -> int:
        """See `ModelLoss`."""
        return sample_count(batch)

    def objective(self, batch: Batch) -> Objective:
        """See `ModelLoss`."""
        with torch.no_grad():
            targets = self.dense(batch)

        def summed(outputs: tuple[Tensor, ...]) -> Tensor:
            pairs = zip(outputs, targets, strict=True)
            return _sum([(y - target.to(y)).float().square().sum() / 2 for y, target in pairs if y.is_floating_point()])

        return summed

    def probe(self, batch: Batch, number: int) -> Objective | None:
        """See `ModelLoss`; the signs are drawn from `number`."""

        def signed(outputs: tuple[Tensor, ...]) -> Tensor:
            generator = torch.Generator().manual_seed(number)  # on the host: the same signs on every device
            signs = [(torch.rand(y.shape, generator=generator) < 0.5).to(y.device) for y in outputs]
            pairs = zip(outputs, signs, strict=True)
            return _sum([torch.where(sign, -y, y).float().sum() for y, sign in pairs if y.is_floating_point()])

        return signed


def backpropagate(
    graph: DifferentiableGraph,
    batch: Batch,
    objective: Objective,
    sites: Mapping[str, Site],
    weights: Mapping[str, Tensor] | None = None,
    observe: Observer | None = None,
    emit: Observer | None = None,
    keep: bool = True,
) -> tuple[float, dict[str, Tensor]]:
    """Return the objective on one batch and its gradient by the weight (groups, out, in) float32 of each of `sites`.

    The model is run forwards once without a record, keeping what is alive between segments; then segment after segment
    is run again, from the last, with one: memory is that of one batch's values at every cut and of one segment's
    activations, all on the graph's device. `weights` by site name stand in for the graph's own. `observe` and `emit`
    are called in that second run, as `run_segment` says, `emit` with outputs that take gradient hooks. Without `keep`,
    for what they see alone, a segment's gradients by its weights are dropped when it is done, and none come back. A
    weight that is read in another segment as well (an embedding tied to the head) counts there as the graph has it. An
    objective that is not finite comes back without gradients.

    Raises:
        CalibrationError: the graph gives no gradients.
    """
    held = weights or {}
    boundaries = [graph.enter(batch)]
    with torch.no_grad():
        for segment in graph.segments:
            own = {name: held[name] for name in segment.sites if name in held}
            boundaries.append(graph.run_segment(segment.index, boundaries[-1], weights=own))
    leaves = _leaves(boundaries.pop())
    with torch.enable_grad():
        value = objective(graph.outputs(leaves))
    if not torch.isfinite(value):
        return float(value.detach()), {}
    slopes = _slopes([value], [torch.ones_like(value)], leaves, {})[0]
    found: dict[str, Tensor] = {}
    first = min((site.segment for site in sites.values()), default=len(graph.segments))
    for segment in reversed(graph.segments[first:]):
        values = _leaves(boundaries.pop())
        own = {n: held[n] if n in held else graph.weight(sites[n]) for n in segment.sites if n in held or n in sites}
        own = {name: weight.detach().requires_grad_(name in sites) for name, weight in own.items()}
        with torch.enable_grad():
            after = graph.run_segment(segment.index, values, observe, own, emit)
        reached = [name for name in slopes if after[name].requires_grad]
        wanted = {name: weight for name, weight in own.items() if name in sites}
        slopes, gradients = _slopes([after[name] for name in reached], [slopes[n] for n in reached], values, wanted)
        if keep:
            found |= gradients
        del gradients  # else they stay until those of the next segment are made
    return float(value.detach()), found


def _leaves(values: Values) -> Values:
    """Return the values with every floating tensor a leaf that takes a gradient."""

    def leaf(value: object) -> object:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if floating and isinstance(value, Tensor) else value

    return {name: leaf(value) for name, value in values.items()}


def _slopes(
    roots: Sequence[Tensor], slopes: Sequence[Tensor], values: Values, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Carry the gradients by `roots` back to the leaves among `values`, and to `weights` (zero where none arrives)."""
    leaves = {name: v for name, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
    if not roots:
        return {}, {name: torch.zeros_like(weight) for name, weight in weights.items()}
    found = torch.autograd.grad(roots, [*leaves.values(), *weights.values()], slopes, allow_unused=True)
    carried = {name: slope for name, slope in zip(leaves, found, strict=False) if slope is not None}
    given = zip(weights.items(), found[len(leaves) :], strict=True)
    return carried, {name: torch.zeros_like(weight) if slope is None else slope for (name, weight), slope in given}


def _labels(batch: Batch) -> Tensor:
    """Return for every place but a window's last the id that follows it, -1 where it is not predicted."""
    ids = main_tensor(batch)
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is None:
        return ids[:, 1:].long()
    return ids[:, 1:].long().masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), -1)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    if not terms:
        raise CalibrationError("the model has no floating-point output to take a loss of; choose a method without one")
    return torch.stack(list(terms)).sum()
