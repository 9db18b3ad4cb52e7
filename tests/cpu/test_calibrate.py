"""The front-to-back walk: what statistics are of, what is held, what starves, what resumes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.passes.prune.layerwise import prune_layerwise
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.plan import decide
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Layerwise, Pruner
from sparsify_compiler.recipe import Recipe, make_rule
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded


def walk_of(
    module: nn.Module, batches: Sequence[Tensor], method: Pruner | None = None, refit: bool = True, **more: object
) -> tuple[TorchGraph, Walk]:
    graph = trace_module(module, batches[0])
    rule = make_rule("*", Unstructured(), method or SparseGPT(), 0.5, refit)
    return graph, Walk(graph, batches, decide(Recipe((rule,)), graph.sites), **more)  # type: ignore[arg-type]


def inputs_of(module: nn.Module, name: str, batches: Sequence[Tensor]) -> Tensor:
    """Independent oracle: what a forward hook sees."""
    seen: list[Tensor] = []
    hook = module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            module(batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def test_statistics_are_of_the_inputs_through_the_already_pruned_prefix() -> None:
    batches = mlp_batches()
    _, walk = walk_of(seeded(Mlp), batches)
    twin = seeded(Mlp)
    for number, problem in enumerate(walk.layers()):
        if number % 2 == 0:  # a new segment begins: two sites each
            rows = inputs_of(twin, problem.name, batches)
            exact = rows.t() @ rows / len(rows)
            assert problem.gram is not None
            assert problem.gram.tokens == len(rows) == 300
            assert torch.allclose(problem.gram.matrix, exact, rtol=1e-4, atol=1e-6)
        solution = SparseGPT().prune(problem)
        twin.get_submodule(problem.name).weight.data = solution.weight  # type: ignore[union-attr]
        walk.accept(problem.name, solution)


def test_statistics_of_a_segment_are_taken_before_any_of_its_sites_is_pruned() -> None:
    batches = mlp_batches()
    _, walk = walk_of(seeded(Mlp), batches)
    problems = walk.layers()
    first = next(problems)
    walk.accept(first.name, LayerSolution(torch.zeros_like(first.weight), torch.zeros_like(first.weight).bool()))
    second = next(problems)
    rows = inputs_of(seeded(Mlp), second.name, batches)
    assert second.gram is not None
    assert torch.allclose(second.gram.matrix, rows.t() @ rows / len(rows), rtol=1e-4, atol=1e-6)


def test_grouped_convolutions_are_one_problem_a_group() -> None:
    _, walk = walk_of(seeded(Cnn), image_batches())
    names = []
    for problem in walk.layers():
        names.append(problem.name)
        walk.accept(problem.name, Magnitude().prune(problem))
    assert names == ["stem", "grouped[group 0]", "grouped[group 1]", "point"]


def test_magnitude_without_data_needs_no_statistics() -> None:
    graph = trace_module(seeded(Mlp), mlp_batches(1)[0])
    rule = make_rule("*", NM(2, 4), Magnitude())
    outcomes = prune_layerwise(Walk(graph, (), decide(Recipe((rule,)), graph.sites)))
    assert len(outcomes) == 8
    assert all(outcome.sparsity == 0.5 and outcome.loss is None for outcome in outcomes.values())


def test_magnitude_with_data_is_refitted() -> None:
    _, walk = walk_of(seeded(Mlp), mlp_batches(), Magnitude())
    for outcome in prune_layerwise(walk).values():
        assert outcome.loss is not None
        assert outcome.loss_selected is not None
        assert outcome.loss < outcome.loss_selected
        assert outcome.tokens == 300


def test_dense_targets_measure_the_error_against_the_dense_model() -> None:
    batches = mlp_batches()
    _, walk = walk_of(seeded(Mlp), batches, dense_targets=True)
    dense, pruned = seeded(Mlp), seeded(Mlp)
    for problem in walk.layers():
        assert problem.targets is not None
        if problem.name.endswith("up"):
            wanted = inputs_of(dense, problem.name, batches) @ problem.weight.double().t()
            given = inputs_of(pruned, problem.name, batches) @ problem.weight.double().t()
            exact = float((wanted - given).square().sum() / len(wanted))
            found = problem.loss(problem.weight)
            energy = float(wanted.square().sum() / len(wanted))
            # Differences of float32 products: error about 1e-6 of the energy.
            assert found == pytest.approx(exact, abs=1e-5 * energy)
        solution = SparseGPT().prune(problem)
        pruned.get_submodule(problem.name).weight.data = solution.weight  # type: ignore[union-attr]
        walk.accept(problem.name, solution)


def test_a_model_pruner_may_lift_a_layer_method_over_the_walk() -> None:
    graph, walk = walk_of(seeded(Mlp), mlp_batches())
    solutions = Layerwise(SparseGPT()).prune_model(walk)
    assert list(solutions) == [site.name for site in graph.sites if site.name != "head"]
    weight = graph.weight(graph.sites[0])[0]
    assert torch.equal(weight, solutions["blocks.0.up"].weight)


def test_the_model_loss_is_zero_at_the_dense_weights_and_differentiable() -> None:
    graph, walk = walk_of(seeded(Mlp), mlp_batches(), dense_targets=True)
    dense = {site.name: graph.weight(site)[0] for site in graph.sites if site.name != "head"}
    Layerwise(SparseGPT()).prune_model(walk)
    assert walk.loss(dense, 0).item() == 0.0
    weight = (dense["blocks.1.up"] * 0.9).requires_grad_()
    loss = walk.loss({**dense, "blocks.1.up": weight}, 0)
    loss.backward()
    assert loss.item() > 0
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


class Routed(nn.Module):
    """An expert that no token of the data is routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(x)
        return self.out(y.relu()) + self.expert(x[:, :0]).sum()


