"""Tokens that an attention_mask hides: they are in no statistic and in no comparison."""

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, padding
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.evaluate import fidelity
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.refine.teacher import RelativeError, Teacher
from sparsify_compiler.pattern import Unstructured
from sparsify_compiler.plan import decide
from sparsify_compiler.problem import LayerProblem
from sparsify_compiler.recipe import Recipe, make_rule
from tests.models.small import seeded


class Encoder(nn.Module):
    """Attention over the shown tokens, an MLP on flattened rows, a pooler on one row a sentence, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.mix, self.up = nn.Linear(16, 16), nn.Linear(16, 24)
        self.down, self.pool = nn.Linear(24, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.mix(x)
        weights = (y @ x.transpose(1, 2)).masked_fill(attention_mask[:, None] == 0, -torch.inf).softmax(2)
        x = x + weights @ y
        flat = self.down(self.up(x.reshape(-1, 16)).relu()).reshape(x.shape)
        return self.head(self.pool((x + flat)[:, 0]).relu())


def sentences(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [torch.randint(1, 20, (length,), generator=generator) for length in lengths]


def padded(ids: list[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def problems(batches: list[dict[str, Tensor]], dense_targets: bool) -> dict[str, LayerProblem]:
    graph = trace_module(seeded(Encoder), padded(sentences()))
    rule = make_rule("*", Unstructured(), SparseGPT(), 0.5)
    walk = Walk(graph, batches, decide(Recipe((rule,)), graph.sites), dense_targets=dense_targets)
    found = {}
    for problem in walk.layers():
        found[problem.name] = problem
        walk.accept(problem.name, SparseGPT().prune(problem))
    return found


@pytest.mark.parametrize("dense_targets", [False, True])
def test_statistics_of_padded_sentences_are_those_of_each_alone(dense_targets: bool) -> None:
    ids = sentences()
    together = problems([padded(ids[:7]), padded(ids[7:])], dense_targets)
    alone = problems([padded([row]) for row in ids], dense_targets)
    assert set(together) >= {"mix", "up", "down", "pool"}
    for name, problem in together.items():
        assert problem.gram is not None
        assert problem.gram.tokens == (len(ids) if name == "pool" else sum(map(len, ids)))
        other = alone[name]
        assert other.gram is not None
        # Sums of float32 products in another order.
        assert torch.allclose(problem.gram.matrix, other.gram.matrix, rtol=1e-4, atol=1e-6)
        if dense_targets:
            assert problem.targets is not None
            assert other.targets is not None
            assert torch.allclose(problem.targets.cross, other.targets.cross, rtol=1e-4, atol=1e-6)
            assert problem.targets.energy == pytest.approx(other.targets.energy, rel=1e-4)


def test_a_mask_that_hides_nothing_or_is_an_encoder_decoders_drops_nothing() -> None:
    batch = padded(sentences())
    hidden = padding(batch)
    assert hidden is not None
    assert len(hidden.shown) == int(batch["attention_mask"].sum())
    assert padding({**batch, "attention_mask": torch.ones(12, 8)}) is None
    assert padding({**batch, "attention_mask": batch["attention_mask"][:, None, None]}) is None
    assert padding({**batch, "decoder_input_ids": batch["input_ids"]}) is None
    assert padding({"input_ids": batch["input_ids"]}) is None
    assert padding(batch["input_ids"]) is None


def test_only_rows_of_the_masks_own_shape_are_dropped() -> None:
    hidden = padding({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    assert hidden is not None
    x = torch.arange(6.0).reshape(2, 3, 1)
    assert hidden.drop(x)[:, 0].tolist() == [0, 1, 3]
    assert hidden.drop(x.reshape(6, 1))[:, 0].tolist() == [0, 1, 3]
    for other in (x[:, 0], x.transpose(0, 1), x[:, :2], x[..., 0]):
        assert hidden.drop(other) is other


def test_closeness_does_not_count_what_a_model_returns_for_padding() -> None:
    batch = padded(sentences())
    table = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))

    def dense(batch: Batch) -> tuple[Tensor, ...]:
        assert isinstance(batch, dict)
        return (table[batch["input_ids"]],)

    def other_on_padding(batch: Batch) -> tuple[Tensor, ...]:
        assert isinstance(batch, dict)
        return (dense(batch)[0] + (batch["attention_mask"][..., None] == 0),)

    assert fidelity(dense, other_on_padding, [batch]).relative_error == 0
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert fidelity(dense, lambda _: other_on_padding(batch), [whole]).relative_error > 0


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) * (1 + attention_mask[..., None]))


def test_distillation_does_not_learn_what_a_model_returns_for_padding() -> None:
    batches = [padded(sentences()[:7]), padded(sentences()[7:])]
    teacher = Teacher(trace_module(seeded(Tagger), batches[0]), batches, [])
    distance = RelativeError.of(teacher)
    shown = [teacher.outputs(number)[0][batch["attention_mask"] == 1] for number, batch in enumerate(batches)]
    energy = sum(float(rows.double().square().sum()) for rows in shown)
    assert distance.energies == pytest.approx((energy,))
    (outputs,) = teacher.outputs(1)
    hidden = batches[1]["attention_mask"][..., None] == 0
    assert distance.objective(1)((outputs + hidden,)) == 0
    # One added to each of 4 entries of every shown row, and a mean over 2 batches of one share of the energy each.
    expected = 2 * shown[1].numel() / energy
    assert float(distance.objective(1)((outputs + ~hidden,))) == pytest.approx(expected, rel=1e-5)
