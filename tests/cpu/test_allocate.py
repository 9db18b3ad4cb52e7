"""Sparsities of their own for every site: exact totals, least cost, outliers counted by hand, refusals in words."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.errors import CalibrationError, DataError
from sparsify_compiler.evaluate import fidelity
from sparsify_compiler.export.report import Report, report_from_json
from sparsify_compiler.export.report_html import report_html
from sparsify_compiler.export.report_text import report_text
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.passes.allocate import Allocation, outlier_share
from sparsify_compiler.passes.budget import Curve, Share, fill, round_to_units
from sparsify_compiler.passes.error_curves import Outputs, dense_walk, growth
from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.layerwise import prune_layerwise
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.pipeline.allocation import allocate_sites
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.pruning import prune_graph
from sparsify_compiler.pipeline.rounds import forward_of_graph
from sparsify_compiler.plan import Decision, decide
from sparsify_compiler.problem import Gram, LayerProblem, Pruner
from sparsify_compiler.progress import silent
from sparsify_compiler.recipe import Rule
from sparsify_compiler.steps import Allocate
from tests.models.small import Cnn, Mlp, image_batches, mlp_batches, seeded

UNIFORM = sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5)


def decisions_of(graph: TorchGraph, *rules: Rule) -> tuple[Decision, ...]:
    return decide(sc.Recipe(rules or (UNIFORM,)), graph.sites)


def allocated(graph: TorchGraph, batches: Sequence[Tensor], step: Allocate, *rules: Rule) -> Allocation:
    return allocate_sites(graph, batches, decisions_of(graph, *rules), step, None, silent)


def sparsities(decisions: Sequence[Decision]) -> dict[str, float]:
    return {d.site.name: d.rule.sparsity for d in decisions if d.rule is not None}


class Slanted(nn.Module):
    """Three residual blocks; what the first adds to the output is large, what the last adds is next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp(depth=3)
        with torch.no_grad():
            self.inner.get_submodule("blocks.0.down").weight *= 10.0  # type: ignore[operator]
            self.inner.get_submodule("blocks.2.down").weight *= 0.01  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_the_fill_of_convex_costs_equals_brute_force_over_all_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        sizes = [int(n) for n in torch.randint(6, 13, (3,), generator=generator)]
        scale, power = (
            torch.rand(3, generator=generator).tolist(),
            (1 + 4 * torch.rand(3, generator=generator)).tolist(),
        )
        shares = [Share(n, 1, n // 2, max(n // 2 - 4, 0), min(n // 2 + 4, n - 1)) for n in sizes]
        table = [[a * (count / n) ** p for count in range(n)] for n, a, p in zip(sizes, scale, power, strict=True)]
        budget = sum(share.asked for share in shares)
        every = itertools.product(*(range(share.low, share.high + 1) for share in shares))
        sums = [sum(row[n] for row, n in zip(table, counts, strict=True)) for counts in every if sum(counts) == budget]
        costs = [lambda s, a=a, p=p: a * s**p for a, p in zip(scale, power, strict=True)]
        found = fill(shares, costs)
        assert sum(found) == budget, trial
        assert sum(row[n] for row, n in zip(table, found, strict=True)) == pytest.approx(min(sums), rel=1e-12)


def test_the_fill_has_equal_slopes_where_no_bound_holds() -> None:
    # a s² over n entries has the slope 2 a s / n: with equal sizes the sparsities go as 1 / a, here 0.6, 0.4 and 0.5.
    shares = [Share(60_000, 1, 30_000, 6_000, 54_000)] * 3
    found = fill(shares, [lambda s: s**2 / 0.6, lambda s: s**2 / 0.4, lambda s: s**2 / 0.5])
    assert sum(found) == 90_000
    # a step is 1/64 of the range of 0.8
    assert [share.sparsity(n) for share, n in zip(shares, found, strict=True)] == pytest.approx(
        [0.6, 0.4, 0.5], abs=0.0125
    )


def test_a_cost_that_is_not_convex_is_filled_along_its_hull_and_whole_units_stay_whole() -> None:
    bump = [0.0, 3.0, 3.5, 4.0, 4.1]  # the first unit is dear, the next cheap
    shares = [Share(20, 4, 8, 0, 16), Share(20, 4, 8, 0, 16)]
    assert fill(shares, [lambda s: bump[round(s * 5)], lambda s: 30 * s]) == [16, 0]
    mixed = [Share(20, 4, 8, 0, 16), Share(21, 3, 9, 0, 18)]
    found = fill(mixed, [lambda s: s, lambda s: s**2])
    assert found[0] % 4 == found[1] % 3 == 0
    assert 17 - 2 <= sum(found) <= 17


def test_counts_are_rounded_by_the_largest_remainder_to_the_exact_sum() -> None:
    shares = [Share(100, 1, 50, 0, 99)] * 4
    wanted = [Fraction(tenths, 10) for tenths in (509, 493, 492, 506)]
    assert round_to_units(shares, wanted) == [51, 49, 49, 51]
    assert round_to_units(shares, [Fraction(99, 2), Fraction(101, 2), *[Fraction(50)] * 2]) == [50, 50, 50, 50]
    coarse = [Share(100, 7, 49, 0, 98), Share(100, 1, 51, 0, 99)]
    found = round_to_units(coarse, [Fraction(52), Fraction(48)])
    assert (sum(found), found[0] % 7) == (100, 0)


def test_a_curve_is_geometric_between_its_points_and_linear_from_zero() -> None:
    curve = Curve((0.2, 0.4, 0.6), (0.0, 1.0, 100.0))
    assert [curve(s) for s in (0.2, 0.3, 0.4, 0.5, 0.6)] == pytest.approx([0.0, 0.5, 1.0, 10.0, 100.0])
    assert Curve((0.5,), (3.0,))(0.9) == 3.0


def test_outliers_are_counted_against_five_times_the_mean_over_the_whole_segment() -> None:
    # |w| ‖x‖: ten entries of 1 (weight 0.5, input size 2) and one of 100: the mean is 10, the bar 50.
    first = LayerProblem(
        "a", torch.full((2, 5), 0.5), sc.Unstructured(), 0.5, mean_square=torch.full((5,), 4.0).double()
    )
    second = LayerProblem("b", torch.tensor([[-100.0]]), sc.Unstructured(), 0.5, mean_square=torch.ones(1).double())
    assert outlier_share([first, second]) == 1 / 11
    assert outlier_share([second]) == 0.0


def test_owl_spares_segments_with_outliers_in_proportion() -> None:
    module, batches = seeded(Mlp, depth=3), mlp_batches()
    with torch.no_grad():
        module.get_submodule("blocks.1.up").weight[:3, :5] *= 200.0  # type: ignore[index, operator]
    graph = trace_module(module, batches[0])
    found = allocated(graph, batches, Allocate("owl", 0.1))
    shares, sizes = {}, {}
    x = torch.cat(batches).flatten(0, 1)
    with torch.no_grad():
        for number in range(3):
            block = module.get_submodule(f"blocks.{number}")
            read = [block.norm(x), torch.relu(block.up(block.norm(x)))]  # type: ignore[operator]
            weights = [block.up.weight, block.down.weight]  # type: ignore[union-attr]
            scores = torch.cat(
                [(w.abs() * r.square().mean(0).sqrt()).flatten() for w, r in zip(weights, read, strict=True)]
            )
            shares[number], sizes[number] = float((scores > 5 * scores.mean()).float().mean()), len(scores)
            x = block(x)
    mean = sum(shares[n] * sizes[n] for n in shares) / sum(sizes.values())
    furthest = max(abs(mean - each) for each in shares.values())
    assert furthest > 0.005  # else nothing is tested
    for name, sparsity in sparsities(found.decisions).items():
        number = int(name.split(".")[1])
        assert sparsity == pytest.approx(
            0.5 + 0.1 * (mean - shares[number]) / furthest, abs=1 / 2048
        )  # counts are whole


@pytest.mark.parametrize("step", [Allocate("owl"), Allocate(), Allocate(weigh="outputs")])
@pytest.mark.parametrize("sparsity", [0.05, 0.37, 0.5, 0.93])
def test_the_total_is_that_of_the_rules_and_nothing_moves_beyond_the_spread(step: Allocate, sparsity: float) -> None:
    module, batches = seeded(Cnn), image_batches()
    graph = trace_module(module, batches[0])
    rules = (
        sc.make_rule("point", sc.Block(4, 4), sc.SparseGPT(), 0.5),
        sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), sparsity),
    )
    before = decisions_of(graph, *rules)
    dense = {site.name: graph.weight(site) for site in graph.sites if site.layout}
    found = allocated(graph, batches, step, *rules)
    assert all(torch.equal(graph.weight(site), dense[site.name]) for site in graph.sites if site.layout)
    kept = [prune_layerwise(Walk(graph_, batches, each)) for graph_, each in _both(module, batches, before, found)]
    counts = [sum(int(outcome.keep.sum()) for outcome in outcomes.values()) for outcomes in kept]
    left_dense = sum(
        d.site.groups * d.site.out * d.site.in_ for d in found.decisions if d.reason.startswith("the alloc")
    )
    assert counts[0] == counts[1] + left_dense
    for old, new in zip(before, found.decisions, strict=True):
        if old.rule is not None:
            assert abs(old.rule.sparsity - (new.rule.sparsity if new.rule else 0.0)) <= step.spread + 1e-12
            assert new.rule is None or new.asked == old.rule.sparsity
    assert "as many as without;" in found.notes[0]


