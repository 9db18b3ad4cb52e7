"""Methods side by side: rows, draws, resumed runs, the figures a row has, what is drawn of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsify_compiler as sc
from sparsify_compiler.api_table import Draw, MethodTable, Trial, method_table, method_trials, recipe_trial
from sparsify_compiler.batches import call
from sparsify_compiler.cli import reproduce_table
from sparsify_compiler.cli.main import build_app
from sparsify_compiler.cli.reproduce_table import draw_method_table
from sparsify_compiler.cli.requests import TableRequest
from sparsify_compiler.errors import DataError, ExportError, ModelError, RecipeError
from sparsify_compiler.evaluate import top_k_accuracy
from sparsify_compiler.export.method_table import Spread, method_table_from_json
from sparsify_compiler.export.method_table_html import method_table_html
from sparsify_compiler.passes.batchnorm import reestimate_batchnorm
from sparsify_compiler.pipeline import method_table as pipeline
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.peak_memory import peak_memory
from sparsify_compiler.pipeline.torch_prune import Pruned, prune_torch
from sparsify_compiler.progress import Progress
from sparsify_compiler.sources.data import load_data
from sparsify_compiler.sources.models import Source, module_source
from sparsify_compiler.steps import Distill

WIDTH = 24


class Classifier(nn.Module):
    """Three linear layers with a BatchNorm between; inputs (samples, WIDTH), four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.mix = nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.up(x)).relu()).relu())


def classifier() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier().eval()


def samples(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, WIDTH, generator=generator) @ mix + 0.5


def draws(count: int) -> list[Draw]:
    return [Draw(list(samples(96, seed).split(16)), f"draw with seed {seed}") for seed in range(count)]


def heldout(model: nn.Module) -> dict[str, sc.Heldout]:
    x = samples(300, 50)
    labels = (model(x) + 0.3 * torch.randn(300, 4, generator=torch.Generator().manual_seed(1))).argmax(1)
    return {"labelled": sc.Heldout([x[:200], x[200:]], [labels[:200], labels[200:]]), "plain": sc.Heldout([x])}


TRIALS = method_trials(["magnitude", "iobs"], ["0.5", "2:4"], rounds=3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return classifier()


@pytest.fixture(scope="module")
def table(model: nn.Module) -> MethodTable:
    return method_table(model, draws(2), heldout(model), TRIALS, share_batches=True, device="cpu")


def test_every_way_of_pruning_has_one_row_a_draw_in_the_order_asked(table: MethodTable) -> None:
    found = [(row.method, row.pattern, row.refit, row.draw) for row in table.rows]
    assert found == [(t.method, t.pattern, t.refit, draw) for t in TRIALS for draw in (0, 1)]
    assert [quality.measure for quality in table.dense] == [
        "top-1 accuracy",
        "top-5 accuracy",
        "relative error",
        "cosine",
    ]
    assert {row.sites for row in table.rows} == {2}  # the head stays dense
    assert all(row.sparsity == 0.5 for row in table.rows)
    assert all(row.peak_memory_bytes > 0 for row in table.rows)
    assert table.calibration == ("draw with seed 0", "draw with seed 1")


def test_a_row_is_the_model_that_compile_hands_out(model: nn.Module, table: MethodTable) -> None:
    data = draws(1)[0].batches
    recipe = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.5),))
    compiled, report = sc.compile(model, data, recipe=recipe, options=sc.Options(onnx=False, tokens=(1,)))
    assert isinstance(compiled, nn.Module)
    labelled = heldout(model)["labelled"]
    assert labelled.labels is not None
    accuracy = top_k_accuracy(lambda batch: call(compiled, batch), labelled.batches, labelled.labels, (1,))
    row = next(row for row in table.rows if (row.method, row.pattern, row.refit) == ("magnitude", "0.5", True))
    assert row.quality[0].sparse == accuracy[0]
    errors = [site.relative_error for site in report.sites if site.relative_error is not None]
    assert row.error == pytest.approx(sum(errors), rel=1e-6)


