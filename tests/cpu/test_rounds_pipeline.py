"""Rounds through the whole pipeline: recipes, division of the data, held-out losses, the report, a resumed run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.batches import RoundBatches
from sparsify_compiler.cli.requests import RecipeChoice
from sparsify_compiler.errors import DataError, RecipeError
from sparsify_compiler.evaluate import fidelity, perplexity
from sparsify_compiler.export.report import report_from_json
from sparsify_compiler.export.report_html import report_html
from sparsify_compiler.export.report_text import report_text
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.pruning import prune_graph
from sparsify_compiler.pipeline.quality import Heldout
from sparsify_compiler.pipeline.rounds import divide_batches, forward_of_graph, heldout_loss
from sparsify_compiler.pipeline.torch_prune import finish_torch, module_forward, prune_torch
from sparsify_compiler.progress import silent
from tests.models.small import Cnn, Mlp, image_batches, mlp_batches, seeded

HELDOUT = Heldout([torch.zeros(1)])


def recipe(rounds: int) -> sc.Recipe:
    return sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5),), rounds=rounds)


def values(batches: object) -> list[int]:
    return [int(batch) for batch in batches]  # type: ignore[attr-defined]


def test_a_recipe_says_the_rounds_and_round_trips() -> None:
    text = sc.format_recipe(recipe(3))
    assert "rounds = 3" in text
    assert sc.parse_recipe(text, METHODS) == recipe(3)
    assert "rounds" not in sc.format_recipe(recipe(1))
    for wrong in ("0", "-2", "true", "2.5", '"3"'):
        with pytest.raises(RecipeError, match="rounds"):
            sc.parse_recipe(text.replace("= 3", f"= {wrong}"), METHODS)


def test_the_option_rounds_makes_the_recipe_and_clashes_with_a_file(tmp_path: Path) -> None:
    assert RecipeChoice(rounds=4).recipe().rounds == 4
    assert RecipeChoice().recipe().rounds == 1
    with pytest.raises(RecipeError, match="--rounds were both given"):
        RecipeChoice(file=tmp_path / "r.toml", rounds=2).recipe()


def test_batches_are_dealt_in_turn_and_one_in_eight_is_kept_aside_without_held_out_data() -> None:
    batches = [torch.tensor(i) for i in range(17)]
    data = divide_batches(batches, None, 3, share=False)
    assert values(data.heldout.batches) == [7, 15]
    assert [values(part) for part in data.sets] == [[0, 3, 6, 10, 13], [1, 4, 8, 11, 14], [2, 5, 9, 12, 16]]
    data = divide_batches(batches, HELDOUT, 3, share=False)
    assert data.heldout is HELDOUT
    assert sorted(number for part in data.sets for number in values(part)) == list(range(17))


def test_batches_are_shared_where_that_is_asked_or_there_are_too_few() -> None:
    batches = [torch.tensor(i) for i in range(4)]
    asked = divide_batches(batches, HELDOUT, 2, share=True)
    assert [values(part) for part in asked.sets] == [[0, 1, 2, 3]]
    assert "as asked" in asked.words
    few = divide_batches(batches, None, 4, share=False)
    assert [values(part) for part in few.sets] == [[0, 1, 2]]
    assert values(few.heldout.batches) == [3]
    assert "fewer than the 4 rounds" in few.words
    one = divide_batches(batches[:1], None, 2, share=False)
    assert [values(part) for part in one.sets] == [[0]]
    assert "too few" in one.heldout.description


def test_a_caller_may_give_one_set_a_round() -> None:
    a, b = [torch.tensor(i) for i in range(2)], [torch.tensor(i) for i in range(2, 5)]
    given = RoundBatches((a, b))
    assert values(given) == [0, 1, 2, 3, 4]
    assert values(given[1:4]) == [1, 2, 3]
    assert int(given[-1]) == 4  # type: ignore[arg-type]
    assert [values(part) for part in divide_batches(given, HELDOUT, 2, share=False).sets] == [[0, 1], [2, 3, 4]]
    aside = divide_batches(given, None, 2, share=False)
    assert [values(part) for part in aside.sets] == [[0], [2, 3]]
    assert values(aside.heldout.batches) == [1, 4]
    with pytest.raises(DataError, match="2 sets of batches were given for 3 rounds"):
        divide_batches(given, HELDOUT, 3, share=False)


class Causal(nn.Module):
    """Predicts the next of 20 tokens from the running mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).cumsum(1)
        return self.head(self.inner(x).relu())


