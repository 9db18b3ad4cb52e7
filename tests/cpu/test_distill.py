"""Distillation: gradients segment by segment against autograd, its losses in closed form, the best epoch, new masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify_compiler.boundaries import run_graph
from sparsify_compiler.checkpoint import Checkpoint
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.layout import from_problem
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.graph import Site
from sparsify_compiler.passes.gradients import Objective, backpropagate
from sparsify_compiler.passes.refine.distill import Distilled, Epoch, distill
from sparsify_compiler.passes.refine.reselect import DiagonalReselect, SiteMask, site_mask
from sparsify_compiler.passes.refine.teacher import Distance, Divergence, RelativeError, Teacher, sums_to_one
from sparsify_compiler.passes.refine.train import Reselect, Schedule, Trained, TrainingState, add_gradients, train
from sparsify_compiler.pattern import NM, Pattern, Unstructured
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.steps import Distill
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded

Batches = Sequence[Tensor]


def ids(count: int = 3) -> list[Tensor]:
    return [torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(count)]


@dataclass(frozen=True)
class Pruned:
    """A graph with half of every prunable weight removed by magnitude, and its dense outputs."""

    graph: TorchGraph
    module: nn.Module
    sites: tuple[Site, ...]
    keep: dict[str, Tensor]
    teacher: Teacher
    heldout: Teacher

    def weights(self) -> dict[str, Tensor]:
        return {site.name: self.graph.weight(site) for site in self.sites}


def pruned(kind: type[nn.Module], batches: Batches, pattern: Pattern | None = None) -> Pruned:
    module = seeded(kind)
    graph = trace_module(module, batches[0])
    sites = tuple(s for s in graph.sites if s.refusal is None and s.dense_by_default is None)
    teacher, heldout = (Teacher(graph, part, sites) for part in (batches[:-1], batches[-1:]))
    keep = {}
    for site in sites:
        weight = graph.weight(site)
        keep[site.name] = torch.stack([(pattern or Unstructured()).select(w.abs(), 0.5, site.run) for w in weight])
        graph.set_weight(site, weight * keep[site.name])
    return Pruned(graph, module, sites, keep, teacher, heldout)


def distilled(
    found: Pruned,
    settings: Distill,
    distance: Callable[[Teacher], Distance] = RelativeError.of,
    reselect: Reselect | None = None,
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
) -> Distilled:
    """Distil by `distance` on the batches of both of its teachers."""
    both = (distance(found.teacher), distance(found.heldout))
    return distill(found.graph, found.sites, found.keep, *both, settings, reselect, progress, checkpoint=checkpoint)


def native(site: Site, weight: Tensor) -> Tensor:
    """Bring a weight (groups, out, in) into the layer's own shape."""
    assert site.layout is not None
    return from_problem(weight, site.layout, site.shape)


def twin(found: Pruned, kind: type[nn.Module]) -> nn.Module:
    """Build the pruned model as a plain module."""
    module = seeded(kind)
    for site in found.sites:
        module.get_parameter(site.parameter).data = native(site, found.graph.weight(site))
    return module


@pytest.mark.parametrize(("kind", "batches"), [(Mlp, mlp_batches(2)), (Tied, ids(2)), (Cnn, image_batches(2))])
@pytest.mark.parametrize("distance", [Divergence, RelativeError.of])
def test_losses_and_gradients_through_segments_are_those_of_the_whole_module(
    kind: type[nn.Module], batches: Batches, distance: type[Divergence]
) -> None:
    found = pruned(kind, batches)
    by_name = {site.name: site for site in found.sites}
    loss, gradients = backpropagate(found.graph, batches[0], distance(found.teacher).objective(0), by_name)
    module = twin(found, kind)
    new, dense = module(batches[0]), seeded(kind)(batches[0]).detach()
    if distance is Divergence:
        exact = F.kl_div(new.log_softmax(-1), dense.softmax(-1), reduction="sum") / new[..., 0].numel()
    else:
        exact = (new - dense).square().sum() / dense.square().sum()
    exact.backward()
    # A divergence is a sum of differences of float32 logarithms, each off by about 1e-7.
    assert loss == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-7)
    for site in found.sites:
        expected = module.get_parameter(site.parameter).grad
        assert expected is not None
        ours = native(site, gradients[site.name])
        # The loss's own gradient is a difference of near probabilities: about 1e-4 of it is rounding.
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), site.name