def test_figures_without_re_estimated_batchnorm_are_those_of_the_dense_statistics(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[nn.Module] = []

    def prune(job: Job, given: nn.Module) -> Pruned:
        pruned = prune_torch(job, given)
        kept.append(pruned.module)
        return pruned

    monkeypatch.setattr(pipeline, "prune_torch", prune)
    trials = method_trials(["magnitude"], ["0.7"], (False,))
    (row,) = method_table(model, draws(1), heldout(model), trials, device="cpu").rows
    (module,) = kept
    labelled = heldout(model)["labelled"]
    assert labelled.labels is not None

    def accuracy() -> float:
        assert labelled.labels is not None
        return top_k_accuracy(lambda batch: call(module, batch), labelled.batches, labelled.labels, (1,))[0]

    assert row.quality[0].sparse == accuracy()
    dense = model.get_submodule("norm")
    module.get_submodule("norm").load_state_dict(dense.state_dict())
    assert row.without[0].sparse == accuracy()
    reestimate_batchnorm(module, model, draws(1)[0].batches)
    assert row.quality[0].sparse == accuracy()
    assert row.quality != row.without


def test_the_round_that_is_kept_has_the_figures_of_the_row(table: MethodTable) -> None:
    rows = [row for row in table.rows if row.method == "iobs, 3 rounds"]
    assert rows
    for row in rows:
        assert [point.number for point in row.rounds] == [1, 2, 3]
        (chosen,) = [point for point in row.rounds if point.chosen]
        for shown, kept in zip(row.quality, chosen.quality, strict=True):
            # the same weights and statistics; sums of the same batches
            assert shown.sparse == pytest.approx(kept.sparse, rel=1e-5)
    assert all(not row.rounds for row in table.rows if row.method == "magnitude")
    assert any("chosen on calibration data" in note for note in table.notes)


def test_the_model_stays_as_it_was(model: nn.Module, table: MethodTable) -> None:
    fresh = classifier().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def test_means_and_spreads_are_over_the_draws(table: MethodTable) -> None:
    for summary in table.summaries():
        rows = [
            r for r in table.rows if (r.method, r.pattern, r.refit) == (summary.method, summary.pattern, summary.refit)
        ]
        values = [row.quality[2].sparse for row in rows]
        expected = Spread(float(np.mean(values)), min(values), max(values))
        found = summary.quality["plain", "relative error"]
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))
        assert summary.draws == 2


def test_a_table_goes_to_json_and_back(table: MethodTable) -> None:
    assert method_table_from_json(table.to_json()) == table
    assert json.loads(table.to_json())["summaries"][0]["quality"][0]["data"] == "labelled"
    with pytest.raises(DataError, match="newer format"):
        method_table_from_json(table.to_json().replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="not a method table"):
        method_table_from_json("[]")


def test_the_page_and_the_terminal_show_every_row(table: MethodTable) -> None:
    from rich.console import Console

    page = method_table_html(table)
    assert page.count('<tr><td class="name">') == len(table.summaries()) + 2  # and the dense model, once a pattern
    assert page.count("<polyline") == 4 * 2  # I-OBS by two patterns and re-solve or not, on two held-out sets
    assert "http" not in page.split("</style>")[-1]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(draw_method_table(table, 200))
    said = capture.get()
    for words in ("magnitude + re-solve", "iobs, 3 rounds", "BatchNorm as given", "draw 1: draw with seed 1"):
        assert words in said


