"""[reconstruct] and [distill] through the whole pipeline: recipes, what is measured, the report, what is handed out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.errors import DataError
from sparsify_compiler.evaluate import Forward, fidelity
from sparsify_compiler.export.report import Report, report_from_json
from sparsify_compiler.export.report_html import report_html
from sparsify_compiler.export.report_text import report_text
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.quality import Heldout
from sparsify_compiler.pipeline.torch_prune import finish_torch, module_forward, prune_torch
from sparsify_compiler.progress import silent
from sparsify_compiler.steps import Allocate, Distill, Reconstruct
from tests.models.small import Cnn, Mlp, image_batches, mlp_batches, seeded

OPTIONS = sc.Options(tokens=(1,))


def recipe(**more: object) -> sc.Recipe:
    rule = sc.make_rule("*", sc.NM(2, 4), sc.SparseGPT())
    return sc.Recipe((rule,), reconstruct=Reconstruct(2, 1e-3, 2), distill=Distill(2, 1e-3, 2), **more)  # type: ignore[arg-type]


def epochs(report: Report) -> list[float]:
    return [each.heldout for each in report.steps if each.step == "distill" and each.heldout is not None]


class Causal(nn.Module):
    """Predicts the next of 20 tokens from the running mean of those before it, through two numbered blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).cumsum(1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_both_steps_are_taken_reported_and_the_module_has_the_tuned_weights() -> None:
    module, batches = seeded(Mlp, depth=2), mlp_batches(5)
    plain, _ = sc.compile(
        module, batches, recipe=dataclasses.replace(recipe(), reconstruct=None, distill=None), options=OPTIONS
    )
    tuned, report = sc.compile(module, batches, recipe=recipe(), options=OPTIONS)
    rows = [each for each in report.steps if each.step == "reconstruct"]
    assert [each.part for each in rows] == ["blocks.0", "blocks.1"]
    for each in rows:
        assert each.before is not None
        assert each.after is not None
        assert each.kept == (each.after < each.before)
    losses = epochs(report)
    assert len(losses) == 3
    kept = [each.kept for each in report.steps if each.step == "distill"]
    assert kept.index(True) == losses.index(min(losses)) > 0
    assert report.steps[-1].data == "1 calibration batches kept aside"
    with torch.no_grad():
        dense = module(batches[0])
        errors = [float((each(batches[0]) - dense).square().sum()) for each in (plain, tuned)]  # type: ignore[operator]
    assert errors[1] < errors[0]
    assert all(site.sparsity == 0.5 for site in report.sites if site.status == "pruned")
    assert any("reconstruct: 2 of 2 segments" in note for note in report.notes)
    assert {"distill", "prune"} <= set(report.seconds)
    assert report_from_json(report.to_json()) == report
    for drawing in (report_text(report), report_html(report)):
        assert "Step reconstruct" in drawing
        assert "as it was pruned" in drawing
    table = dataclasses.asdict(report)
    del table["steps"]
    assert report_from_json(json.dumps(table)) == dataclasses.replace(report, steps=())


def test_no_step_before_distillation_reads_the_batches_that_epochs_are_chosen_by() -> None:
    seen: dict[str, set[int]] = {}
    phase = [""]

    class Counted(list[Tensor]):
        def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
            seen.setdefault(phase[0], set()).add(index)
            return super().__getitem__(index)

    def progress(stage: str, done: int, total: int) -> None:
        phase[0] = "" if done == total else stage.split()[0]

    rule = sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5)
    asked = sc.Recipe((rule,), allocate=Allocate(), reconstruct=Reconstruct(1), distill=Distill(1))
    module, batches = seeded(Mlp, depth=2), Counted(mlp_batches(9))
    _, report = sc.compile(module, batches, recipe=asked, options=OPTIONS, progress=progress)
    training = {*range(7), 8}  # of nine, the eighth is kept aside
    assert seen["allocate"] == seen["prune"] == training
    assert seen.get("reconstruct", training) == training
    assert report.steps[-1].data == "1 calibration batches kept aside"
    assert any("errors of sites are those before it" in note for note in report.notes)


