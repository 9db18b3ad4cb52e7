"""The rank correlation of sentence pairs, against counting by hand, and what it refuses."""

import pytest
import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.evaluate_pairs import SentencePairs, pair_correlation, spearman
from sparsify_compiler.pipeline.quality import Heldout, measure
from sparsify_compiler.progress import silent


def ranks(values: list[float]) -> list[float]:
    """Independent oracle: a value's rank is 1 + those below + half of the others that equal it."""
    return [1 + sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def pearson(one: list[float], other: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([one, other], dtype=torch.float64))[0, 1])


TABLE = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
"""An embedding a token id; id 0 is used as padding and would move every mean."""


def encoder(batch: Batch) -> tuple[Tensor, ...]:
    assert isinstance(batch, dict)
    return (TABLE[batch["input_ids"]],)


def sentences(*ids: list[int]) -> dict[str, Tensor]:
    length = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
    }


def pairs(scores: list[float], rows: list[list[int]]) -> SentencePairs:
    return SentencePairs(torch.tensor(scores, dtype=torch.float64), torch.tensor(rows))


WORDS = [[1, 2, 3], [4], [5, 6], [7, 8, 1, 2], [3, 4], [6, 6, 6]]
ROWS = [[0, 5], [3, 1], [2, 4], [0, 1], [5, 2]]
SCORES = [4.0, 0.5, 2.0, 2.0, 5.0]


def cosine(one: list[int], other: list[int]) -> float:
    a, b = (TABLE[ids].double().mean(0) for ids in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 25.0, 100.0]),
        ([3.0, 1.0, 2.0], [1.0, 3.0, 2.0]),
        ([0.0, 1.0, 1.0, 1.0, 2.0, 2.0], [5.0, 5.0, 3.0, 4.0, 9.0, 1.0]),
    ],
)
def test_equal_values_share_their_mean_rank(one: list[float], other: list[float]) -> None:
    # Sums of a few small numbers in float64: equal up to rounding.
    assert spearman(torch.tensor(one), torch.tensor(other)) == pytest.approx(
        pearson(ranks(one), ranks(other)), abs=1e-12
    )


def test_ranks_without_ties_give_the_textbook_formula() -> None:
    one, other = (torch.randperm(50, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2))
    textbook = 1 - 6 * float((one - other).square().sum()) / (50 * (50**2 - 1))
    assert spearman(one, other.exp()) == pytest.approx(textbook, abs=1e-12)


def test_embeddings_are_means_over_the_tokens_that_the_mask_shows() -> None:
    batches = [sentences(*WORDS[:2]), sentences(*WORDS[2:])]
    expected = pearson(ranks(SCORES), ranks([cosine(WORDS[a], WORDS[b]) for a, b in ROWS]))
    assert pair_correlation(encoder, batches, pairs(SCORES, ROWS)) == pytest.approx(expected, abs=1e-12)


def test_embeddings_that_a_model_pools_itself_are_taken_as_they_are() -> None:
    def pooled(batch: Batch) -> tuple[Tensor, ...]:
        assert isinstance(batch, dict)
        mask = batch["attention_mask"].double()[..., None]
        return ((TABLE[batch["input_ids"]] * mask).sum(1) / mask.sum(1),)

    batches = [sentences(*WORDS)]
    found = pair_correlation(pooled, batches, pairs(SCORES, ROWS))
    assert found == pytest.approx(pair_correlation(encoder, batches, pairs(SCORES, ROWS)), abs=1e-12)


def test_scored_pairs_decide_what_quality_is_measured() -> None:
    data = Heldout([sentences(*WORDS)], None, "pairs.tsv", pairs(SCORES, ROWS))
    (quality,) = measure(encoder, lambda batch: tuple(-y for y in encoder(batch)), data, silent)
    assert quality.measure == "Spearman correlation"
    assert quality.dense == quality.sparse  # a sign common to all embeddings leaves every cosine
    (alone,) = measure(None, encoder, data, silent)
    assert (alone.dense, alone.sparse) == (None, quality.dense)


def test_what_has_no_rank_correlation_says_why() -> None:
    batches = [sentences(*WORDS)]
    with pytest.raises(DataError, match="all 5 scores are 2; a rank correlation needs"):
        pair_correlation(encoder, batches, pairs([2.0] * 5, ROWS))
    with pytest.raises(DataError, match="1 was given"):
        pair_correlation(encoder, batches, pairs([2.0], ROWS[:1]))
    with pytest.raises(DataError, match="row 5 was asked, the batches hold 2 rows"):
        pair_correlation(encoder, [sentences(*WORDS[:2])], pairs(SCORES, ROWS))
    with pytest.raises(DataError, match="no batch"):
        pair_correlation(encoder, [], pairs(SCORES, ROWS))
    with pytest.raises(ModelError, match="all 5 pairs equally similar"):
        pair_correlation(lambda batch: (torch.ones_like(encoder(batch)[0]),), batches, pairs(SCORES, ROWS))
    with pytest.raises(ModelError, match="6 of 6 sentence embeddings are NaN"):
        pair_correlation(lambda batch: (encoder(batch)[0] * torch.nan,), batches, pairs(SCORES, ROWS))
    with pytest.raises(ModelError, match="is it an encoder"):
        pair_correlation(lambda batch: (encoder(batch)[0][:, :2],), batches, pairs(SCORES, ROWS))