def _both(
    module: nn.Module, batches: Sequence[Tensor], before: Sequence[Decision], found: Allocation
) -> list[tuple[TorchGraph, Sequence[Decision]]]:
    return [(trace_module(module, batches[0]), before), (trace_module(module, batches[0]), found.decisions)]


@pytest.mark.parametrize("method", [sc.Wanda(), IOBS(solver="wanda")])
def test_methods_that_prune_by_rows_move_by_whole_columns_and_the_notes_say_what_stays(method: Pruner) -> None:
    module, batches = seeded(Mlp, depth=2), mlp_batches()
    graph = trace_module(module, batches[0])
    before = decisions_of(graph, sc.make_rule("*", sc.Unstructured(), method, 0.5))
    found = allocate_sites(graph, batches, before, Allocate("error-curve", 0.2), None, silent)
    outcomes = prune_layerwise(Walk(graph, batches, found.decisions))
    removed = {name: outcome.keep.numel() - int(outcome.keep.sum()) for name, outcome in outcomes.items()}
    for decision in found.decisions:
        if decision.rule is None:  # the head
            continue
        entries = decision.site.out * decision.site.in_
        assert removed[decision.site.name] == round(decision.rule.sparsity * entries)  # as allocated, exactly
        assert removed[decision.site.name] % decision.site.out == 0
    missing = sum(d.site.out * d.site.in_ // 2 for d in before if d.rule) - sum(removed.values())
    assert 0 <= missing < 64
    assert (f"less {missing}, because" in found.notes[0]) == (missing > 0)


def test_wanda_compares_blocks_of_a_whole_layer_and_moves_by_single_ones() -> None:
    module, batches = seeded(Mlp, depth=2, width=48, inner=48), [torch.randn(3, 48) for _ in range(2)]
    graph = trace_module(module, batches[0])
    before = decisions_of(graph, sc.make_rule("blocks.*", sc.Block(16, 16), sc.Wanda(), 0.5))
    found = allocate_sites(graph, batches, before, Allocate("owl", 0.3), None, silent)
    outcomes = prune_layerwise(Walk(graph, batches, found.decisions))
    removed = sum(outcome.keep.numel() - int(outcome.keep.sum()) for outcome in outcomes.values())
    assert removed == 4 * round(9 * 0.5) * 256  # as many blocks of nine as the rule takes from every layer


def test_the_output_error_of_a_site_is_that_of_the_module_with_its_weight() -> None:
    module, batches = seeded(Mlp, depth=3), mlp_batches(2)
    graph = trace_module(module, batches[0])
    outputs = Outputs(graph, batches)
    for site in graph.sites:
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.get_submodule(site.name).weight *= 0.9  # type: ignore[operator]
        exact = fidelity(lambda x: (module(x),), lambda x, other=other: (other(x),), batches).relative_error
        assert outputs.moved(site, graph.weight(site) * 0.9) == pytest.approx(exact, rel=1e-4)  # float32 outputs


def test_hidden_tokens_do_not_count_in_the_output_error() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    module = seeded(Masked)
    x, mask = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    batch = {"x": x, "attention_mask": mask}
    graph = trace_module(module, batch)
    (site,) = graph.sites
    new = graph.weight(site).tril()
    with torch.no_grad():
        shown, y = x[mask.bool()], module(x, mask)[mask.bool()]
        error = (shown @ (graph.weight(site) - new)[0].T).square().sum() / y.square().sum()
    assert Outputs(graph, [batch]).moved(site, new) == pytest.approx(float(error), rel=1e-5)


def test_a_cost_curve_is_the_effect_at_the_asked_sparsity_times_the_growth_of_the_layer_error() -> None:
    module, batches = seeded(Mlp, depth=2), mlp_batches()
    graph = trace_module(module, batches[0])
    (_, problems), *_ = dense_walk(graph, batches, decisions_of(graph), sc.SparseGPT(), silent)
    grown = growth(problems, Share(2048, 1, 1024, 820, 1228))
    losses = {s: prune_with(replace(problems[0], sparsity=s), sc.SparseGPT(), False) for s in (820 / 2048, 0.5)}
    assert torch.equal(grown.weight[0], losses[0.5].weight)
    curve = grown.curve(7.0)
    assert curve(0.5) == pytest.approx(7.0)
    assert curve(820 / 2048) == pytest.approx(7.0 * losses[820 / 2048].loss / losses[0.5].loss)  # type: ignore[operator]
    assert curve(0.4) < curve(0.5) < curve(0.55)


def test_a_site_whose_asked_sparsity_costs_nothing_is_weighed_at_the_highest_and_zero_weights_are_free() -> None:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = Gram(x.T @ x / 32, 32)
    half = LayerProblem("half", torch.tensor([[1.0, 0.0, 0.0, 2.0]]), sc.Unstructured(), 0.5, gram=gram)
    grown = growth([half], Share(4, 1, 2, 1, 3))
    assert (grown.errors[:2], grown.reference) == ((0.0, 0.0), 2)
    assert int((grown.weight == 0).sum()) == 3
    assert [grown.curve(5.0)(s) for s in (0.25, 0.5, 0.75)] == [0.0, 0.0, 5.0]
    zero = replace(half, weight=torch.zeros(1, 4))
    assert growth([zero], Share(4, 1, 2, 1, 3)).curve(5.0)(0.75) == 0.0


@pytest.mark.parametrize("weigh", ["gradients", "outputs"])
def test_error_curves_take_from_what_hardly_matters_and_the_outputs_gain_on_other_data(weigh: str) -> None:
    module, data = seeded(Slanted), mlp_batches(6)
    batches, other = data[:4], data[4:]
    errors = {}
    for spread in (None, 0.2):
        graph = trace_module(module, batches[0])
        decisions: Sequence[Decision] = decisions_of(graph)
        if spread is not None:
            step = Allocate("error-curve", spread, weigh)  # type: ignore[arg-type]
            decisions = allocate_sites(graph, batches, decisions, step, None, silent).decisions
            given = sparsities(decisions)
            assert given["inner.blocks.2.down"] == given["inner.blocks.2.up"] == pytest.approx(0.7, abs=1 / 2048)
            assert given["inner.blocks.0.down"] < 0.4
        prune_layerwise(Walk(graph, batches, decisions))
        errors[spread] = fidelity(lambda x: (module(x),), forward_of_graph(graph), other).relative_error
    assert errors[0.2] < 0.9 * errors[None]


def test_fixed_patterns_are_left_out_beside_others() -> None:
    module, batches = seeded(Mlp, depth=2), mlp_batches()
    graph = trace_module(module, batches[0])
    fixed = sc.make_rule("*", sc.NM(2, 4), sc.SparseGPT())
    found = allocated(graph, batches, Allocate(), sc.make_rule("blocks.*.up", sc.Unstructured(), ALPS(), 0.6), fixed)
    given = sparsities(found.decisions)
    assert {given[name] for name in given if "up" not in name} == {0.5}
    assert given["blocks.0.up"] + given["blocks.1.up"] == pytest.approx(2 * round(0.6 * 2048) / 2048)
    assert found.notes[-2] == "allocate: 2 sites of fixed patterns were left out"


def test_a_spread_above_the_sparsity_may_leave_a_site_dense() -> None:
    module, batches = seeded(Slanted), mlp_batches()
    graph = trace_module(module, batches[0])
    found = allocated(graph, batches, Allocate("error-curve", 0.5), sc.make_rule("*", sc.Unstructured(), ALPS(), 0.1))
    dense = [d for d in found.decisions if d.rule is None]
    assert dense
    assert "the allocation leaves it dense; sparsity 0.1 was asked" in {d.reason for d in dense}


def test_data_that_says_nothing_is_refused() -> None:
    module, batches = seeded(Mlp, depth=2), mlp_batches()
    graph = trace_module(module, batches[0])
    with pytest.raises(CalibrationError, match="no batch was given"):
        allocated(graph, [], Allocate())

    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).argmax(-1)

    graph = trace_module(seeded(Best), batches[0])
    rule = sc.make_rule("inner", sc.Unstructured(), sc.SparseGPT(), 0.5)
    with pytest.raises(CalibrationError, match=r'no relative error.*batch 0, whose size is 0:.*by = "owl"'):
        allocated(graph, batches, Allocate(), rule)
    with pytest.raises(CalibrationError, match=r'sum of squares 0 on 3 batches.*by = "owl"'):
        allocated(graph, batches, Allocate(weigh="outputs"), rule)


