"""Tuning of kept weights: exact zeros, closed forms, errors that never rise, resumption."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.passes.prune.layerwise import SiteOutcome, prune_layerwise
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.refine.reconstruct import Reconstruction
from sparsify_compiler.passes.refine.train import Schedule, add_gradients, train
from sparsify_compiler.pattern import NM, Pattern, Unstructured
from sparsify_compiler.plan import decide
from sparsify_compiler.problem import Pruner
from sparsify_compiler.recipe import Recipe, make_rule
from sparsify_compiler.steps import Reconstruct
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded

Batches = Sequence[Tensor]


def ids(count: int = 3) -> list[Tensor]:
    return [torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def walk_of(
    module: nn.Module,
    batches: Batches,
    settings: Reconstruct | None,
    method: Pruner | None = None,
    pattern: Pattern | None = None,
    **more: object,
) -> tuple[TorchGraph, Walk]:
    graph = trace_module(module, batches[0])
    pattern = pattern or Unstructured()
    sparsity = None if pattern.fixed_sparsity() else 0.5
    decisions = decide(Recipe((make_rule("*", pattern, method or SparseGPT(), sparsity),)), graph.sites)
    refine = Reconstruction(graph, settings) if settings is not None else None
    return graph, Walk(graph, batches, decisions, refine=refine, **more)  # type: ignore[arg-type]


def weights_of(graph: TorchGraph) -> dict[str, Tensor]:
    return {site.name: graph.weight(site) for site in graph.sites if site.layout is not None}


def fits(outcomes: Mapping[str, SiteOutcome]) -> list[Mapping[str, object]]:
    found = {each.refined["name"]: each.refined for each in outcomes.values() if each.refined is not None}
    return list(found.values())


def quadratic(target: Tensor) -> tuple[dict[str, Tensor], object]:
    """A weight from zero and the gradient of ½ ‖w − target‖² a batch."""
    weights = {"w": torch.zeros_like(target).requires_grad_()}

    def gradient(given: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
        add_gradients(given, {"w": (given["w"] - target).detach()})
        return float((given["w"] - target).detach().square().sum()) / 2

    return weights, gradient


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    schedule = Schedule(epochs=10, rate=0.5, batches=2, warmup=0.2)
    assert schedule.steps(3) == 20
    rates = [schedule.rate_at(step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * each / 16)) for each in range(16)])


def test_every_epoch_sees_every_batch_once_in_an_order_drawn_from_the_seed() -> None:
    orders = [list(Schedule(3, 0.1, 2, seed=seed).order(5)) for seed in (1, 1, 2)]
    for epoch in orders[0]:
        assert [len(part) for part in epoch] == [2, 2, 1]
        assert sorted(number for part in epoch for number in part) == [0, 1, 2, 3, 4]
    assert orders[0] == orders[1] != orders[2]


def test_the_loop_is_torch_adam_on_the_kept_entries_and_leaves_the_others_exactly_zero() -> None:
    target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    weights, gradient = quadratic(target)
    schedule = Schedule(epochs=7, rate=0.1, batches=1, decay=0.95)
    trained = train(weights, {"w": keep}, 1, gradient, schedule)  # type: ignore[arg-type]
    free = torch.zeros(int(keep.sum()), requires_grad=True)
    adam = torch.optim.Adam([free], betas=(0.9, 0.95), eps=1e-12)
    for step in range(7):
        adam.param_groups[0]["lr"] = schedule.rate_at(step, 7)
        adam.zero_grad()
        ((free - target[keep]).square().sum() / 2).backward()
        adam.step()
    # The same operations on other shapes: vector instructions may round the last bit otherwise.
    assert torch.allclose(weights["w"][keep], free, rtol=1e-6, atol=1e-7)
    assert torch.equal(weights["w"][~keep], torch.zeros(int((~keep).sum())))
    assert len(trained.losses) == 7
    assert trained.losses[-1] < trained.losses[0]


def test_a_loss_that_is_not_finite_ends_the_training_and_is_said() -> None:
    weights, _ = quadratic(torch.ones(1, 1, 2))
    losses = iter([1.0, math.nan, 0.0])

    def gradient(given: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
        add_gradients(given, {"w": torch.ones(1, 1, 2)})
        return next(losses)

    trained = train(weights, None, 1, gradient, Schedule(3, 0.1, 1))
    assert trained.losses == (1.0,)
    assert trained.notes == ("the training loss is nan at step 2 of 3: training ended; lower the rate",)
    assert torch.isfinite(weights["w"]).all()


@pytest.mark.parametrize(
    ("kind", "batches", "pattern"),
    [(Mlp, mlp_batches(), NM(2, 4)), (Cnn, image_batches(), Unstructured()), (Tied, ids(), Unstructured())],
)
def test_reconstruction_keeps_exact_zeros_and_no_segment_gets_worse(
    kind: type[nn.Module], batches: Batches, pattern: Pattern
) -> None:
    module = seeded(kind)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    plain_graph, plain = walk_of(module, batches, None, pattern=pattern)
    prune_layerwise(plain)
    graph, walk = walk_of(module, batches, Reconstruct(3, 1e-3, 2), pattern=pattern)
    outcomes = prune_layerwise(walk)
    by_name = {site.name: site for site in graph.sites}
    for name, outcome in outcomes.items():
        assert torch.equal(graph.weight(by_name[name]) != 0, outcome.keep)
    found = fits(outcomes)
    assert any(fit["kept"] for fit in found)
    for fit in found:
        assert fit["kept"] == (fit["after"] < fit["before"])  # type: ignore[operator]
    first = {name: weight for name, weight in weights_of(plain_graph).items() if by_name[name].segment == 0}
    same = all(torch.equal(weight, graph.weight(by_name[name])) for name, weight in first.items())
    assert same != found[0]["kept"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


class Stack(nn.Module):
    """Two numbered blocks of one linear layer each, and a head: a segment is linear in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(2))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_segment_of_one_linear_layer_ends_at_the_masked_least_squares_optimum() -> None:
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(40, 32, generator=generator) for _ in range(2)]
    module = seeded(Stack)
    graph, walk = walk_of(module, batches, Reconstruct(400, 2e-2, 2), method=Magnitude())
    # A mask without the re-solve: the start is far from the optimum.
    walk.decisions = decide(Recipe((make_rule("*", Unstructured(), Magnitude(), 0.5, refit=False),)), graph.sites)
    walk.__post_init__()
    outcomes = prune_layerwise(walk)
    x = torch.cat(batches).double()
    inputs, dense = x, x
    for number, (site, fit) in enumerate(zip(graph.sites[:2], fits(outcomes), strict=True)):
        linear = module.get_submodule(site.name)
        assert isinstance(linear, nn.Linear)
        bias = linear.bias.detach().double()
        dense = dense @ linear.weight.detach().double().t() + bias
        keep, exact = outcomes[site.name].keep[0], torch.zeros(32, 32, dtype=torch.float64)
        for row in range(32):
            free = keep[row].nonzero()[:, 0]
            exact[row, free] = torch.linalg.lstsq(inputs[:, free], dense[:, row] - bias[row]).solution
        inputs = inputs @ exact.t() + bias
        error = float((inputs - dense).square().sum() / dense.square().sum())
        # Adam stops within a per mille of the optimum's error; the second segment's inputs carry that of the first.
        assert fit["after"] == pytest.approx(error, rel=2e-3 * (number + 1)), site.name
        assert fit["after"] < fit["before"] * 0.9  # type: ignore[operator]