def test_a_language_model_and_a_classifier_are_distilled_by_their_distributions() -> None:
    ids = [torch.randint(0, 20, (16, 16), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    _, report = sc.compile(seeded(Causal), ids[:4], recipe=recipe(), options=OPTIONS, heldout=ids[4:])
    assert report.steps[-1].measure == "KL divergence to the dense model"
    assert epochs(report)[-1] < epochs(report)[0]
    assert any("flatters that figure" in note for note in report.notes if note.startswith("distill"))
    images, cnn = image_batches(4), seeded(Cnn)
    cnn.get_parameter("fc.weight").data *= 100  # a classifier that is sure of something: a divergence above rounding
    heldout = Heldout(images[3:], [cnn(images[3]).argmax(1)])
    _, report = sc.compile(cnn, images[:3], recipe=recipe(), options=OPTIONS, heldout=heldout)
    assert report.steps[-1].measure == "KL divergence to the dense model"
    assert min(epochs(report)) < epochs(report)[0]


def test_steps_are_taken_in_and_after_rounds() -> None:
    _, report = sc.compile(seeded(Mlp, depth=2), mlp_batches(6), recipe=recipe(rounds=2), options=OPTIONS)
    assert [each.number for each in report.rounds] == [1, 2]
    assert [each.part for each in report.steps if each.step == "reconstruct"] == ["blocks.0", "blocks.1"]
    assert len(epochs(report)) == 3


@pytest.mark.parametrize("wanted", [True, False])
def test_a_cnn_is_distilled_around_the_batchnorm_statistics_that_it_is_handed_out_with(wanted: bool) -> None:
    batches, cnn, heldout = image_batches(4), seeded(Cnn), Heldout(image_batches(2, samples=16))
    rule = sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.6)
    asked = sc.Recipe((rule,), distill=Distill(2, 1e-3, 1))
    options = dataclasses.replace(OPTIONS, recalibrate_batchnorm=wanted)
    job = Job("cnn", asked, options, batches, False, heldout, silent, None)
    seen: list[float] = []

    def watch(forward: Forward, outcomes: object) -> None:
        seen.append(fidelity(module_forward(cnn), forward, heldout.batches).relative_error)

    job.watch_pruned = watch
    pruned = prune_torch(job, cnn)
    # the same weights, the same statistics, the same data; only segments against the whole module round differently
    assert job.steps[0].heldout == pytest.approx(seen[0], rel=1e-4)
    best = next(step for step in job.steps if step.kept)
    finish_torch(job, pruned)
    found = fidelity(module_forward(cnn), module_forward(pruned.module), heldout.batches).relative_error
    # statistics are moved once more for the tuned weights: little, after two short epochs
    assert found == pytest.approx(best.heldout, rel=0.05 if wanted else 1e-4)


def test_a_distillation_is_not_gone_on_with_around_other_statistics_or_by_another_measure(tmp_path: Path) -> None:
    images, cnn = image_batches(4), seeded(Cnn)
    labels = [cnn(images[3]).argmax(1)]
    rule = sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.6)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("distill, ") and done == 6:  # the end of the second epoch of three batches
            raise KeyboardInterrupt

    def run(moved: bool, heldout: Heldout, resume: bool) -> None:
        options = sc.Options(tmp_path / "out", onnx=False, tokens=(1,), resume=resume, recalibrate_batchnorm=moved)
        asked = sc.Recipe((rule,), distill=Distill(3, 1e-3, 1))
        sc.compile(cnn, images[:3], recipe=asked, options=options, heldout=heldout, progress=stop)

    with pytest.raises(KeyboardInterrupt):
        run(True, Heldout(images[3:]), resume=False)
    with pytest.raises(DataError, match="another model, data"):
        run(False, Heldout(images[3:]), resume=True)
    with pytest.raises(DataError, match="another model, data"):
        run(True, Heldout(images[3:], labels), resume=True)


def test_masks_selected_anew_are_those_of_the_artefact(tmp_path: Path) -> None:
    module, batches, output = seeded(Mlp, depth=2), mlp_batches(5), tmp_path / "out"
    asked = dataclasses.replace(recipe(), reconstruct=None, distill=Distill(4, 1e-2, 1, reselect=2))
    options = dataclasses.replace(OPTIONS, output=output, onnx=False)
    tuned, report = sc.compile(module, batches, recipe=asked, options=options)
    assert any("of the mask entries changed" in note for note in report.notes)
    again = sc.load(output, into=seeded(Mlp, depth=2))
    with torch.no_grad():
        # The file holds what runs: the same weights, packed.
        assert torch.allclose(tuned(batches[0]), again(batches[0]), atol=1e-5)  # type: ignore[operator]
    assert all(site.sparsity == 0.5 for site in report.sites if site.status == "pruned")


@pytest.mark.parametrize("step", [{"reconstruct": Reconstruct()}, {"distill": Distill()}])
def test_training_without_data_is_refused(step: dict[str, Reconstruct | Distill]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    asked = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.Magnitude()),), **step)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"\[{next(iter(step))}\] needs calibration data and none was given"):
        sc.compile(module, recipe=asked, options=OPTIONS)