def test_a_site_that_saw_no_token_is_named_and_stays_dense() -> None:
    graph, walk = walk_of(seeded(Routed), mlp_batches())
    before = {site.name: graph.weight(site) for site in graph.sites}
    outcomes = prune_layerwise(walk)
    assert walk.starved == ["expert"]
    assert "expert" not in outcomes
    site = next(site for site in graph.sites if site.name == "expert")
    assert torch.equal(graph.weight(site), before["expert"])


def test_nan_activations_name_the_site_and_the_batch() -> None:
    batches = mlp_batches()
    batches[1][0, 0, 0] = float("nan")
    _, walk = walk_of(seeded(Mlp), batches)
    with pytest.raises(CalibrationError, match=r"blocks\.0\.up.*batch 1"):
        prune_layerwise(walk)


def test_a_resumed_walk_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    batches = mlp_batches()
    whole_graph, whole = walk_of(seeded(Mlp), batches)
    expected = prune_layerwise(whole)

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    _, first = walk_of(seeded(Mlp), batches, checkpoint=Checkpoint(tmp_path, "run", resume=False), progress=kill)
    with pytest.raises(Killed):
        prune_layerwise(first)
    graph, second = walk_of(seeded(Mlp), batches, checkpoint=Checkpoint(tmp_path, "run", resume=True))
    found = prune_layerwise(second)
    assert list(found) == list(expected)
    for name, outcome in found.items():
        assert torch.equal(outcome.keep, expected[name].keep)
        assert outcome.loss == expected[name].loss
        assert outcome.tokens == expected[name].tokens
    for site, other in zip(graph.sites, whole_graph.sites, strict=True):
        if site.layout is not None:
            assert torch.equal(graph.weight(site), whole_graph.weight(other))


def test_a_weight_used_three_times_gathers_all_its_inputs() -> None:
    ids = [torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    _, walk = walk_of(seeded(Tied), ids)
    for problem in walk.layers():
        assert problem.gram is not None
        assert problem.gram.tokens == (3 if problem.name == "shared" else 1) * 48
        walk.accept(problem.name, Magnitude().prune(problem))


def test_the_memory_estimate_counts_shared_inputs_once_and_grows_with_batches() -> None:
    _, few = walk_of(seeded(Mlp), mlp_batches(2))
    _, many = walk_of(seeded(Mlp), mlp_batches(4))
    assert few.estimate().statistics_bytes == 8 * (32 * 32 + 64 * 64)
    assert many.estimate().boundary_bytes == 2 * few.estimate().boundary_bytes


def test_the_memory_estimate_counts_what_dense_targets_hold() -> None:
    _, plain = walk_of(seeded(Mlp), mlp_batches(2))
    dense = replace(plain, dense_targets=True)
    assert dense.estimate().boundary_bytes == 2 * plain.estimate().boundary_bytes
    assert dense.estimate().statistics_bytes == 3 * plain.estimate().statistics_bytes


def test_the_dense_model_is_walked_through_segments_without_a_chosen_site_and_resumed_ones(tmp_path: Path) -> None:
    batches = mlp_batches()
    rules = tuple(make_rule(f"blocks.{number}.*", Unstructured(), SparseGPT(), 0.5) for number in (0, 2, 3))

    def walk_to(name: str, resume: bool) -> float | None:
        graph = trace_module(seeded(Mlp), batches[0])
        walk = Walk(
            graph,
            batches,
            decide(Recipe(rules), graph.sites),
            Checkpoint(tmp_path, "run", resume),
            dense_targets=True,
        )
        for problem in walk.layers():
            if problem.name == name:
                return problem.loss(problem.weight)
            walk.accept(problem.name, SparseGPT().prune(problem))
        return None

    dense, pruned = seeded(Mlp), seeded(Mlp)
    graph = trace_module(seeded(Mlp), batches[0])
    walk = Walk(graph, batches, decide(Recipe(rules[:2]), graph.sites))
    Layerwise(SparseGPT()).prune_model(walk)
    for site in graph.sites[:6]:
        pruned.get_submodule(site.name).weight.data = graph.weight(site)[0]  # type: ignore[union-attr]
    weight = dense.get_submodule("blocks.3.up").weight.detach().double()  # type: ignore[union-attr]
    wanted, given = (inputs_of(module, "blocks.3.up", batches) @ weight.t() for module in (dense, pruned))
    exact = float((wanted - given).square().sum() / len(wanted))
    energy = float(wanted.square().sum() / len(wanted))
    # Differences of float32 products: error about 1e-6 of the energy.
    assert walk_to("blocks.3.up", resume=False) == pytest.approx(exact, abs=1e-5 * energy)
    assert walk_to("blocks.3.up", resume=True) == pytest.approx(exact, abs=1e-5 * energy)


def test_a_batch_that_the_model_cannot_run_is_named() -> None:
    module = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    _, walk = walk_of(module, [torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), 10)])
    with pytest.raises(CalibrationError, match="batch 1 cannot be run"):
        prune_layerwise(walk)