def test_the_next_segment_is_pruned_through_the_tuned_one() -> None:
    batches = mlp_batches()
    graph, walk = walk_of(seeded(Mlp), batches, Reconstruct(2, 1e-3, 2))
    rows: list[Tensor] = []
    twin = seeded(Mlp)
    twin.get_submodule("blocks.1.up").register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 32)))
    for problem in walk.layers():
        if problem.name == "blocks.1.up":
            for site in graph.sites[:2]:
                twin.get_submodule(site.name).weight.data = graph.weight(site)[0]  # type: ignore[union-attr]
            with torch.no_grad():
                for batch in batches:
                    twin(batch)
            x = torch.cat(rows).double()
            assert problem.gram is not None
            # Products are float32: an error of about 1e-7 of the largest entry.
            assert torch.allclose(problem.gram.matrix, x.t() @ x / len(x), rtol=1e-4, atol=1e-6)
        walk.accept(problem.name, SparseGPT().prune(problem))
    assert rows


class Killed(Exception):
    pass


@pytest.mark.parametrize(("kind", "batches"), [(Mlp, mlp_batches()), (Cnn, image_batches())])
def test_a_resumed_reconstruction_equals_an_uninterrupted_one_bit_for_bit(
    kind: type[nn.Module], batches: Batches, tmp_path: Path
) -> None:
    settings = Reconstruct(2, 1e-3, 2)
    whole, walk = walk_of(seeded(kind), batches, settings)
    expected = prune_layerwise(walk)

    def kill(stage: str, done: int, total: int) -> None:
        if stage.startswith("prune") and done == 2:
            raise Killed

    _, first = walk_of(
        seeded(kind), batches, settings, checkpoint=Checkpoint(tmp_path, "run", resume=False), progress=kill
    )
    with pytest.raises(Killed):
        prune_layerwise(first)
    graph, second = walk_of(seeded(kind), batches, settings, checkpoint=Checkpoint(tmp_path, "run", resume=True))
    found = prune_layerwise(second)
    assert fits(found) == fits(expected)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(graph)[name]), name


