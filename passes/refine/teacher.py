"""What the dense model says on some batches, and how far another model's outputs are from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, Padding, padding
from sparsify_compiler.boundaries import Boundaries, values_bytes
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import Graph, Site
from sparsify_compiler.passes.gradients import Objective
from sparsify_compiler.progress import Progress, silent

ROWS_AT_A_TIME = 256
"""Rows of scores that are turned into probabilities at once: 50 MB in float32 at 49,152 token ids."""

SMALLEST = 1e-30
"""What a probability below it counts as, so that its logarithm is finite."""


class Teacher:
    """The dense model's outputs on `batches`, remembered as what is alive before its last segment.

    A language model's logits would be a hundred times as large. Build it while `graph` is dense: of `sites`, which
    will be pruned, it copies the weights that the last segment reads. Where more of that segment will change (`whole`),
    the outputs themselves are remembered.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[Batch],
        sites: Sequence[Site],
        progress: Progress = silent,
        whole: bool = False,
    ) -> None:
        self.batches = batches
        self._graph, self._last = graph, len(graph.segments) - 1
        boundaries = Boundaries(graph, batches)
        for segment in graph.segments[:-1]:
            progress("run the dense model", segment.index, self._last)
            boundaries.advance(segment.index)
        self._values = boundaries.values
        self._weights = {site.name: graph.weight(site) for site in sites if site.segment == self._last}
        self._outputs: list[tuple[Tensor, ...]] = []
        self._home = torch.device("cpu")
        if whole:
            self._remember()

    def outputs(self, number: int) -> tuple[Tensor, ...]:
        """Return the dense model's outputs on batch `number`; whoever asks may write into them."""
        if self._outputs:
            return tuple(y.to(self._home, copy=True) for y in self._outputs[number])
        values = self._values[number]
        held = {value.untyped_storage().data_ptr() for value in values.values() if isinstance(value, Tensor)}
        with torch.no_grad():
            outputs = self._graph.outputs(self._graph.run_segment(self._last, values, weights=self._weights))
        return tuple(y.clone() if y.untyped_storage().data_ptr() in held else y for y in outputs)

    def size_bytes(self) -> int:
        """Count the bytes that are held."""
        whole = sum(y.numel() * y.element_size() for outputs in self._outputs for y in outputs)
        return whole + sum(values_bytes(values) for values in (*self._values, self._weights))

    def _remember(self) -> None:
        """Make every batch's outputs, and forget what they are made of."""
        made = []
        for number in range(len(self.batches)):
            outputs = self.outputs(number)
            self._home = outputs[0].device
            made.append(tuple(y.cpu() for y in outputs))
        self._outputs, self._values, self._weights = made, [], {}


class Distance(Protocol):
    """How far a model's outputs are from the dense model's: the mean over batches of one loss a batch."""

    @property
    def teacher(self) -> Teacher:
        """The dense model."""
        ...

    @property
    def words(self) -> str:
        """What is measured, for the report."""
        ...

    def objective(self, number: int) -> Objective:
        """Return the loss of batch `number`."""
        ...


@dataclass(frozen=True)
class Divergence:
    """KL(dense ‖ other) in nats, a token or a sample, of the distributions over the last axis of the first output.

    The loss of Hinton et al. 2015 (arXiv 1503.02531), eq. 1 at temperature 1, without labels. Tokens that an
    `attention_mask` hides are not counted. `probabilities`: the outputs are such, not scores.
    """

    teacher: Teacher
    probabilities: bool = False
    words: str = "KL divergence to the dense model"

    def objective(self, number: int) -> Objective:
        """See `Distance`. Probabilities are made in float32, a few rows at a time."""
        hidden = padding(self.teacher.batches[number])

        def mean(outputs: tuple[Tensor, ...]) -> Tensor:
            dense, scores = self.teacher.outputs(number)[0], outputs[0]
            rows, dense = scores.flatten(0, -2), dense.flatten(0, -2)
            counted = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            if hidden is not None and tuple(scores.shape[:2]) == hidden.shape:
                counted.zero_()[hidden.shown.to(rows.device)] = True
            value: Tensor = _Divergence.apply(rows, dense, counted, self.probabilities)  # type: ignore[no-untyped-call]
            return value

        return mean


@dataclass(frozen=True)
class RelativeError:
    """‖y − y_dense‖² / ‖y_dense‖² of every floating-point output, over all batches, summed over outputs.

    `energies` are ‖y_dense‖² over all batches, output by output, None for one that is not compared. Rows of tokens that
    an `attention_mask` hides are left out. Use `of`.
    """

    teacher: Teacher
    energies: tuple[float | None, ...]
    words: str = "relative error to the dense model"

    @classmethod
    def of(cls, teacher: Teacher) -> "RelativeError":
        """Measure the dense outputs of all batches first."""
        sums: list[float | None] = []
        for number in range(len(teacher.batches)):
            outputs = _shown(teacher.outputs(number), padding(teacher.batches[number]))
            found = [float(y.double().square().sum()) if y.is_floating_point() else None for y in outputs]
            sums = (
                found
                if not sums
                else [a if b is None or a is None else a + b for a, b in zip(sums, found, strict=True)]
            )
        if not any(sums):
            raise CalibrationError(
                "distillation: no output of the dense model is floating point and not zero throughout"
            )
        return cls(teacher, tuple(energy or None for energy in sums))

    def objective(self, number: int) -> Objective:
        """See `Distance`."""
        hidden = padding(self.teacher.batches[number])

        def share(outputs: tuple[Tensor, ...]) -> Tensor:
            both = (_shown(values, hidden) for values in (outputs, self.teacher.outputs(number)))
            triples = zip(*both, self.energies, strict=True)
            terms = [(y.float() - t.float()).square().sum() / e for y, t, e in triples if e is not None]
            return torch.stack(terms).sum() * len(self.teacher.batches)

        return share


def _shown(outputs: tuple[Tensor, ...], hidden: Padding | None) -> tuple[Tensor, ...]:
    return outputs if hidden is None else tuple(map(hidden.drop, outputs))


def sums_to_one(scores: Tensor) -> bool:
    """Say whether every row of `scores` (..., classes) is a distribution, to 1e-3: a model that ends in a softmax."""
    rows = scores.float()
    return bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-3).all())


class _Divergence(torch.autograd.Function):
    """Mean over the counted rows of KL(dense ‖ scores), its gradient made beside it, in the memory of `dense`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dense: Tensor, counted: Tensor, probabilities: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=scores.device)
        rows = counted.sum()
        for start in range(0, len(scores), ROWS_AT_A_TIME):
            part = slice(start, start + ROWS_AT_A_TIME)
            wanted, log_wanted = _distribution(dense[part], probabilities)
            found, log_found = _distribution(scores[part], probabilities)
            use = counted[part, None]
            total += (
                (wanted * (log_wanted - log_found))
                .sum(-1, keepdim=True)
                .masked_fill(~use, 0.0)
                .sum(dtype=torch.float64)
            )
            slope = -wanted / found.clamp_min(SMALLEST) if probabilities else found - wanted
            dense[part] = (slope / rows).masked_fill(~use, 0.0)
        ctx.save_for_backward(dense)
        return (total / rows).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad, None, None, None


def _distribution(scores: Tensor, probabilities: bool) -> tuple[Tensor, Tensor]:
    """Return probabilities (rows, classes) float32 and their logarithms."""
    if probabilities:
        found = scores.float()
        return found, found.clamp_min(SMALLEST).log()
    logarithms = scores.float().log_softmax(-1)
    return logarithms.exp(), logarithms
