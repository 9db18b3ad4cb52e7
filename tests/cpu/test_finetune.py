"""Tuning between rounds: PyTorch's own Adam on the module, masks, and what the rounds and recipes make of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sparsify_compiler as sc
from sparsify_compiler.api_table import Draw, method_table, recipe_trial
from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import RecipeError
from sparsify_compiler.frontends.layout import to_problem
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.passes.gradients import DenseOutputs, NextToken, Objective
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.rounds import Rounds, prune_in_rounds
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.passes.refine.finetune import finetune
from sparsify_compiler.passes.refine.train import EPSILON, Schedule, Trained
from sparsify_compiler.pipeline.own_loss import check_trainable, own_loss
from sparsify_compiler.plan import decide
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs, Pruner
from sparsify_compiler.progress import silent
from sparsify_compiler.steps import Allocate, FineTune, Permute
from tests.models.small import Mlp, mlp_batches, seeded


class Causal(nn.Module):
    """Predicts the next of 20 tokens from the running sum of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).cumsum(1)
        return self.head(self.inner(x).relu())


def ids(count: int = 5) -> list[Tensor]:
    return [torch.randint(0, 20, (3, 8), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def traced(module: nn.Module, batch: Batch) -> TorchGraph:
    return trace_module(module, batch)


def recipe(method: Pruner, rounds: int = 2, settings: FineTune | None = None, refit: bool = False) -> sc.Recipe:
    rule = sc.make_rule("*", sc.Unstructured(), method, 0.5, refit)
    return sc.Recipe((rule,), rounds=rounds, finetune=settings)


def test_it_is_adam_on_the_mean_loss_of_each_step_with_a_rate_that_falls_along_a_cosine() -> None:
    module, batches = seeded(Causal), ids()
    graph = traced(module, batches[0])
    settings = FineTune(epochs=2, rate=1e-2, batches=2)
    trained = finetune(graph, batches, graph.sites, NextToken(), settings, seed=4)
    twin = seeded(Causal)
    twin.embed.requires_grad_(False)
    tuned = [twin.inner.weight, twin.head.weight]  # biases are no sites and stay
    adam = torch.optim.Adam(tuned, eps=EPSILON)  # type: ignore[arg-type]
    schedule, step, means = Schedule(2, 1e-2, 2, seed=4), 0, []
    for parts in schedule.order(len(batches)):
        total = 0.0
        for numbers in parts:
            tokens = torch.cat([batches[number] for number in numbers])
            loss = cross_entropy(twin(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            adam.zero_grad()
            loss.backward()
            adam.param_groups[0]["lr"] = schedule.rate_at(step, schedule.steps(len(batches)))
            adam.step()
            total += float(loss.detach()) * len(numbers)
            step += 1
        means.append(total / len(batches))
    for site in graph.sites:
        assert site.layout is not None
        expected = to_problem(twin.get_parameter(site.parameter).detach(), site.layout)
        # gradients are summed batch by batch there and at once here; Adam's step is bounded by the rate
        assert torch.allclose(graph.weight(site), expected, atol=2e-4)
    assert trained.losses == pytest.approx(means, rel=1e-4)
    assert trained.losses[1] < trained.losses[0]


@pytest.mark.parametrize("masked", [True, False])
def test_pruned_weights_stay_zero_only_where_that_is_asked(masked: bool) -> None:
    module, batches = seeded(Causal), ids()
    graph = traced(module, batches[0])
    keep = {}
    for site in graph.sites:
        weight = graph.weight(site)
        keep[site.name] = weight.abs() > weight.abs().median()
        graph.set_weight(site, weight * keep[site.name])
    settings = FineTune(epochs=1, rate=1e-2, batches=1, masked=masked)
    finetune(graph, batches, graph.sites, NextToken(), settings, keep)
    for site in graph.sites:
        moved = graph.weight(site)[~keep[site.name]] != 0
        assert not moved.any() if masked else float(moved.float().mean()) > 0.5


@dataclass(frozen=True)
class Lost(DenseOutputs):
    """Not a number from the second step on."""

    calls: list[Batch] = field(default_factory=list)

    def objective(self, batch: Batch) -> Objective:
        self.calls.append(batch)
        inner, factor = super().objective(batch), 1.0 if len(self.calls) < 2 else float("nan")
        return lambda outputs: inner(outputs) * factor


def test_tuning_whose_loss_is_lost_leaves_the_weights_and_says_so() -> None:
    batches = mlp_batches(3)
    graph = traced(seeded(Mlp), batches[0])
    before = {site.name: graph.weight(site) for site in graph.sites}
    lost = Lost(lambda batch: (torch.zeros(*batch.shape[:-1], 10),))  # type: ignore[union-attr]
    done = finetune(graph, batches, graph.sites, lost, FineTune(epochs=1, rate=1e-3, batches=1))
    assert all(torch.equal(graph.weight(site), before[site.name]) for site in graph.sites)
    assert done.notes == (
        "the training loss is nan at step 2 of 3: training ended; lower the rate",
        "the weights stay as they were before the fine-tuning",
    )


def test_weights_are_tuned_where_the_graph_runs_not_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, devices = ids(1), []
    graph = traced(seeded(Causal), batches[0])

    def train(weights: Mapping[str, Tensor], keep: Mapping[str, Tensor], *rest: object, **more: object) -> Trained:
        devices.extend(tensor.device.type for tensor in (*weights.values(), *keep.values()))
        return Trained((), None, ("nothing was done",))

    module = "sparsify_compiler.passes.refine.finetune"
    monkeypatch.setattr(f"{module}.run_graph", lambda *_: (torch.ones(1, device="meta"),))
    monkeypatch.setattr(f"{module}.train", train)
    keep = {site.name: graph.weight(site) != 0 for site in graph.sites}
    finetune(graph, batches, graph.sites, NextToken(), FineTune(epochs=1, rate=1e-3, batches=1, masked=True), keep)
    assert devices == ["meta"] * 4  # two weights and their masks


class Spy:
    """A method that keeps the problems it is given, and prunes as iobs does."""

    name = "spy"
    needs = Needs.GRAM

    def __init__(self) -> None:
        self.seen: list[LayerProblem] = []

    def prune(self, layer: LayerProblem) -> LayerSolution:
        self.seen.append(layer)
        return IOBS().prune(layer)


def in_rounds(method: Pruner, batches: Sequence[Batch], count: int, tune: float = 0.0) -> tuple[Rounds, TorchGraph]:
    """Prune an Mlp in rounds; `tune` is added to every weight in between."""
    graph = traced(seeded(Mlp), batches[0])
    decisions = decide(recipe(method), graph.sites)

    def between(_: Sequence[Batch], dense: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> tuple[str, ...]:
        for site in graph.sites:
            if site.name in keep:
                graph.set_weight(site, graph.weight(site) + tune)
        return (f"tuned {len(keep)} sites",)

    found = prune_in_rounds(graph, [batches], decisions, count, lambda dense: 1.0, tune=between if tune else None)
    return found, graph


def test_the_next_round_starts_from_the_tuned_weights_with_the_dense_ones_as_targets() -> None:
    spy, batches = Spy(), mlp_batches(2)
    found, _ = in_rounds(spy, batches, 2, tune=0.5)  # type: ignore[arg-type]
    dense = traced(seeded(Mlp), batches[0])
    by_name = {site.name: dense.weight(site)[0] for site in dense.sites}
    first, second = spy.seen[: len(spy.seen) // 2], spy.seen[len(spy.seen) // 2 :]
    for before, after in zip(first, second, strict=True):
        assert after.start is not None
        assert torch.equal(after.start, IOBS().prune(before).weight + 0.5)
        assert torch.equal(after.weight, by_name[after.name])
        assert after.targets is not None
    assert found.rounds[1].differed == ("prefix", "Gram", "targets", "fine-tuning")
    assert found.notes == (f"tuned {len(first)} sites",)
    assert [each.heldout for each in found.rounds] == [1.0, 1.0]


def test_the_last_round_is_not_tuned() -> None:
    found, graph = in_rounds(IOBS(), mlp_batches(2), 1, tune=0.5)
    assert found.notes == ()
    assert all(
        bool((graph.weight(s)[~found.sites[s.name].keep] == 0).all()) for s in graph.sites if s.name in found.sites
    )


def test_finetune_is_refused_for_methods_that_would_not_see_it() -> None:
    batches = ids()
    graph = traced(seeded(Causal), batches[0])
    asked = recipe(sc.SparseGPT(), settings=FineTune())
    with pytest.raises(RecipeError, match=r"finetune, but 'sparsegpt' of 'inner' prunes the dense weights anew"):
        check_trainable(graph, decide(asked, graph.sites), asked)
    stages: list[str] = []
    late = dataclasses.replace(asked, permute=Permute(), allocate=Allocate())
    with pytest.raises(RecipeError, match="choose iobs or woodtaylor"):
        sc.compile(seeded(Causal), batches, recipe=late, progress=lambda stage, *_: stages.append(stage))
    held = {"ids": sc.Heldout(batches)}
    with pytest.raises(RecipeError, match="choose iobs or woodtaylor"):
        method_table(seeded(Causal), [Draw(batches, "ids")], held, [recipe_trial("late", late)], device="cpu")
    assert set(stages) == {"trace"}
    for method in (IOBS(), WoodTaylor()):
        fits = recipe(method, settings=FineTune())
        check_trainable(graph, decide(fits, graph.sites), fits)


@pytest.mark.parametrize("kind", [Causal, Mlp])
def test_a_recipe_with_both_runs_from_end_to_end_and_the_report_says_what_differed(kind: type[nn.Module]) -> None:
    batches = ids(6) if kind is Causal else mlp_batches(6)
    settings = FineTune(epochs=1, rate=1e-3, batches=2)
    asked = recipe(WoodTaylor(step=0.05, curvature="fisher"), 2, settings)
    asked = sc.parse_recipe(sc.format_recipe(asked), {"woodtaylor": WoodTaylor})
    _, report = sc.compile(
        seeded(kind),
        batches[:4],
        recipe=asked,
        options=sc.Options(tokens=(1,), share_batches=True),
        heldout=batches[4:],
    )
    assert report.rounds[1].differed == ("prefix", "Gram", "targets", "gradient", "fine-tuning")
    what = "cross-entropy of the calibration tokens" if kind is Causal else "half the squared distance to the dense"
    assert any(note.startswith("the model's own loss is") and what in note for note in report.notes)
    assert any("of the pruned sites between rounds, mean loss of its epochs: " in note for note in report.notes)
    assert any("held the gradient and the curvature" in note for note in report.notes)
    assert not any("no gradient of the model's loss" in note for site in report.sites for note in site.notes)
    again = sc.compile(
        seeded(kind),
        batches[:4],
        recipe=asked,
        options=sc.Options(tokens=(1,), share_batches=True),
        heldout=batches[4:],
    )[1]
    assert [each.heldout for each in again.rounds] == [each.heldout for each in report.rounds]


def test_one_round_of_woodtaylor_takes_the_gradient_too() -> None:
    batches = ids(4)
    _, report = sc.compile(seeded(Causal), batches, recipe=recipe(WoodTaylor(), 1), options=sc.Options(tokens=(1,)))
    assert any(note.startswith("the model's own loss is the cross-entropy") for note in report.notes)
    assert not any("no gradient" in note for site in report.sites for note in site.notes)
    assert not any("no step was taken" in note for note in report.notes)


def test_one_round_of_woodtaylor_without_a_gradient_takes_no_step_and_the_report_says_so() -> None:
    asked, batches = [recipe(WoodTaylor(), rounds) for rounds in (1, 2)], mlp_batches(4)
    notes = []
    for each in asked:
        _, report = sc.compile(seeded(Mlp, depth=1), batches, recipe=each, options=sc.Options(tokens=(1,)))
        notes.append([note for note in report.notes if note.startswith("woodtaylor: its one round")])
    assert [len(found) for found in notes] == [1, 0]
    assert "no step was taken, its solver alone pruned" in notes[0][0]
    # and it is true: the target of the solver is the dense weight
    graph = traced(seeded(Mlp, depth=1), batches[0])
    loss = own_loss(graph, decide(asked[0], graph.sites), asked[0], batches, silent)
    assert loss.expand is not None
    for expansion in loss.expand(batches, {}).values():
        assert float(expansion.gradient.abs().max()) < 1e-6 * float(expansion.output_curvature.max())


def test_a_run_stopped_in_its_second_round_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def run(name: str, resume: bool = False, stop: str = "") -> bytes:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == stop:
                raise Killed

        asked = recipe(WoodTaylor(curvature="fisher"), 2, FineTune(epochs=1, rate=1e-3, batches=1))
        options = sc.Options(output=tmp_path / name, onnx=False, tokens=(1,), resume=resume)
        sc.compile(seeded(Mlp, depth=3), mlp_batches(4), recipe=asked, options=options, progress=progress)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", stop="round 2 of 2: prune blocks.2")
    assert run("killed", resume=True) == whole