def test_reconstruction_repeats_itself_bit_for_bit() -> None:
    graphs = []
    for _ in range(2):
        graph, walk = walk_of(seeded(Mlp), mlp_batches(), Reconstruct(2, 1e-3, 2))
        prune_layerwise(walk)
        graphs.append(weights_of(graph))
    assert all(torch.equal(weight, graphs[1][name]) for name, weight in graphs[0].items())


def test_several_batches_a_step_give_the_step_of_one_large_batch() -> None:
    parts = mlp_batches(4)
    tuned = []
    for batches, step in ((parts, 4), ([torch.cat(parts)], 1)):
        graph, walk = walk_of(seeded(Mlp, depth=2), batches, Reconstruct(3, 1e-3, step))
        prune_layerwise(walk)
        tuned.append(weights_of(graph))
    for name, weight in tuned[0].items():
        # Sums in another order; Adam's division by the gradient's own size carries rounding of tiny gradients further.
        assert torch.allclose(weight, tuned[1][name], atol=2e-4), name


def test_products_in_bfloat16_tune_nearly_as_well_and_leave_float32_weights() -> None:
    after = {}
    for precision in ("float32", "bfloat16"):
        graph, walk = walk_of(seeded(Mlp), mlp_batches(), Reconstruct(3, 1e-3, 2, precision))  # type: ignore[arg-type]
        fit = fits(prune_layerwise(walk))[0]
        after[precision] = fit["after"] / fit["before"]  # type: ignore[operator]
        assert all(weight.dtype == torch.float32 for weight in weights_of(graph).values())
    assert after["bfloat16"] < 1
    # Gradients of 3 digits: three short epochs end within a few percent of each other.
    assert after["bfloat16"] == pytest.approx(after["float32"], rel=0.05)
    assert after["bfloat16"] != after["float32"]


def test_the_estimate_counts_the_dense_walk_that_reconstruction_needs() -> None:
    _, plain = walk_of(seeded(Mlp), mlp_batches(), None)
    _, tuned = walk_of(seeded(Mlp), mlp_batches(), Reconstruct())
    assert tuned.estimate().boundary_bytes == 2 * plain.estimate().boundary_bytes
    assert tuned.estimate().statistics_bytes == plain.estimate().statistics_bytes