def test_an_interrupted_table_goes_on_and_ends_as_if_it_had_not_been(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = method_trials(["wanda"], ["0.5", "2:4"])
    asked = (model, draws(1), heldout(model), trials)
    whole = method_table(*asked, output=tmp_path / "whole", device="cpu")
    made: list[str] = []

    def stops(job: Job, given: nn.Module) -> Pruned:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(str(job.recipe))
        return prune_torch(job, given)

    monkeypatch.setattr(pipeline, "prune_torch", stops)
    with pytest.raises(KeyboardInterrupt):
        method_table(*asked, output=tmp_path / "cut", device="cpu")
    assert len((tmp_path / "cut" / "rows.jsonl").read_text().splitlines()) == 2 + 2  # the table's line, the dense model
    assert not (tmp_path / "cut" / "table.json").exists()
    with pytest.raises(ExportError, match="--resume"):
        method_table(*asked, output=tmp_path / "cut", device="cpu")
    monkeypatch.setattr(pipeline, "prune_torch", prune_torch)
    resumed = method_table(*asked, output=tmp_path / "cut", device="cpu", resume=True)
    assert [row.quality for row in resumed.rows] == [row.quality for row in whole.rows]
    assert method_table_from_json((tmp_path / "cut" / "table.json").read_text()) == resumed
    assert (tmp_path / "cut" / "table.html").is_file()
    fewer = method_table(*asked[:3], trials[:1], output=tmp_path / "cut", device="cpu", resume=True)
    assert len(fewer.rows) == 1
    assert "3 more finished rows, which this command did not ask for, stay in rows.jsonl" in fewer.notes


def test_a_row_that_is_distilled_is_shown_before_it_too_and_goes_on_in_the_middle(
    model: nn.Module, tmp_path: Path
) -> None:
    rule = sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.7)
    trials = [recipe_trial("mine", sc.Recipe((rule,), distill=Distill(3, 1e-2, 1)))]
    asked = (model, draws(1), heldout(model), trials)
    whole = method_table(*asked, output=tmp_path / "whole", device="cpu")
    before, after = whole.rows
    assert (before.method, after.method) == ("mine, before distilling", "mine")
    assert before.quality[2].sparse > after.quality[2].sparse  # the relative error of the plain set
    (plain,) = method_table(model, draws(1), heldout(model), [recipe_trial("p", sc.Recipe((rule,)))], device="cpu").rows
    assert before.error == pytest.approx(plain.error, rel=0.1)  # one batch of six is kept aside for the epochs

    def stop(stage: str, done: int, total: int) -> None:
        if "distill, " in stage and " 10/15" in stage:  # three epochs of five batches
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method_table(*asked, output=tmp_path / "cut", device="cpu", progress=stop)
    (unfinished,) = (tmp_path / "cut" / "unfinished").iterdir()
    assert (unfinished / "distill.safetensors").is_file()
    stages: list[str] = []
    resumed = method_table(
        *asked, output=tmp_path / "cut", device="cpu", resume=True, progress=lambda stage, *_: stages.append(stage)
    )
    assert [row.quality for row in resumed.rows] == [row.quality for row in whole.rows]
    assert not any("distill, " in stage and " 0/15" in stage for stage in stages)
    assert not (tmp_path / "cut" / "unfinished").exists()
    gone_on = "gone on with after an interruption: its seconds count from then"
    assert gone_on in resumed.rows[1].notes
    assert gone_on not in whole.rows[1].notes


def test_rows_of_another_model_or_a_damaged_file_are_not_taken(model: nn.Module, tmp_path: Path) -> None:
    trials = method_trials(["magnitude"], ["0.5"], (False,))
    method_table(model, draws(1), heldout(model), trials, output=tmp_path, device="cpu")
    other = classifier()
    other.get_submodule("up").bias.data += 1  # type: ignore[union-attr,operator]
    with pytest.raises(DataError, match="another model"):
        method_table(other, draws(1), heldout(model), trials, output=tmp_path, resume=True, device="cpu")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text()[:-40])
    with pytest.raises(DataError, match="damaged"):
        method_table(model, draws(1), heldout(model), trials, output=tmp_path, resume=True, device="cpu")


def test_a_recipe_is_a_row_of_its_own() -> None:
    recipe = sc.Recipe(
        (sc.make_rule("up", sc.NM(2, 4), sc.Wanda()), sc.make_rule("*", sc.Unstructured(), sc.Wanda(), 0.7))
    )
    trial = recipe_trial("mixed", recipe)
    assert (trial.method, trial.pattern, trial.refit) == ("mixed", "2:4, 0.7", True)
    assert trial.recipe is recipe