def test_the_model_loss_takes_the_problems_of_a_grouped_convolution() -> None:
    graph, walk = walk_of(seeded(Cnn), image_batches(), Magnitude(), dense_targets=True)
    dense = {
        name: graph.weight(site)[group]
        for site in graph.sites
        if site.refusal is None and site.dense_by_default is None
        for group, name in enumerate(site.problem_names())
    }
    Layerwise(Magnitude()).prune_model(walk)
    assert walk.loss(dense, 0).item() == 0.0
    assert walk.loss({}, 0).item() > 0


class Spy(Magnitude):
    """Magnitude that remembers the precision it ran in."""

    seen: ClassVar[list[str]] = []

    def prune(self, layer: LayerProblem) -> LayerSolution:
        self.seen.append(torch.get_float32_matmul_precision())
        return super().prune(layer)


def test_statistics_and_solves_run_in_whole_float32_whatever_the_caller_chose() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        prune_layerwise(walk_of(seeded(Mlp), mlp_batches(), Spy())[1])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(Spy.seen) == {"highest"}


def test_a_program_that_chose_by_the_newer_settings_is_served_and_left_as_it_was() -> None:
    class NewSpy(Magnitude):
        seen: ClassVar[list[str]] = []

        def prune(self, layer: LayerProblem) -> LayerSolution:
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
            return super().prune(layer)

    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        prune_layerwise(walk_of(seeded(Mlp), mlp_batches(), NewSpy())[1])
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(NewSpy.seen) == {"ieee"}


def test_a_second_round_starts_from_the_pruned_weights_and_measures_against_the_dense_ones() -> None:
    batches = mlp_batches()
    graph, first = walk_of(seeded(Mlp), batches)
    dense = {site.name: graph.weight(site) for site in graph.sites}
    prune_layerwise(first)
    pruned = {site.name: graph.weight(site) for site in graph.sites}
    second = Walk(graph, batches, first.decisions, dense_targets=True, dense_weights=dense)
    for problem in second.layers():
        assert torch.equal(problem.weight, dense[problem.name][0])
        assert problem.start is not None
        assert torch.equal(problem.start, pruned[problem.name][0])
        assert problem.targets is not None
        start, energy = problem.loss(problem.start), problem.energy()
        assert start is not None
        assert energy is not None
        assert 0 < start < energy
        walk_on = SparseGPT().prune(problem)
        second.accept(problem.name, walk_on)


def test_an_objective_of_the_graph_takes_the_place_of_the_gram_quadratic() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    target = rows @ weight.double().t()

    def objective(candidate: Tensor) -> Tensor:
        return (rows @ candidate.double().t() - target).square().sum() / 40

    by_graph = LayerProblem("fc", weight, Unstructured(), 0.5, objective=objective)
    by_gram = LayerProblem("fc", weight, Unstructured(), 0.5, gram=Gram(rows.t() @ rows / 40, 40))
    for candidate in (weight * 0.5, torch.zeros_like(weight)):
        assert by_graph.loss(candidate) == pytest.approx(by_gram.loss(candidate), rel=1e-12)
    assert by_graph.energy() == pytest.approx(by_gram.energy(), rel=1e-12)
