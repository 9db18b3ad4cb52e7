"""Measure a model as a whole, by what the data allows: accuracy, rank correlation, perplexity, or fidelity."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, main_tensor
from sparsify_compiler.errors import DataError
from sparsify_compiler.evaluate import Forward, fidelity, perplexity, top_k_accuracy
from sparsify_compiler.evaluate_pairs import SentencePairs, pair_correlation
from sparsify_compiler.export.report import Quality
from sparsify_compiler.progress import Progress

CAUSAL = 1e-4
"""Logits that change less than this share of what later tokens change at their own places are rounding: experts that
see other counts of tokens round otherwise. A masked language model of random weights changes ten times as much."""


@dataclass(frozen=True)
class Heldout:
    """Data to measure quality on: batches, one label tensor a batch where there are labels, and what it is in words.

    `pairs` are scored pairs among the rows of the batches, which are then sentences.
    """

    batches: Sequence[Batch]
    labels: Sequence[Tensor] | None = None
    description: str = "held-out data"
    pairs: SentencePairs | None = None


def measure(dense: Forward | None, sparse: Forward, data: Heldout, progress: Progress) -> tuple[Quality, ...]:
    """Measure what can be: correlation with scores, accuracy with labels, a causal model's perplexity, or fidelity."""
    if not data.batches:
        raise DataError(f"{data.description}: no batch was given; give at least one")
    if data.pairs is not None:
        old = pair_correlation(dense, data.batches, data.pairs, progress) if dense else None
        new = pair_correlation(sparse, data.batches, data.pairs, progress)
        return (Quality("Spearman correlation", old, new, data.description),)
    if data.labels is not None:
        after = top_k_accuracy(sparse, data.batches, data.labels, progress=progress)
        before = top_k_accuracy(dense, data.batches, data.labels, progress=progress) if dense else (None, None)
        return tuple(
            Quality(name, old, new, data.description)
            for name, old, new in zip(("top-1 accuracy", "top-5 accuracy"), before, after, strict=True)
        )
    if is_language_model(sparse, data.batches[0]):
        old = perplexity(dense, data.batches, progress) if dense else None
        return (Quality("perplexity", old, perplexity(sparse, data.batches, progress), data.description),)
    if dense is None:
        raise DataError(
            "without labels, and not a causal language model on token ids: only a comparison can be measured; give the "
            "dense model too"
        )
    close = fidelity(dense, sparse, data.batches, progress)
    return (
        Quality("relative error", 0.0, close.relative_error, data.description),
        Quality("cosine", 1.0, close.cosine, data.description),
    )


def is_language_model(forward: Forward, batch: Batch) -> bool:
    """Say whether the first output predicts every token from those before it: logits over the vocabulary, causal.

    Causality is found by experiment, at the batch's own sizes because a graph may take no others: the later half of
    each window's tokens is replaced, and the logits of the earlier half must stay.
    """
    ids = main_tensor(batch)
    if ids.is_floating_point() or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    logits = _logits(forward, batch)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape or logits.shape[2] <= int(ids.max()):
        return False
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rank = seen.cumsum(1)
    earlier = seen & (rank <= rank[:, -1:] // 2)
    if not bool(earlier.any()):
        return False
    low, high = int(ids.min()), int(ids.max())
    other = high if high > low else int(low == 0)
    replaced = torch.where(seen & ~earlier, torch.where(ids == low, other, low), ids)
    after = _logits(forward, _with_ids(batch, ids, replaced))
    if after is None or after.shape != logits.shape:
        return False
    change = (after.double() - logits.double()).abs().amax(2).cpu()  # (windows, length)
    earlier = earlier.cpu()
    return bool(change[earlier].max() <= CAUSAL * change[~earlier].max())


def _logits(forward: Forward, batch: Batch) -> Tensor | None:
    with torch.no_grad():
        outputs = forward(batch)
    return outputs[0] if outputs and outputs[0].numel() else None


def _with_ids(batch: Batch, ids: Tensor, replaced: Tensor) -> Batch:
    """Return the batch with the tensor `ids` replaced."""
    if isinstance(batch, Tensor):
        return replaced
    if isinstance(batch, dict):
        return {name: replaced if tensor is ids else tensor for name, tensor in batch.items()}
    return tuple(replaced if tensor is ids else tensor for tensor in batch)
