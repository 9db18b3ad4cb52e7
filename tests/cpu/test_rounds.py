"""Rounds of pruning over a network: the first is one-shot, the rest see new inputs, the best on held-out data stays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint
from sparsify_compiler.errors import DataError
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.passes.prune.layerwise import prune_layerwise
from sparsify_compiler.passes.prune.rounds import Measure, Rounds, prune_in_rounds
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.pattern import Unstructured
from sparsify_compiler.plan import Decision, decide
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs, Pruner
from sparsify_compiler.recipe import Recipe, make_rule
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded

Batches = Sequence[Tensor]


def graph_of(
    module: nn.Module, batches: Batches, method: Pruner | None = None
) -> tuple[TorchGraph, tuple[Decision, ...]]:
    graph = trace_module(module, batches[0])
    rule = make_rule("*", Unstructured(), method or SparseGPT(), 0.5)
    return graph, decide(Recipe((rule,)), graph.sites)


def counted(*losses: float) -> Measure:
    """A held-out measure that says what it was told to, round after round."""
    left = list(losses)
    return lambda dense: left.pop(0)


def weights_of(graph: TorchGraph) -> dict[str, Tensor]:
    return {site.name: graph.weight(site) for site in graph.sites if site.layout is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def ids(count: int = 3) -> list[Tensor]:
    return [torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize(("kind", "batches"), [(Mlp, mlp_batches()), (Cnn, image_batches()), (Tied, ids())])
def test_one_round_is_the_one_shot_run_bit_for_bit(kind: type[nn.Module], batches: Batches) -> None:
    graph, decisions = graph_of(seeded(kind), batches)
    expected = prune_layerwise(Walk(graph, batches, decisions))
    again, decisions = graph_of(seeded(kind), batches)
    found = prune_in_rounds(again, [batches], decisions, 1, counted(1.0))
    assert same(weights_of(graph), weights_of(again))
    assert [(name, site.loss) for name, site in found.sites.items()] == [(n, s.loss) for n, s in expected.items()]


@pytest.mark.parametrize(("kind", "batches"), [(Mlp, mlp_batches()), (Cnn, image_batches())])
def test_the_first_of_several_rounds_is_the_one_shot_run_and_stays_if_it_is_best(
    kind: type[nn.Module], batches: Batches
) -> None:
    graph, decisions = graph_of(seeded(kind), batches)
    prune_layerwise(Walk(graph, batches[:1], decisions))
    again, decisions = graph_of(seeded(kind), batches)
    found = prune_in_rounds(again, [batches[:1], batches[1:2]], decisions, 2, counted(1.0, 1.0))
    assert found.best == 1
    assert same(weights_of(graph), weights_of(again))


@dataclass(frozen=True)
class Spy:
    """SparseGPT that keeps the problems it is given."""

    seen: list[LayerProblem]
    name: str = "spy"
    needs: Needs = Needs.GRAM

    def prune(self, layer: LayerProblem) -> LayerSolution:
        self.seen.append(layer)
        return SparseGPT().prune(layer)


def test_a_later_round_has_the_dense_weights_and_targets_its_own_batches_and_the_last_weights_as_start() -> None:
    batches, seen = mlp_batches(4), list[LayerProblem]()
    graph, decisions = graph_of(seeded(Mlp), batches, Spy(seen))
    dense = weights_of(graph)
    prune_in_rounds(graph, [batches[:2], batches[2:]], decisions, 2, counted(2.0, 1.0))
    first, second = seen[:8], seen[8:]
    twin, _ = graph_of(seeded(Mlp), batches)
    prune_layerwise(Walk(twin, batches[:2], graph_of(seeded(Mlp), batches)[1]))
    for one, other in zip(first, second, strict=True):
        assert one.start is None
        assert one.targets is None
        assert one.name == other.name
        assert torch.equal(other.weight, dense[other.name][0])
        assert other.targets is not None
        assert other.start is not None
        assert torch.equal(other.start, twin.weight(next(s for s in twin.sites if s.name == other.name))[0])
    # The oracle of a Gram matrix: what a hook sees in a module with the weights that the graph had at that moment.
    module = seeded(Mlp)
    down = module.get_submodule("blocks.0.down")
    module.get_submodule("blocks.0.up").weight.data = second[0].start  # type: ignore[union-attr]
    rows: list[Tensor] = []
    down.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for batch in batches[2:]:
            module(batch)
    x = torch.cat(rows).double()
    assert second[1].gram is not None
    # Products are float32: an error of about 1e-7 of the largest entry.
    assert torch.allclose(second[1].gram.matrix, x.t() @ x / len(x), rtol=1e-4, atol=1e-6)


def test_the_best_round_on_held_out_data_stays_and_its_report_too() -> None:
    batches = mlp_batches(3)
    graph, decisions = graph_of(seeded(Mlp), batches)
    found = prune_in_rounds(graph, [[b] for b in batches], decisions, 3, counted(3.0, 1.0, 2.0))
    two, decisions = graph_of(seeded(Mlp), batches)
    expected = prune_in_rounds(two, [[b] for b in batches[:2]], decisions, 2, counted(3.0, 1.0))
    assert found.best == expected.best == 2
    assert same(weights_of(graph), weights_of(two))
    assert {n: s.loss for n, s in found.sites.items()} == {n: s.loss for n, s in expected.sites.items()}
    assert [each.heldout for each in found.rounds] == [3.0, 1.0, 2.0]
    assert [each.part for each in found.rounds] == [1, 2, 3]
    for name, outcome in found.sites.items():
        site = next(site for site in graph.sites if site.name == name)
        assert torch.equal(graph.weight(site) != 0, outcome.keep)


def test_every_round_says_how_much_of_the_mask_changed_and_what_differed() -> None:
    batches, seen = mlp_batches(4), list[LayerProblem]()
    graph, decisions = graph_of(seeded(Mlp), batches, Spy(seen))
    first, second = prune_in_rounds(graph, [batches[:2], batches[2:]], decisions, 2, counted(2.0, 1.0)).rounds
    now = weights_of(graph)
    flips = sum(int(((p.start != 0) != (now[p.name][0] != 0)).sum()) for p in seen[8:] if p.start is not None)
    assert first.changed is None
    assert first.differed == ()
    assert second.changed == flips / sum(p.weight.numel() for p in seen[8:])
    assert second.changed > 0
    assert second.moved == 8
    assert second.differed == ("batches", "prefix", "Gram", "targets")
    assert first.error is not None
    assert first.error > 0


class Chain(nn.Module):
    """One site, whose input no pruning changes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x).relu())