def test_the_held_out_loss_is_what_the_data_allows() -> None:
    ids = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    lm = seeded(Causal)
    name, loss = heldout_loss(trace_module(lm, ids), Heldout([ids]), silent)
    assert name == "perplexity"
    assert loss({}) == pytest.approx(perplexity(lambda batch: (lm(batch),), [ids]), rel=1e-6)
    images = image_batches(2)
    cnn = seeded(Cnn)
    labels = [cnn(batch).argmax(1) for batch in images]
    labels[0][0] = (labels[0][0] + 1) % 10
    name, loss = heldout_loss(trace_module(cnn, images[0]), Heldout(images, labels), silent)
    assert name == "top-1 error"
    assert loss({}) == pytest.approx(1 / sum(len(batch) for batch in images))
    graph = trace_module(cnn, images[0])
    name, loss = heldout_loss(graph, Heldout(images), silent)
    assert name == "relative error"
    stem = graph.sites[0]
    dense = {stem.name: graph.weight(stem)}
    graph.set_weight(stem, dense["stem"] * 0.5)
    exact = fidelity(lambda batch: (cnn(batch),), forward_of_graph(graph), images).relative_error
    assert loss(dense) == pytest.approx(exact, rel=1e-6)
    assert exact > 0


def test_rounds_are_in_the_report_and_its_drawings_and_old_reports_load() -> None:
    module, batches, options = seeded(Mlp, depth=2), mlp_batches(6), sc.Options(tokens=(1,))
    _, report = sc.compile(module, batches[:5], recipe=recipe(2), options=options, heldout=batches[5:])
    assert [each.number for each in report.rounds] == [1, 2]
    assert sum(each.chosen for each in report.rounds) == 1
    assert min(report.rounds, key=lambda each: each.heldout).chosen
    assert report.rounds[1].differed == ("batches", "prefix", "Gram", "targets")
    assert report.rounds[0].data == "held-out data"
    assert any("flatters that figure" in note for note in report.notes)
    assert any("batches of its own (3/2)" in note for note in report.notes)
    assert report_from_json(report.to_json()) == report
    for drawing in (report_text(report), report_html(report)):
        assert "Rounds" in drawing
        assert "2 rounds, the best kept" in drawing
        assert "batches, prefix, Gram, targets" in drawing
    table = dataclasses.asdict(report)
    del table["rounds"]
    assert report_from_json(json.dumps(table)) == dataclasses.replace(report, rounds=())


def test_rounds_without_data_are_refused() -> None:
    magnitude = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.Magnitude()),), rounds=2)
    graph = trace_module(seeded(Mlp), mlp_batches(1)[0])
    job = Job("model", magnitude, sc.Options(), mlp_batches(1), True, None, silent, None)
    with pytest.raises(DataError, match="2 rounds need calibration data"):
        prune_graph(job, graph)


def test_a_compile_run_stopped_in_its_second_round_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def run(name: str, resume: bool = False, stop: str = "", share: bool = False) -> bytes:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == stop:
                raise Killed

        options = sc.Options(output=tmp_path / name, onnx=False, tokens=(1,), resume=resume, share_batches=share)
        sc.compile(seeded(Mlp, depth=3), mlp_batches(4), recipe=recipe(2), options=options, progress=progress)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", stop="round 2 of 2: prune blocks.2")
    with pytest.raises(DataError, match="another model, data"):
        run("killed", resume=True, share=True)
    assert run("killed", resume=True) == whole


@pytest.mark.parametrize("wanted", [True, False])
def test_rounds_of_a_cnn_are_compared_as_the_model_is_handed_out(wanted: bool) -> None:
    batches, cnn = image_batches(4), seeded(Cnn)
    heldout = Heldout(image_batches(2, samples=16))
    options = sc.Options(recalibrate_batchnorm=wanted, share_batches=True)
    job = Job("cnn", recipe(2), options, batches, False, heldout, silent, None)
    pruned = prune_torch(job, cnn)
    finish_torch(job, pruned)
    best = next(row for row in job.rounds if row.chosen)
    close = fidelity(module_forward(cnn), module_forward(pruned.module), heldout.batches)
    # the same weights, the same statistics, the same data; only segments against the whole module round differently
    assert best.heldout == pytest.approx(close.relative_error, rel=1e-4)
