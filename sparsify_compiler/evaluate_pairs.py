"""Measure a sentence encoder: the rank correlation between scores that people gave pairs and the model's own.

This is the protocol of the STS benchmark: sentences are embedded by the mean over their tokens, a pair is as similar as
the cosine between its embeddings, and Spearman's correlation compares the order of these with the order of the scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, main_tensor
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.progress import Progress, silent


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences among the rows of some batches, and how similar people found them.

    `scores` (pairs,) float64, any unit, more is more similar; `rows` (pairs, 2) int64 are the places of both sentences
    among the rows of all batches, counted through in order.
    """

    scores: Tensor
    rows: Tensor


def pair_correlation(
    forward: Forward, batches: Sequence[Batch], pairs: SentencePairs, progress: Progress = silent
) -> float:
    """Return Spearman's correlation, in [-1, 1], between the scores and the cosines of the pairs' embeddings.

    `forward` returns token embeddings (sentences, length, width) first, whose mean over the tokens that the batch's
    `attention_mask` shows (all of them without one) is the embedding, or embeddings (sentences, width) as they are.
    Means and cosines are float64.

    Raises:
        DataError: fewer than two pairs, constant scores, or a pair outside the batches.
        ModelError: outputs of another shape, NaN, or every pair equally similar.
    """
    found = _embeddings(forward, batches, progress)
    if pairs.rows.numel() and int(pairs.rows.max()) >= len(found):
        raise DataError(f"sentence pairs: row {int(pairs.rows.max())} was asked, the batches hold {len(found)} rows")
    first, second = found[pairs.rows[:, 0].to(found.device)], found[pairs.rows[:, 1].to(found.device)]
    cosines = torch.nn.functional.cosine_similarity(first, second).cpu()
    scores = pairs.scores.cpu().double()
    _check_varied(scores, cosines)
    return spearman(scores, cosines)


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the linear correlation between the ranks of two (n,) tensors, equal values sharing their mean rank.

    Both must hold at least two different values. Ranks and sums are float64.
    """
    left, right = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    return float((left @ right) / (left.norm() * right.norm()))


def _ranks(values: Tensor) -> Tensor:
    """Rank from 1, (n,) float64: a value's mean place among the sorted ones."""
    _, group, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return ranks[group]


def _embeddings(forward: Forward, batches: Sequence[Batch], progress: Progress) -> Tensor:
    """Embed every row of every batch: (sentences, width) float64 on the device of the outputs."""
    if not len(batches):
        raise DataError("sentence pairs: no batch was given; give at least one")
    parts = []
    with torch.no_grad():
        for index, batch in enumerate(batches):
            progress("similarity", index, len(batches))
            parts.append(_pooled(forward(batch), batch, index))
    progress("similarity", len(batches), len(batches))
    return torch.cat(parts)


def _pooled(outputs: tuple[Tensor, ...], batch: Batch, index: int) -> Tensor:
    tokens = main_tensor(batch)
    output = outputs[0] if outputs else tokens.new_zeros(0)
    per_token = output.dim() == 3 and output.shape[:2] == tokens.shape
    if not output.is_floating_point() or not (per_token or (output.dim() == 2 and len(output) == len(tokens))):
        raise ModelError(
            f"batch {index}: sentence similarity needs embeddings (sentences, length, width) or (sentences, width) as "
            f"the first output; found {tuple(output.shape)} for token ids {tuple(tokens.shape)}; is it an encoder?"
        )
    output = output.double()
    if per_token:
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        shown = (torch.ones_like(tokens) if mask is None else mask).to(output)
        output = (shown[:, None] @ output)[:, 0] / shown.sum(1, keepdim=True)
    if count := int((~torch.isfinite(output)).any(1).sum()):
        raise ModelError(
            f"batch {index}: {count} of {len(output)} sentence embeddings are NaN or infinite; check the model in this "
            "dtype, and the data"
        )
    return output


def _check_varied(scores: Tensor, cosines: Tensor) -> None:
    if len(scores) < 2 or bool((scores == scores[0]).all()):
        found = f"all {len(scores)} scores are {float(scores[0]):g}" if len(scores) > 1 else f"{len(scores)} was given"
        raise DataError(f"sentence pairs: {found}; a rank correlation needs at least two different scores")
    if bool((cosines == cosines[0]).all()):
        raise ModelError(
            f"sentence pairs: the model finds all {len(cosines)} pairs equally similar (cosine "
            f"{float(cosines[0]):.6g}); its embeddings do not tell sentences apart, so there is no order to compare"
        )