def test_rounds_end_at_a_fixed_point_and_say_so() -> None:
    batches = mlp_batches()
    graph, decisions = graph_of(seeded(Chain), batches)
    only = tuple(replace(d, rule=None) if d.site.name != "one" else d for d in decisions)
    found = prune_in_rounds(graph, [batches], only, 5, counted(1.0, 1.0, 1.0))
    # With its own inputs as targets the second round solves the first round's problem again.
    assert len(found.rounds) == 2
    assert found.rounds[1].changed == 0
    assert found.best == 1
    assert "fixed point" in found.notes[0]


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [(1, 2), (2, 1), (3, 0)])
def test_a_run_stopped_in_any_round_resumes_to_the_same_bits(tmp_path: Path, moment: tuple[int, int]) -> None:
    batches = mlp_batches(3)
    sets = [[batch] for batch in batches]

    def run(folder: str, resume: bool, stop: str = "") -> tuple[TorchGraph, Rounds]:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == stop:
                raise Killed

        graph, decisions = graph_of(seeded(Mlp), batches)
        checkpoint = Checkpoint(tmp_path / folder, "run", resume)
        return graph, prune_in_rounds(graph, sets, decisions, 3, counted(3.0, 1.0, 2.0), checkpoint, progress)

    graph, whole = run("whole", resume=False)
    with pytest.raises(Killed):
        run("killed", resume=False, stop=f"round {moment[0]} of 3: prune blocks.{moment[1]}")
    again, resumed = run("killed", resume=True)
    assert same(weights_of(graph), weights_of(again))
    assert resumed.rounds == whole.rounds
    assert {n: s.loss for n, s in resumed.sites.items()} == {n: s.loss for n, s in whole.sites.items()}


class Routed(nn.Module):
    """A layer that only samples with a positive first entry reach; inputs (batch, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.head(y) + self.expert(y[x[:, 0] > 0]).sum()


def test_a_site_that_a_later_round_does_not_reach_keeps_what_it_has() -> None:
    every = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    none = torch.cat([-every[:, :1].abs(), every[:, 1:]], 1)
    graph, decisions = graph_of(seeded(Routed), [every])
    found = prune_in_rounds(graph, [[every], [none]], decisions, 2, counted(2.0, 1.0))
    assert found.best == 2
    assert found.starved == ()
    once, again = graph_of(seeded(Routed), [every])
    prune_layerwise(Walk(once, [every], again))
    now, before = weights_of(graph), weights_of(once)
    assert torch.equal(now["expert"], before["expert"])
    assert torch.equal(found.sites["expert"].keep, now["expert"] != 0)
    assert not torch.equal(now["first"], before["first"])
    graph, decisions = graph_of(seeded(Routed), [every])
    assert prune_in_rounds(graph, [[none], [none]], decisions, 2, counted(2.0, 1.0)).starved == ("expert",)


@pytest.mark.parametrize(("count", "sets"), [(0, 1), (3, 2), (2, 0)])
def test_rounds_need_one_set_or_one_a_round(count: int, sets: int) -> None:
    graph, decisions = graph_of(seeded(Chain), mlp_batches())
    with pytest.raises(DataError, match="give one set, or one a round"):
        prune_in_rounds(graph, [mlp_batches(1)] * sets, decisions, count, counted())