def recipe(rounds: int = 1) -> sc.Recipe:
    return sc.Recipe((UNIFORM,), rounds=rounds, allocate=Allocate("error-curve", 0.2))


def asked_and_given(report: Report) -> dict[str, tuple[float | None, float]]:
    return {site.name: (site.asked_sparsity, site.sparsity) for site in report.sites if site.status == "pruned"}


def test_a_compiled_model_has_the_allocated_sparsities_and_the_report_says_so() -> None:
    module, batches = seeded(Mlp, depth=2), mlp_batches()
    _, report = sc.compile(module, batches, recipe=recipe(), options=sc.Options(tokens=(1,)))
    rows = asked_and_given(report)
    assert {asked for asked, _ in rows.values()} == {0.5}
    graph = trace_module(module, batches[0])
    given = sparsities(allocated(graph, batches, Allocate("error-curve", 0.2)).decisions)
    assert {name: sparsity for name, (_, sparsity) in rows.items()} == pytest.approx(given)
    assert len(set(given.values())) > 1
    assert sum(given[name] for name in given) == 0.5 * len(given)  # sites of one size, powers of two
    assert report.notes[0].startswith("allocate: by error-curve, 4 sites within 0.2")
    assert report.seconds["allocate"] > 0
    assert "0.5 asked" in report_text(report)
    assert "0.5 asked" in report_html(report)
    assert report_from_json(report.to_json()) == report


