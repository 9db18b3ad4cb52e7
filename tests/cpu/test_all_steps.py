"""Every step of a recipe in one run: orders, allocation, swaps, rounds, tuning and distillation; resumed, too."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.export.report import Report, report_from_json
from sparsify_compiler.frontends.torch_run import dotted
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.steps import Allocate, Distill, FineTune, Permute, Reconstruct
from tests.models.small import seeded

OPTIONS = sc.Options(tokens=(1,))

STEPS = {
    "permute": Permute(5),
    "finetune": FineTune(epochs=1, rate=1e-3, batches=2),
    "reconstruct": Reconstruct(epochs=2, rate=1e-3),
    "distill": Distill(epochs=2, rate=1e-3, reselect=1),
}


class Gated(nn.Module):
    """A causal language model of gated blocks over running sums; its head is the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(16, 24), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})
            for _ in range(2)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).cumsum(1) / 4
        for block in self.blocks:
            x = x + block["down"](torch.nn.functional.silu(block["gate"](x)) * block["up"](x))
        return self.head(x)


class Convolutions(nn.Module):
    """Plain and grouped convolutions around BatchNorm, and a classifier's head; inputs (batch, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 16, 1)
        self.grouped, self.fc = nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.grouped(torch.relu(self.point(x))))
        return self.fc(x.mean((2, 3)))


def tokens(count: int = 6) -> list[Tensor]:
    return [torch.randint(0, 40, (8, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def images(count: int = 6) -> list[Tensor]:
    return [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def recipe(fixed: str, free: tuple[str, ...]) -> sc.Recipe:
    rules = [sc.make_rule(fixed, sc.NM(2, 4), WoodTaylor(), swaps=1)]
    rules += [sc.make_rule(glob, sc.Unstructured(), IOBS(), 0.5, swaps=1) for glob in free]
    return sc.Recipe(tuple(rules), rounds=2, allocate=Allocate(), **STEPS)  # type: ignore[arg-type]


def check(report: Report, pruned: int, reordered: bool = True) -> None:
    """Look for every step in the report, and for exact counts."""
    sites = [site for site in report.sites if site.status == "pruned"]
    assert len(sites) == pruned
    assert all("swaps" in site.method for site in sites)
    assert {site.sparsity for site in sites if site.pattern == "2:4"} == {0.5}
    free = [(site.sparsity, torch.Size(site.shape).numel()) for site in sites if site.pattern == "unstructured"]
    asked = sum(entries for _, entries in free) // 2
    assert round(sum(sparsity * entries for sparsity, entries in free)) == asked  # to the entry, whoever lost more
    assert [each.number for each in report.rounds] == [1, 2]
    assert {each.step for each in report.steps} == {"reconstruct", "distill"}
    words = " ".join(report.notes)
    for each in ("allocate: ", "rounds: ", "fine-tuning of", "reconstruct: ", "distill: ", "woodtaylor: "):
        assert each in words
    assert ("N:M sites read their inputs in another order" in words) == reordered
    assert report_from_json(report.to_json()) == report


def half_of_every_four(weight: Tensor) -> None:
    """Assert 2:4 along the last axis, and no zero beside those of the pattern."""
    assert (weight.unflatten(-1, (-1, 4)) != 0).sum(-1).eq(2).all()


def test_a_language_model_with_a_tied_head_takes_every_step_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    stages: list[str] = []

    def run(name: str, resume: bool = False, stop: str = "") -> tuple[nn.Module, Report, bytes]:
        stages.clear()

        def progress(stage: str, done: int, total: int) -> None:
            stages.append(stage)
            if stop and stage.startswith(stop):
                raise Killed

        module = seeded(Gated)
        options = sc.Options(output=tmp_path / name, onnx=False, tokens=(1,), resume=resume)
        asked = recipe("*.down", ("*.up", "*.gate"))
        compiled, report = sc.compile(module, tokens(), recipe=asked, options=options, progress=progress)
        assert all(
            torch.equal(old, new) for old, new in zip(module.parameters(), seeded(Gated).parameters(), strict=True)
        )
        assert isinstance(compiled, nn.Module)
        return compiled, report, (tmp_path / name / "model.safetensors").read_bytes()

    compiled, report, whole = run("whole")
    check(report, 6)
    assert any(stage.startswith("allocate") for stage in stages)
    assert compiled.head.weight is compiled.embed.weight
    for number in range(2):
        half_of_every_four(dotted(compiled, f"blocks.{number}.down.weight"))
    with pytest.raises(Killed):
        run("killed", stop="round 2 of 2: prune blocks.1")
    _, again, resumed = run("killed", resume=True)
    assert resumed == whole
    assert not any(stage.startswith("allocate") for stage in stages)  # what it found was written down
    assert [note for note in again.notes if note.startswith("allocate")] == [
        note for note in report.notes if note.startswith("allocate")
    ]
    assert [(site.sparsity, site.notes) for site in again.sites] == [(s.sparsity, s.notes) for s in report.sites]
    with pytest.raises(Killed):
        run("late", stop="distill")
    assert run("late", resume=True)[2] == whole


def test_a_saved_program_takes_every_step() -> None:
    program = torch.export.export(seeded(Gated), (tokens()[0],))
    compiled, report = sc.compile(
        program, tokens(), recipe=recipe("*.down", ("*.up", "*.gate")), options=sc.Options(tokens=(1,))
    )
    check(report, 6)
    state = dict(compiled.named_parameters())  # type: ignore[union-attr]
    for number in range(2):
        half_of_every_four(state[f"blocks.{number}.down.weight"])


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch calls its own deprecated class
def test_an_onnx_file_takes_every_step_but_the_order_which_it_says(tmp_path: Path) -> None:
    path, asked = tmp_path / "model.onnx", recipe("*down*", ("*up*", "*gate*"))
    torch.onnx.export(seeded(Gated), (tokens()[0],), path, dynamo=True, verbose=False)
    _, report = sc.compile(path, tokens(), recipe=asked, options=OPTIONS)
    check(report, 6, reordered=False)
    assert any("permute: no channels were put in another order (channels of ONNX" in note for note in report.notes)


def test_convolutions_in_groups_with_batchnorm_take_every_step() -> None:
    asked = recipe("grouped", ("point", "fc"))
    compiled, report = sc.compile(seeded(Convolutions), images(), recipe=asked, options=OPTIONS)
    check(report, 3)
    half_of_every_four(dotted(compiled, "grouped.weight").permute(0, 2, 3, 1))  # type: ignore[arg-type]
