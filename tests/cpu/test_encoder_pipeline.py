"""Sentence pairs through the whole pipeline: what chooses the round, and the report's quality."""

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.evaluate_pairs import SentencePairs, pair_correlation
from tests.models.small import seeded


class Encoder(nn.Module):
    """Two layers that mix the shown tokens of a sentence; returns (sentences, length, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x: Tensor = self.embed(input_ids)
        for layer in self.layers:
            shown = attention_mask[..., None].to(x.dtype)
            x = x + layer(x + (x * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)).tanh()
        return x


def sentences(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (12, 1), generator=generator)
    ids = torch.randint(1, 40, (12, 8), generator=generator)
    mask = (torch.arange(8) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_rounds_are_chosen_and_quality_is_reported_by_the_rank_correlation() -> None:
    batches = [sentences(seed) for seed in range(6)]
    rows = torch.arange(24).reshape(12, 2)
    scores = torch.randn(12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    heldout = sc.Heldout([sentences(10), sentences(11)], None, "pairs.tsv", SentencePairs(scores, rows))
    recipe = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.7),), rounds=3)
    model = seeded(Encoder)
    compiled, report = sc.compile(model, batches, recipe=recipe, heldout=heldout, options=sc.Options(tokens=(1,)))
    assert isinstance(compiled, nn.Module)
    assert heldout.pairs is not None
    (quality,) = report.quality
    assert (quality.measure, quality.data) == ("Spearman correlation", "pairs.tsv")

    def correlation(module: nn.Module) -> float:
        assert heldout.pairs is not None
        return pair_correlation(lambda batch: (module(**batch),), heldout.batches, heldout.pairs)  # type: ignore[arg-type]

    # Ranks of 12 pairs: equal unless a rounding swaps two of them.
    assert quality.dense == pytest.approx(correlation(model), abs=1e-12)
    assert quality.sparse == pytest.approx(correlation(compiled), abs=1e-12)
    losses = [each.heldout for each in report.rounds]
    assert {each.measure for each in report.rounds} == {"1 - Spearman"}
    assert len(set(losses)) > 1
    (chosen,) = [each for each in report.rounds if each.chosen]
    assert chosen.heldout == min(losses) == pytest.approx(1 - quality.sparse, abs=1e-12)