@pytest.mark.parametrize(
    ("text", "pattern", "sparsity"),
    [("0.7", sc.Unstructured(), 0.7), ("2:4", sc.NM(2, 4), 0.5), ("8x8@0.9", sc.Block(8, 8), 0.9)],
)
def test_patterns_are_numbers_n_of_m_or_a_shape_with_its_sparsity(text: str, pattern: object, sparsity: float) -> None:
    (trial,) = method_trials(["wanda"], [text], (True,))
    (rule,) = trial.recipe.rules
    assert (rule.pattern, rule.sparsity, trial.pattern) == (pattern, sparsity, text)


@pytest.mark.parametrize(
    ("methods", "patterns", "words"),
    [
        (["obd"], ["0.5"], "method 'obd': unknown"),
        (["wanda"], ["half"], "pattern 'half'"),
        (["wanda"], ["1.5"], "sparsity 1.5"),
        (["wanda"], ["8x8"], "needs a sparsity"),
        (["wanda"], ["8x8@much"], "'much' is no number"),
        (["wanda"], ["2:4@0.7"], "leave the sparsity out"),
    ],
)
def test_what_cannot_be_a_way_of_pruning_is_refused(methods: list[str], patterns: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        method_trials(methods, patterns)


def test_what_could_not_end_well_is_refused_before_any_row(model: nn.Module, tmp_path: Path) -> None:
    sets, twice = heldout(model), method_trials(["magnitude"], ["0.5"], (True, True))
    with pytest.raises(DataError, match="asked twice"):
        method_table(model, draws(1), sets, twice, output=tmp_path / "a")
    with pytest.raises(RecipeError, match="matches no site"):
        method_table(model, draws(1), sets, method_trials(["wanda"], ["0.5"], sites=["conv*"]), output=tmp_path / "a")
    with pytest.raises(DataError, match="one held-out set"):
        method_table(model, draws(1), {}, TRIALS, output=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file"):
        method_table(model, draws(1), sets, TRIALS, output=tmp_path / "file")


def test_a_draw_after_the_first_is_another_part_of_small_data(tmp_path: Path) -> None:
    source = module_source(classifier())
    np.savez(tmp_path / "x.npz", x=samples(16, 0).numpy())
    found = [load_data(str(tmp_path / "x.npz"), source, seed=seed, part=seed > 0) for seed in range(3)]
    rows = [{tuple(row.tolist()) for batch in data.batches for row in next(iter(batch.values()))} for data in found]  # type: ignore[union-attr]
    assert [len(each) for each in rows] == [16, 14, 14]
    assert rows[1] < rows[0]
    assert rows[1] != rows[2]
    assert "14 samples of x, drawn with seed 1 from 16" in found[1].description
    asked = load_data(str(tmp_path / "x.npz"), source, windows=5, seed=1, part=True)
    assert asked.samples == 5  # a part was asked anyway


def test_peak_memory_is_that_of_the_stretch() -> None:
    with peak_memory(torch.device("cpu")) as large:
        held = torch.zeros(100 * 2**20 // 4)
    size = held.numel() * 4
    del held
    with peak_memory(torch.device("cpu")) as small:
        pass
    if large.bytes == small.bytes:
        pytest.skip("this system cannot set the high-water mark back")
    # the pages are touched once, by whole zeros; the rest of the process may give some back meanwhile
    assert large.bytes - small.bytes > 0.5 * size


def test_the_command_asks_for_what_its_options_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[TableRequest] = []

    def take(request: TableRequest, progress: Progress) -> MethodTable:
        asked.append(request)
        return MethodTable("m", "", "", {}, (), {}, (), ())

    monkeypatch.setattr(reproduce_table, "compare_methods", take)
    (tmp_path / "r.toml").write_text('[[rule]]\npattern = "2:4"\nmethod = "wanda"\nsites = "up"\n')
    words = (
        "m/ -c c.npz --heldout a.npz --heldout b/a.npz --methods wanda,iobs --patterns 0.5,16:32 --refit yes "
        "--rounds 4 --draws 2 --windows 9 --heldout-windows 7 --sites up --sites mix --keep-dense h* --seed 3 "
        f"--share-batches --recipe {tmp_path}/r.toml --resume -o {tmp_path}/out"
    )
    result = CliRunner().invoke(build_app(), ["reproduce", "method-table", *words.split()])
    assert result.exit_code == 0, result.output
    (request,) = asked
    assert [trial.words for trial in request.trials] == [
        "wanda 0.5",
        "iobs, 4 rounds 0.5",
        "wanda 16:32",
        "iobs, 4 rounds 16:32",
        "r 2:4",
    ]
    first: Trial = request.trials[0]
    assert [rule.sites for rule in first.recipe.rules] == ["up", "mix"]
    assert first.recipe.keep_dense == ("h*",)
    assert (request.draws, request.choice.windows, request.choice.seed) == (2, 9, 3)
    assert (request.heldout_windows, request.share_batches, request.resume) == (7, True, True)


@pytest.mark.parametrize("words", ["--methods wanda,alps", "--methods iobs --rounds 1"])
def test_shared_batches_are_refused_where_no_row_has_rounds(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TableRequest] = []
    monkeypatch.setattr(reproduce_table, "compare_methods", lambda request, progress: asked.append(request))
    arguments = f"reproduce method-table absent/ -c c.npz --heldout a.npz {words} --share-batches"
    result = CliRunner().invoke(build_app(), arguments.split())
    assert (result.exit_code, asked) == (2, [])
    assert "in a method table only iobs and recipes have them" in " ".join(result.stderr.split())


def test_shared_batches_without_rounds_are_refused_from_python_too(model: nn.Module) -> None:
    trials = method_trials(["wanda"], ["0.5"])
    with pytest.raises(RecipeError, match="nothing is pruned in more than one round"):
        method_table(model, draws(1), heldout(model), trials, share_batches=True, device="cpu")
    with pytest.raises(RecipeError, match="nothing is pruned in more than one round"):
        sc.compile(model, draws(1)[0].batches, recipe=trials[0].recipe, options=sc.Options(share_batches=True))


def test_the_command_makes_a_table_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))\n"
    )
    np.savez("x.npz", input=samples(64, 0).numpy())
    np.savez("test.npz", input=samples(40, 1).numpy(), labels=np.arange(40) % 4)
    words = "small:build --trust -c x.npz --heldout test.npz --methods magnitude,alps --patterns 0.5 --draws 2 -o out"
    result = CliRunner().invoke(build_app(), ["reproduce", "method-table", *words.split()], env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    found = method_table_from_json(Path("out/table.json").read_text())
    assert len(found.rows) == 2 * 2 * 2
    assert "test.npz: top-1 accuracy" in result.output
    assert "draw 1: x.npz: 56 samples of input, drawn with seed 1 from 64" in result.output


def test_draws_of_the_same_data_are_refused(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, trials = samples(96, 0), method_trials(["magnitude"], ["0.5"])
    same = [
        Draw([batch], "one"),
        Draw([samples(96, 1)], "two"),
        Draw([{"x": batch}], "three"),
        Draw([batch + 0], "four"),
    ]
    with pytest.raises(DataError, match=r"draw 3 of the calibration data is the same as draw 0 \(four\).*--draws 1"):
        method_table(model, same, heldout(model), trials, output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    Path("small.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(24, 4)\n")
    np.savez("x.npz", input=samples(1, 0).numpy())  # a draw of one sample can be nothing else
    words = "small:build --trust -c x.npz --heldout x.npz --methods magnitude --patterns 0.5 --draws 2"
    result = CliRunner().invoke(build_app(), ["reproduce", "method-table", *words.split()])
    assert result.exit_code == 2
    assert "draw 1 of the calibration data is the same as draw 0 (x.npz: all 1 samples" in result.stderr


def test_an_onnx_file_is_refused_with_what_to_give_instead() -> None:
    source = Source("m.onnx", "onnx", path=Path("m.onnx"))
    with pytest.raises(ModelError, match="give the model that the file was made of"):
        method_table(source, draws(1), {"a": sc.Heldout([samples(2, 0)])}, TRIALS)
