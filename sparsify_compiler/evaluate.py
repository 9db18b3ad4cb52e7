"""Measure a model's quality: perplexity, top-k accuracy, and how close its outputs stay to the dense model's.

Every measure takes plain functions of a batch, so a torch module, an ONNX Runtime session and a compiled model are
measured by the same code. Sums are kept in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, Padding, main_tensor, padding
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.progress import Progress, silent

ROWS_AT_A_TIME = 256
"""Rows of logits that are turned into probabilities at once: 50 MB in float32 at 49,152 token ids."""

Forward = Callable[[Batch], tuple[Tensor, ...]]
"""A model as evaluation sees it: a batch in, its output tensors out; the first is the logits."""


@dataclass(frozen=True)
class Fidelity:
    """How close outputs stay: ‖Y − Ŷ‖² / ‖Y‖² and the cosine between Y and Ŷ, over all outputs of all batches."""

    relative_error: float
    cosine: float


def perplexity(forward: Forward, batches: Sequence[Batch], progress: Progress = silent) -> float:
    """Return exp of the mean over windows of each window's mean negative log likelihood.

    `forward` returns logits (windows, length, vocabulary) first; a batch holds `input_ids` (windows, length), by name
    or as its first tensor. Every token but a window's first is predicted from those before it in the window. Where a
    batch has an `attention_mask`, tokens it hides are not counted. This is the protocol of Frantar & Alistarh 2023,
    section 4, on windows that do not overlap.

    Raises:
        DataError: no batch, a window of fewer than two tokens, or ids and logits of different sizes.
        ModelError: the logits of a batch are NaN.
    """
    total, windows = 0.0, 0
    with torch.no_grad():
        for index, batch in enumerate(batches):
            progress("perplexity", index, len(batches))
            ids = main_tensor(batch)
            logits = _first(forward(batch), index)
            if logits.ndim != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
                raise DataError(
                    f"batch {index}: perplexity needs input_ids (windows, length >= 2) and logits (windows, length, "
                    f"vocabulary); found {tuple(ids.shape)} and {tuple(logits.shape)}; is it a language model?"
                )
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            for window in range(len(ids)):
                counted = None if mask is None else mask[window, 1:].bool()
                total += _window_loss(logits[window], ids[window], counted, index)
                windows += 1
    progress("perplexity", len(batches), len(batches))
    if not windows:
        raise DataError("perplexity was asked of no window; give text of at least one window")
    return math.exp(total / windows) if total / windows < 700 else math.inf


def top_k_accuracy(
    forward: Forward,
    batches: Sequence[Batch],
    labels: Sequence[Tensor],
    k: tuple[int, ...] = (1, 5),
    progress: Progress = silent,
) -> tuple[float, ...]:
    """Return for each of `k` the share, in [0, 1], of samples whose label is among the k highest scores.

    `forward` returns scores (samples, classes) first; `labels` holds one int64 (samples,) per batch, 0-based. Among
    equal scores the lower class index ranks first.

    Raises:
        DataError: scores or labels of other sizes, or a label outside [0, classes).
        ModelError: the scores of a batch are NaN.
    """
    if len(batches) != len(labels):
        raise DataError(f"top-k accuracy: {len(batches)} batches but labels for {len(labels)}")
    right, samples = [0] * len(k), 0
    with torch.no_grad():
        for index, (batch, label) in enumerate(zip(batches, labels, strict=True)):
            progress("accuracy", index, len(batches))
            scores = _first(forward(batch), index)
            _check_scores(scores, label, index)
            ranks = _ranks(scores, label.to(scores.device))
            right = [count + int((ranks < limit).sum()) for count, limit in zip(right, k, strict=True)]
            samples += len(label)
    progress("accuracy", len(batches), len(batches))
    if not samples:
        raise DataError("top-k accuracy was asked of no sample; give labelled data")
    return tuple(count / samples for count in right)


def fidelity(dense: Forward, sparse: Forward, batches: Sequence[Batch], progress: Progress = silent) -> Fidelity:
    """Compare the floating-point outputs of two models on the same batches, every output counted.

    Rows of an output (samples, length, ...) that the batch's `attention_mask` hides are left out.

    Raises:
        DataError: no batch.
        ModelError: the two models' outputs differ in number or shape, none is floating point, or one is NaN.
    """
    error = energy = energy_sparse = product = 0.0
    if not len(batches):
        raise DataError("fidelity was asked of no batch; give data, or let inputs be generated")
    with torch.no_grad():
        for index, batch in enumerate(batches):
            progress("fidelity", index, len(batches))
            for reference, other in _pairs(dense(batch), sparse(batch), index, padding(batch)):
                error += float((reference - other).square().sum())
                energy += float(reference.square().sum())
                energy_sparse += float(other.square().sum())
                product += float((reference * other).sum())
    progress("fidelity", len(batches), len(batches))
    if energy == 0:
        return Fidelity(0.0 if error == 0 else math.inf, 1.0 if error == 0 else 0.0)
    scale = math.sqrt(energy) * math.sqrt(energy_sparse)
    return Fidelity(error / energy, product / scale if scale else 0.0)


def _first(outputs: tuple[Tensor, ...], index: int) -> Tensor:
    if not outputs:
        raise ModelError(f"batch {index}: the model returned no tensor")
    return outputs[0]


def _window_loss(logits: Tensor, ids: Tensor, counted: Tensor | None, index: int) -> float:
    """Mean negative log likelihood of one window: logits (length, vocabulary), ids (length,)."""
    logits, targets = logits[:-1], ids[1:].to(logits.device)
    if int(targets.max()) >= logits.shape[1] or int(targets.min()) < 0:
        raise DataError(f"batch {index}: token id {int(targets.max())}, but the logits cover {logits.shape[1]} ids")
    losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(
                logits[start : start + ROWS_AT_A_TIME].float(),
                targets[start : start + ROWS_AT_A_TIME],
                reduction="none",
            ).double()
            for start in range(0, len(targets), ROWS_AT_A_TIME)
        ]
    )
    if counted is not None:
        losses = losses[counted.to(losses.device)]
    if not len(losses):
        raise DataError(f"batch {index}: its attention_mask hides every token that could be predicted")
    loss = float(losses.mean())
    if math.isnan(loss):
        raise ModelError(f"batch {index}: the logits are NaN; check the model in this dtype, and the data")
    return loss


def _check_scores(scores: Tensor, label: Tensor, index: int) -> None:
    if scores.ndim != 2 or label.shape != scores.shape[:1]:
        raise DataError(
            f"batch {index}: accuracy needs scores (samples, classes) and labels (samples,); found "
            f"{tuple(scores.shape)} and {tuple(label.shape)}"
        )
    if torch.isnan(scores).any():
        raise ModelError(f"batch {index}: the scores are NaN; check the model in this dtype, and the data")
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < scores.shape[1]:
        raise DataError(
            f"batch {index}: labels from {int(label.min())} to {int(label.max())}, but the model scores "
            f"{scores.shape[1]} classes; labels count from 0"
        )


def _ranks(scores: Tensor, label: Tensor) -> Tensor:
    """Count per row the classes that rank before the label: (samples,)."""
    own = scores.gather(1, label[:, None])  # (samples, 1)
    earlier = torch.arange(scores.shape[1], device=scores.device) < label[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)


def _pairs(
    dense: tuple[Tensor, ...], sparse: tuple[Tensor, ...], index: int, hidden: Padding | None
) -> list[tuple[Tensor, Tensor]]:
    """Match the floating-point outputs of one batch, in float64 on the CPU."""
    shapes, other_shapes = ([tuple(y.shape) for y in outputs] for outputs in (dense, sparse))
    if shapes != other_shapes:
        raise ModelError(f"batch {index}: the models return outputs of shapes {shapes} and {other_shapes}")
    pairs = []
    for position, (y, other) in enumerate(zip(dense, sparse, strict=True)):
        if not y.is_floating_point():
            continue
        if hidden is not None:
            y, other = hidden.drop(y), hidden.drop(other)
        for name, tensor in (("dense", y), ("sparse", other)):
            if count := int(torch.isnan(tensor).sum()):
                raise ModelError(
                    f"batch {index}: output {position} of the {name} model has {count} NaN of {tensor.numel()} values; "
                    "check the model in this dtype, and the data"
                )
        pairs.append((y.detach().double().cpu(), other.detach().double().cpu()))
    if not pairs:
        raise ModelError(f"batch {index}: no output is floating point; nothing to compare")
    return pairs