def test_every_round_prunes_by_the_first_allocation() -> None:
    module, batches = seeded(Mlp, depth=2), mlp_batches(6)
    reports = []
    for rounds in (1, 3):
        options = sc.Options(tokens=(1,), share_batches=rounds > 1)
        # with held-out data, else rounds would keep a batch aside that one round allocates by
        _, report = sc.compile(module, batches[:5], recipe=recipe(rounds), options=options, heldout=batches[5:])
        reports.append(report)
    assert len(reports[1].rounds) == 3
    assert asked_and_given(reports[0]) == asked_and_given(reports[1])


def test_generated_inputs_are_refused() -> None:
    magnitude = sc.Recipe(
        (sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.5, refit=False),), allocate=Allocate()
    )
    graph = trace_module(seeded(Mlp), mlp_batches(1)[0])
    job = Job("model", magnitude, sc.Options(), mlp_batches(1), True, None, silent, None)
    with pytest.raises(DataError, match=r"\[allocate\] needs calibration data"):
        prune_graph(job, graph)


def test_a_killed_run_allocates_again_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def run(name: str, resume: bool = False, stop: str = "") -> bytes:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == stop:
                raise Killed

        options = sc.Options(output=tmp_path / name, onnx=False, tokens=(1,), resume=resume)
        sc.compile(seeded(Mlp, depth=3), mlp_batches(2), recipe=recipe(), options=options, progress=progress)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("whole")
    for stop in ("allocate blocks.1", "prune blocks.2"):
        with pytest.raises(Killed):
            run("killed", stop=stop)
        assert run("killed", resume=True) == whole
        (tmp_path / "killed").rename(tmp_path / stop.replace(" ", "-"))
