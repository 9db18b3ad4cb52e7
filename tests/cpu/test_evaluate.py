import math

import pytest
import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.evaluate import ROWS_AT_A_TIME, fidelity, perplexity, top_k_accuracy


def random_logits(batch: Batch) -> tuple[Tensor, ...]:
    assert isinstance(batch, dict)
    ids = batch["input_ids"]
    generator = torch.Generator().manual_seed(int(ids.sum()))
    return (torch.randn(*ids.shape, 11, generator=generator),)


def windows(count: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(11, (count, length), generator=torch.Generator().manual_seed(seed))}


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    found = perplexity(lambda batch: (torch.zeros(2, 9, 11),), [windows(2, 9)])
    assert found == pytest.approx(11, rel=1e-6)  # float32 log-softmax


def test_perplexity_is_the_mean_over_windows_token_by_token() -> None:
    batches = [windows(2, ROWS_AT_A_TIME + 40, seed=1), windows(1, 5, seed=2)]
    means = []
    for batch in batches:
        probabilities = random_logits(batch)[0].double().softmax(dim=-1)
        for window, ids in enumerate(batch["input_ids"]):
            terms = [-math.log(probabilities[window, t - 1, ids[t]]) for t in range(1, len(ids))]
            means.append(sum(terms) / len(terms))
    expected = math.exp(sum(means) / len(means))
    assert perplexity(random_logits, batches) == pytest.approx(expected, rel=1e-5)  # float32 log-softmax


def test_hidden_tokens_are_not_counted() -> None:
    batch = windows(1, 8)
    shorter = {"input_ids": batch["input_ids"][:, :5]}
    logits = random_logits(batch)[0]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    masked = perplexity(lambda _: (logits,), [{**batch, "attention_mask": mask}])
    assert masked == pytest.approx(perplexity(lambda _: (logits[:, :5],), [shorter]), rel=1e-12)


def test_nan_logits_name_the_batch() -> None:
    def second_is_nan(batch: Batch) -> tuple[Tensor, ...]:
        logits = random_logits(batch)[0]
        return (logits * math.nan if len(logits) == 2 else logits,)

    with pytest.raises(ModelError, match="batch 1: the logits are NaN"):
        perplexity(second_is_nan, [windows(1, 4), windows(2, 4)])


def test_outputs_that_are_no_logits_are_an_error() -> None:
    with pytest.raises(DataError, match="is it a language model"):
        perplexity(lambda b: (torch.zeros(2, 3),), [windows(2, 4)])


def test_no_window_is_an_error() -> None:
    with pytest.raises(DataError, match="no window"):
        perplexity(random_logits, [])


def test_accuracy_counts_labels_among_the_highest_scores() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.1], [0.2, 0.3, 0.5]])
    labels = torch.tensor([2, 0, 0])
    one, two, five = top_k_accuracy(lambda _: (scores,), [scores], [labels], k=(1, 2, 5))
    assert (one, two, five) == (1 / 3, 2 / 3, 1.0)


def test_equal_scores_rank_the_lower_class_first() -> None:
    scores = torch.zeros(2, 4)
    assert top_k_accuracy(lambda _: (scores,), [scores], [torch.tensor([0, 3])], k=(1, 3)) == (0.5, 0.5)


def test_a_label_beyond_the_classes_is_an_error() -> None:
    scores = torch.zeros(1, 4)
    with pytest.raises(DataError, match="4 classes; labels count from 0"):
        top_k_accuracy(lambda _: (scores,), [scores], [torch.tensor([4])])


def test_fidelity_of_a_scaled_output_has_a_closed_form() -> None:
    x = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    found = fidelity(lambda b: (b,), lambda b: (0.5 * b,), x)  # type: ignore[arg-type,return-value,operator]
    assert found.relative_error == pytest.approx(0.25, rel=1e-12)  # halving is exact, sums are float64
    assert found.cosine == pytest.approx(1, abs=1e-12)


def test_fidelity_of_opposite_outputs_is_minus_one() -> None:
    found = fidelity(lambda b: (b,), lambda b: (-b,), [torch.ones(2, 2)])  # type: ignore[arg-type,return-value,operator]
    assert (found.relative_error, found.cosine) == (4.0, -1.0)


def test_nan_outputs_name_the_batch_and_the_model() -> None:
    good, bad = torch.ones(2, 3), torch.full((2, 3), math.nan)
    with pytest.raises(ModelError, match="batch 0: output 0 of the sparse model has 6 NaN of 6"):
        fidelity(lambda _: (good,), lambda _: (bad,), [good])


def test_outputs_of_different_shapes_cannot_be_compared() -> None:
    with pytest.raises(ModelError, match="outputs of shapes"):
        fidelity(lambda _: (torch.ones(2),), lambda _: (torch.ones(3),), [torch.ones(1)])