class Early(nn.Module):
    """Returns what its first block makes as well as what the second makes of that."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.blocks[0](x).relu()
        return scores, self.blocks[1](scores)


def test_a_loss_leaves_an_output_that_is_remembered_as_it_was() -> None:
    batches = mlp_batches(1)
    graph = trace_module(seeded(Early), batches[0])
    assert len(graph.segments) == 2
    teacher = Teacher(graph, batches, graph.sites)
    scores = torch.zeros_like(teacher.outputs(0)[0])
    first, second = (float(Divergence(teacher).objective(0)((scores,))) for _ in range(2))
    assert first == second > 0


def test_the_divergence_counts_shown_tokens_and_reads_probabilities_as_they_are() -> None:
    dense, scores = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    @dataclass(frozen=True)
    class Fixed(Teacher):
        batches: tuple[dict[str, Tensor], ...]
        values: Tensor

        def outputs(self, number: int) -> tuple[Tensor, ...]:
            return (self.values.clone(),)

    batches = ({"input_ids": mask, "attention_mask": mask},)
    shown = mask.bool()
    exact = F.kl_div(scores[shown].log_softmax(-1), dense[shown].softmax(-1), reduction="batchmean")
    given = scores.clone().requires_grad_()
    loss = Divergence(Fixed(batches, dense)).objective(0)((given,))
    loss.backward()
    free = scores.clone().requires_grad_()
    F.kl_div(free[shown].log_softmax(-1), dense[shown].softmax(-1), reduction="batchmean").backward()
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
    assert given.grad is not None
    assert free.grad is not None
    assert torch.allclose(given.grad, free.grad, atol=1e-7)
    given = scores.softmax(-1).requires_grad_()
    loss = Divergence(Fixed(batches, dense.softmax(-1)), probabilities=True).objective(0)((given,))
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
    loss.backward()
    assert given.grad is not None
    assert torch.allclose(given.grad[shown], -(dense[shown].softmax(-1) / scores[shown].softmax(-1)) / 8, rtol=1e-4)
    assert sums_to_one(dense.softmax(-1))
    assert not sums_to_one(dense)


@pytest.mark.parametrize(
    ("kind", "batches", "distance"),
    [
        (Mlp, mlp_batches(5), RelativeError.of),
        (Cnn, image_batches(5), RelativeError.of),
        (Tied, ids(5), Divergence),
    ],
)
def test_distillation_lowers_the_held_out_loss_with_exact_zeros_and_repeats_itself(
    kind: type[nn.Module], batches: Batches, distance: type[Divergence]
) -> None:
    results = []
    for _ in range(2):
        found = pruned(kind, batches)
        before = {name: tensor.clone() for name, tensor in found.module.state_dict().items()}
        done = distilled(found, Distill(3, 1e-3, 2), distance)
        assert [epoch.number for epoch in done.epochs] == [0, 1, 2, 3]
        assert done.best == min(done.epochs, key=lambda epoch: epoch.heldout).number
        assert done.epochs[done.best].heldout < done.epochs[0].heldout
        assert done.changed == 0
        for name, weight in found.weights().items():
            assert torch.equal(weight != 0, found.keep[name])
            assert torch.equal(done.keep[name], found.keep[name])
        assert all(torch.equal(tensor, before[name]) for name, tensor in found.module.state_dict().items())
        assert all(parameter.grad is None for parameter in found.module.parameters())
        results.append((done.epochs, found.weights()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(weight, results[1][1][name]) for name, weight in results[0][1].items())


def test_training_that_makes_it_worse_leaves_the_weights_it_began_with() -> None:
    found = pruned(Mlp, mlp_batches(3))
    start = found.weights()
    done = distilled(found, Distill(2, 0.9, 2))
    assert done.best == 0
    assert all(torch.equal(weight, start[name]) for name, weight in found.weights().items())


def test_the_dense_outputs_stay_known_when_the_last_segment_is_pruned_too() -> None:
    batches = mlp_batches(2)
    module = seeded(Mlp)
    graph = trace_module(module, batches[0])
    teacher = Teacher(graph, batches, graph.sites)
    for site in graph.sites:
        graph.set_weight(site, torch.zeros_like(graph.weight(site)))
    with torch.no_grad():
        assert torch.allclose(teacher.outputs(1)[0], module(batches[1]), atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "kind", "batches"),
    [(Unstructured(), Mlp, mlp_batches(5)), (NM(2, 4), Mlp, mlp_batches(5)), (Unstructured(), Cnn, image_batches(5))],
)
def test_masks_selected_anew_obey_the_pattern_and_keep_every_group_s_count(
    pattern: Pattern, kind: type[nn.Module], batches: Batches
) -> None:
    found = pruned(kind, batches, pattern)
    masks = tuple(site_mask(site, pattern, found.keep[site.name]) for site in found.sites)
    done = distilled(found, Distill(4, 1e-2, 1), reselect=DiagonalReselect(masks, 2))
    assert done.best > 0
    assert done.changed > 0
    for site in found.sites:
        keep, weight = done.keep[site.name], found.graph.weight(site)
        assert torch.equal(keep.sum((1, 2)), found.keep[site.name].sum((1, 2)))
        assert not weight[~keep].any()
        if isinstance(pattern, NM):
            assert bool((keep.unflatten(2, (-1, 4)).sum(3) == 2).all())


def test_a_pruned_weight_comes_back_when_its_gradients_agree() -> None:
    """One row of four, two kept: the target is on the two that are removed."""
    target = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    weights = {"w": torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]).requires_grad_()}
    keep = {"w": torch.tensor([[[True, True, False, False]]])}
    site = Site("w", "Linear", "w", (1, 4), 1, 4, 1, 4, None, "x", 0)
    reselect = DiagonalReselect((SiteMask(site, Unstructured(), (2,)),), 3)

    def gradient(given: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
        add_gradients(given, {"w": (given["w"] - target).detach()})
        return float((given["w"] - target).detach().square().sum()) / 2

    trained = train(weights, keep, 1, gradient, Schedule(200, 0.05, 1), reselect)
    assert trained.keep is not None
    assert trained.keep["w"].tolist() == [[[False, False, True, True]]]
    assert torch.equal(weights["w"][0, 0, :2], torch.zeros(2))
    assert torch.allclose(weights["w"][0, 0, 2:].detach(), torch.ones(2), atol=1e-2)


@pytest.mark.parametrize("selections", [0, 2])
def test_training_gone_on_with_after_any_epoch_ends_with_the_same_bits(selections: int) -> None:
    target = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    keep = target.abs() > 0.5
    site = Site("w", "Linear", "w", (4, 6), 4, 6, 1, 6, None, "x", 0)
    reselect = (
        DiagonalReselect((SiteMask(site, Unstructured(), (int(keep.sum()),)),), selections) if selections else None
    )

    def run(begin: TrainingState | None) -> tuple[Tensor, Trained, list[TrainingState]]:
        weights = {"w": (torch.ones(1, 4, 6) * keep).requires_grad_()}
        states: list[TrainingState] = []

        def gradient(given: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
            (number,) = numbers
            add_gradients(given, {"w": (given["w"] - target * (number + 1)).detach()})
            return float((given["w"] - target).detach().square().sum())

        schedule = Schedule(4, 0.3, 1, warmup=0.2, seed=1)
        done = train(weights, {"w": keep}, 3, gradient, schedule, reselect, None, begin, states.append)
        return weights["w"].detach(), done, states

    weight, whole, states = run(None)
    assert len(states) == 4
    for state in states:
        again, done, rest = run(state)
        assert len(rest) == 4 - len(state.losses)
        assert torch.equal(again, weight)
        assert done.losses == whole.losses
        assert done.keep is not None
        assert whole.keep is not None
        assert torch.equal(done.keep["w"], whole.keep["w"])


@dataclass(frozen=True)
class Failing(RelativeError):
    """Not a number from the call after `good` ones on."""

    calls: list[int] = field(default_factory=list)
    good: int = 0

    def objective(self, number: int) -> Objective:
        self.calls.append(number)
        inner, factor = super().objective(number), 1.0 if len(self.calls) <= self.good else float("nan")
        return lambda outputs: inner(outputs) * factor


def test_a_loss_that_is_lost_while_distilling_leaves_the_best_epoch_and_says_so() -> None:
    found = pruned(Mlp, mlp_batches(5))
    heldout = RelativeError.of(found.heldout)
    training = Failing(found.teacher, RelativeError.of(found.teacher).energies, good=6)  # four batches: into epoch 2
    done = distill(found.graph, found.sites, found.keep, training, heldout, Distill(3, 1e-3, 1))
    assert (done.best, len(done.epochs)) == (1, 2)
    assert done.notes == ("the training loss is nan at step 7 of 12: training ended; lower the rate",)
    loss = heldout.objective(0)(run_graph(found.graph, heldout.teacher.batches[0]))
    assert float(loss.detach()) == pytest.approx(done.epochs[1].heldout)
    first = Failing(found.heldout, heldout.energies)
    with pytest.raises(CalibrationError, match="relative error to the dense model is nan before any training"):
        distill(found.graph, found.sites, found.keep, training, first, Distill(3, 1e-3, 1))


def test_distillation_that_was_cut_short_goes_on_from_its_last_whole_epoch(tmp_path: Path) -> None:
    def run(
        folder: str, resume: bool = False, stop: int = 99
    ) -> tuple[tuple[Epoch, ...], dict[str, Tensor], list[int]]:
        found, seen = pruned(Mlp, mlp_batches(5)), []

        def progress(stage: str, done: int, total: int) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        checkpoint = Checkpoint(tmp_path / folder, "run", resume)
        done = distilled(found, Distill(4, 3e-2, 1), progress=progress, checkpoint=checkpoint)
        return done.epochs, found.weights(), seen

    epochs, weights, _ = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop=12)
    again, resumed, seen = run("cut", resume=True)
    assert seen == [8, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16]  # the end of the third epoch was never written down
    assert again == epochs
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())


def test_selections_lie_evenly_in_the_first_half_of_the_steps() -> None:
    assert DiagonalReselect((), 4).steps(64) == (7, 15, 23, 31)
    assert DiagonalReselect((), 5).steps(4) == (0, 1)
