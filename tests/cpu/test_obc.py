"""OBC against exhaustive least squares: every removal is the best one, every sparsity is in the trace."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from methods import Case, every_case, inputs, obeys, problem_from, problem_of, scaled, with_targets
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, DataError, PatternError, SingularGramError
from sparsify_compiler.passes.prune import elimination
from sparsify_compiler.passes.prune.elimination import Trace, eliminate
from sparsify_compiler.passes.prune.kept import kept_lanes, solve_kept
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem, Pruner

DAMP = 0.01

every_form = pytest.mark.parametrize("method", [OBC(), OBC(scope="row"), OBC(damp=0.3)], ids=str)


def damped(problem: LayerProblem) -> Tensor:
    assert problem.gram is not None
    matrix = problem.gram.matrix
    return matrix + DAMP * matrix.diagonal().mean() * torch.eye(len(matrix)).double()


def newton_point(problem: LayerProblem) -> Tensor:
    """The minimiser of the damped quadratic, by a general solver."""
    assert problem.gram is not None
    ridge = damped(problem) - problem.gram.matrix
    cross = problem.gram.matrix if problem.targets is None else problem.targets.cross
    weight = problem.weight.double()
    return torch.linalg.solve(damped(problem), (weight @ cross.T + weight @ ridge).T).T


def best_on(hessian: Tensor, start: Tensor, kept: list[int]) -> tuple[float, Tensor]:
    """Least squares on `kept` for some rows: the damped loss, and the weights (rows, in)."""
    weight = torch.zeros_like(start)
    if kept:
        square = hessian[kept][:, kept]
        weight[:, kept] = torch.linalg.solve(square, (start @ hessian)[:, kept].T).T
    delta = weight - start
    return float(((delta @ hessian) * delta).sum()), weight


def allowed(pattern: Pattern, gone: list[int], tile: int, in_: int, run: int | None) -> bool:
    if not isinstance(pattern, NM):
        return True
    for start, stop in pattern.groups(in_, run):
        if start <= tile < stop:
            return len([t for t in gone if start <= t < stop]) < stop - start - pattern.keep
    return False


def greedy(problem: LayerProblem, rows: slice, cols: int, steps: int) -> tuple[list[int], list[float]]:
    """Remove tiles one by one, each time trying every candidate by least squares: the order and the increments."""
    hessian, start = damped(problem), newton_point(problem)[rows]
    in_ = start.shape[1]
    gone: list[int] = []
    increments: list[float] = []
    loss = 0.0
    for _ in range(steps):
        best = (float("inf"), -1)
        for tile in range(in_ // cols):
            if tile not in gone and allowed(problem.pattern, gone, tile, in_, problem.run):
                kept = [j for j in range(in_) if j // cols not in (*gone, tile)]
                best = min(best, (best_on(hessian, start, kept)[0], tile))
        increments.append(best[0] - loss)
        loss = best[0]
        gone.append(best[1])
    return gone, increments


def tiny(pattern: Pattern, sparsity: float, out: int, in_: int, run: int | None = None, seed: int = 0) -> LayerProblem:
    return problem_of(Case(pattern, sparsity, out, in_, run), seed)


TINY = (
    (Unstructured(), 0.5, 6, 8, None),
    (Unstructured(), 0.3, 4, 7, None),
    (NM(2, 4), 0.5, 5, 8, None),
    (NM(1, 3), 2 / 3, 4, 8, None),
    (NM(2, 3), 1 / 3, 3, 8, 4),
    (Block(1, 2), 0.5, 5, 8, None),
    (Block(2, 1), 0.5, 6, 8, None),
    (Block(3, 2), 0.4, 6, 8, None),
    (Block(2, 4), 0.5, 4, 8, None),
)

every_tiny = pytest.mark.parametrize(("pattern", "sparsity", "out", "in_", "run"), TINY, ids=str)


@every_tiny
@pytest.mark.parametrize("targets", [False, True], ids=["own", "dense targets"])
def test_every_removal_is_the_best_of_all_candidates(
    pattern: Pattern, sparsity: float, out: int, in_: int, run: int | None, targets: bool
) -> None:
    problem = tiny(pattern, sparsity, out, in_, run)
    if targets:
        x_dense = inputs(40, in_, 1)
        x = x_dense + 0.5 * torch.randn(40, in_, generator=torch.Generator().manual_seed(3)).double()
        problem = with_targets(problem_from(x, problem.weight, pattern, sparsity, run), x, x_dense)
    rows, cols = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    trace = OBC(damp=DAMP).trace(problem)
    assert trace.order.shape[0] == out // rows
    for lane in range(out // rows):
        order, increments = greedy(problem, slice(lane * rows, lane * rows + rows), cols, trace.order.shape[1])
        assert trace.order[lane].tolist() == order
        # Both float64; the reference takes differences of losses, condition numbers are about 1e3.
        scale = sum(increments)
        assert trace.increments[lane].tolist() == pytest.approx(increments, abs=1e-9 * scale)


@every_tiny
def test_the_weights_are_the_damped_optimum_on_the_selected_set(
    pattern: Pattern, sparsity: float, out: int, in_: int, run: int | None
) -> None:
    problem = tiny(pattern, sparsity, out, in_, run)
    solution = OBC(damp=DAMP).prune(problem)
    for row in range(out):
        kept = solution.keep[row].nonzero()[:, 0].tolist()
        expected = best_on(damped(problem), newton_point(problem)[row : row + 1], kept)[1][0]
        # The solve is float64, the weight returned float32.
        assert torch.allclose(solution.weight[row].double(), expected, rtol=0, atol=2e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(1, 4), Block(2, 3)], ids=str)
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_any_sparsity_read_from_the_trace_equals_a_run_that_stops_there(pattern: Pattern, scope: str) -> None:
    method = OBC(scope=scope)  # type: ignore[arg-type]
    problem = tiny(pattern, 0.5, 8, 24)
    trace = method.trace(problem)
    for sparsity in (0.0, 0.1, 0.5, 0.75, 0.99):
        asked = replace(problem, sparsity=sparsity)
        read, run = method.read(asked, trace), method.prune(asked)
        assert torch.equal(read.keep, run.keep)
        assert torch.equal(read.weight, run.weight)


def test_the_increments_sum_to_the_loss_of_the_weights() -> None:
    problem = tiny(Unstructured(), 0.5, 8, 24)
    trace = OBC(damp=DAMP).trace(problem)
    hessian, dense = damped(problem), problem.weight.double()
    for removed in (1, 7, 20, 24):
        keep = trace.keep(torch.full((8,), removed))
        for row in range(8):
            loss, _ = best_on(hessian, dense[row : row + 1], keep[row].nonzero()[:, 0].tolist())
            assert float(trace.increments[row, :removed].sum()) == pytest.approx(loss, rel=1e-9)  # float64, 24 terms


def test_the_layer_budget_takes_the_cheapest_next_removal_of_any_row() -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(9).expand(5, 9)
    increments = torch.rand(5, 9, generator=generator).double() * torch.arange(1, 10)  # not monotone
    trace = Trace(order, increments, 9)
    taken = [0] * 5
    for total in range(1, 46):
        row = min((r for r in range(5) if taken[r] < 9), key=lambda r: increments[r, taken[r]].item())
        taken[row] += 1
        assert trace.counts(total).tolist() == taken


def test_the_layer_budget_beats_the_same_count_in_every_row() -> None:
    problem = tiny(Unstructured(), 0.5, 24, 40)
    by_layer, by_row = (prune_with(problem, OBC(scope=scope)).loss for scope in ("layer", "row"))  # type: ignore[arg-type]
    assert by_layer is not None
    assert by_row is not None
    assert by_layer < by_row


def test_greedy_removal_is_near_the_best_of_all_masks_and_selects_better_than_a_sweep() -> None:
    total = {"best": 0.0, "obc": 0.0, "sparsegpt": 0.0}
    for seed in range(10):
        problem = tiny(Unstructured(), 0.5, 1, 8, seed=seed)
        hessian, dense = damped(problem), problem.weight.double()
        losses = [best_on(hessian, dense, list(kept))[0] for kept in combinations(range(8), 4)]
        for name, method in (("obc", OBC(damp=DAMP)), ("sparsegpt", SparseGPT(damp=DAMP))):
            keep = method.prune(problem).keep
            total[name] += best_on(hessian, dense, keep[0].nonzero()[:, 0].tolist())[0]
        total["best"] += min(losses)
    assert total["best"] <= total["obc"] < total["sparsegpt"]
    assert total["obc"] < 1.1 * total["best"]


@pytest.mark.parametrize("single", [0, 1000], ids=["float32", "float64"])
def test_panels_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, single: int) -> None:
    monkeypatch.setattr(elimination, "SINGLE", single)
    problem = tiny(Unstructured(), 0.5, 12, 96)
    whole = OBC().trace(problem)
    monkeypatch.setattr(elimination, "PANEL", 5)
    monkeypatch.setattr(elimination, "CPU_BYTES", 8 * 96 * 96 * 5)  # five lanes at a time
    parts = OBC().trace(problem)
    assert torch.equal(whole.order, parts.order)
    # The increments are float64 of an inverse that float32 rounds at each of 96 downdates.
    assert torch.allclose(whole.increments, parts.increments, rtol=1e-4 if single == 0 else 1e-9)


def test_the_inverse_in_float32_selects_as_well_as_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny(Unstructured(), 0.5, 12, 96)
    double = OBC().prune(problem)
    monkeypatch.setattr(elimination, "SINGLE", 0)
    single = OBC().prune(problem)
    assert double.loss is not None
    assert single.loss == pytest.approx(double.loss, rel=1e-5)  # near ties may fall the other way


def test_scores_of_tiles_are_the_formula() -> None:
    problem = tiny(Block(2, 3), 0.5, 4, 12)
    inverse, dense = torch.linalg.inv(damped(problem)), problem.weight.double()
    first = OBC(damp=DAMP).trace(problem)
    for lane, rows in enumerate((slice(0, 2), slice(2, 4))):
        scores = []
        for tile in range(4):
            at = slice(3 * tile, 3 * tile + 3)
            scores.append(float((dense[rows, at] @ torch.linalg.inv(inverse[at, at]) * dense[rows, at]).sum()))
        assert int(first.order[lane, 0]) == scores.index(min(scores))
        assert float(first.increments[lane, 0]) == pytest.approx(min(scores), rel=1e-9)  # float64


@every_form
@every_case
def test_every_pattern_is_obeyed_with_its_exact_count_and_the_problem_left_alone(method: OBC, case: Case) -> None:
    problem = problem_of(case)
    assert problem.gram is not None
    before = problem.weight.clone(), problem.gram.matrix.clone()
    solution = prune_with(problem, method)
    assert obeys(case.pattern, solution.keep, case.run) is None
    removed = case.pattern.removed(case.out, case.in_, case.sparsity, case.run, method.scope)
    assert int((~solution.keep).sum()) == removed
    assert torch.equal(before[0], problem.weight)
    assert torch.equal(before[1], problem.gram.matrix)
    again = prune_with(problem_of(case), method)
    assert torch.equal(solution.weight, again.weight)


@every_form
@every_case
@pytest.mark.parametrize(("weight", "input_"), [(8.0, 1.0), (1.0, 0.25), (2.0**-9, 2.0**10)])
def test_scaling_the_weight_or_the_inputs_scales_the_solution(
    method: OBC, case: Case, weight: float, input_: float
) -> None:
    problem = problem_of(case)
    plain, other = method.prune(problem), method.prune(scaled(problem, weight, input_))
    # Powers of two shift exponents only, so every step of the arithmetic is the same: exact equality.
    assert torch.equal(plain.keep, other.keep)
    assert torch.equal(plain.weight * weight, other.weight)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 4), Block(1, 8)], ids=str)
def test_on_correlated_inputs_greedy_removal_selects_better_than_others(pattern: Pattern) -> None:
    # Under N:M the last removals are forced, whatever they cost: there the sweep of SparseGPT selects as well.
    methods: tuple[Pruner, ...] = (OBC(), Magnitude()) if isinstance(pattern, NM) else (OBC(), SparseGPT(), Magnitude())
    losses = [0.0] * len(methods)
    for seed, (at, method) in product(range(5), enumerate(methods)):
        generator = torch.Generator().manual_seed(seed)
        problem = problem_from(inputs(256, 48, seed), torch.randn(32, 48, generator=generator), pattern, 0.5)
        losses[at] += prune_with(problem, method).loss or 0.0
    assert losses == sorted(losses)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 4), Block(2, 1)], ids=str)
def test_inputs_that_never_fired_lose_their_weights_first(pattern: Pattern) -> None:
    x = inputs(60, 16)
    x[:, [4, 5, 6, 7]] = 0.0
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight[:, 4:8] *= 100
    solution = OBC().prune(problem_from(x, weight, pattern, 0.5))
    assert not solution.weight[:, 4:8].any()
    assert torch.isfinite(solution.weight).all()
    if not isinstance(pattern, NM):
        assert not solution.keep[:, 4:8].any()
    assert solution.stats["dead_inputs"] == 4


def test_ties_keep_the_lowest_index_and_rows_of_zeros_go_first() -> None:
    gram = Gram(torch.eye(8, dtype=torch.float64), 99)
    for pattern in (Unstructured(), NM(2, 4), Block(1, 2)):
        keep = OBC(scope="row").prune(LayerProblem("layer", torch.ones(2, 8), pattern, 0.5, gram=gram)).keep
        expected = torch.tensor([1, 1, 0, 0] * 2 if isinstance(pattern, NM) else [1] * 4 + [0] * 4).bool()
        assert torch.equal(keep, expected.expand(2, 8))
    weight = torch.ones(3, 8)
    weight[1] = 0.0
    keep = OBC().prune(LayerProblem("layer", weight, Unstructured(), 0.5, gram=gram)).keep
    assert keep.sum(dim=1).tolist() == [8, 0, 4]


def test_fewer_tokens_than_inputs_are_held_by_the_damping() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    solution = prune_with(problem_from(inputs(5, 32), weight, Unstructured(), 0.5), OBC())
    assert solution.weight.abs().max() < 10 * weight.abs().max()


def test_statistics_that_cannot_be_used_name_the_layer() -> None:
    weight = torch.ones(2, 4)
    with pytest.raises(DataError, match=r"layer 'fc1': obc needs a Gram matrix, found none; give calibration"):
        OBC().prune(LayerProblem("fc1", weight, NM(2, 4), 0.5))
    matrix = torch.eye(4, dtype=torch.float64)
    for bad, error, match in (
        (matrix * float("nan"), CalibrationError, "NaN or infinite"),
        (matrix * 0, SingularGramError, "all zero"),
        (matrix - 0.9 * torch.ones(4, 4), SingularGramError, "indefinite at every damping"),
    ):
        with pytest.raises(error, match=f"layer 'fc1': obc: .*{match}"):
            OBC().prune(LayerProblem("fc1", weight, NM(2, 4), 0.5, gram=Gram(bad.double(), 9)))
    with pytest.raises(PatternError, match=r"layer 'fc1': Block\(3, 3\) does not tile"):
        OBC().prune(LayerProblem("fc1", weight, Block(3, 3), 0.5, gram=Gram(matrix, 9)))


def test_damping_that_was_raised_is_in_the_notes() -> None:
    matrix = torch.eye(8, dtype=torch.float64) - 1.2 * torch.ones(8, 8).double() / 8  # least eigenvalue -0.2
    solution = OBC().prune(LayerProblem("fc1", torch.ones(2, 8), NM(2, 4), 0.5, gram=Gram(matrix, 99)))
    assert solution.stats["damp"] == 1.0
    assert len(solution.notes) == 2


@pytest.mark.parametrize("options", [{"damp": 0.0}, {"damp": 1.5}, {"scope": "column"}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must "):
        OBC(**options)  # type: ignore[arg-type]


def test_kept_sets_of_any_width_are_solved_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny(Unstructured(), 0.5, 40, 24)
    hessian, moment = damped(problem), problem.weight.double()[:, None]
    keep = torch.rand(40, 24, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 40)[:, None]
    whole = solve_kept(hessian, moment, keep)
    monkeypatch.setattr("sparsify_compiler.passes.prune.kept.CPU_BYTES", 8 * 20 * 20 * 3)
    parts = list(kept_lanes(hessian, keep))
    assert torch.cat([part.lanes for part in parts]).sort().values.tolist() == list(range(40))
    for part in parts:
        assert len(part.lanes) == 1 or part.lower.numel() <= 20 * 20 * 3
    assert torch.allclose(solve_kept(hessian, moment, keep), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    for row in range(40):
        kept = keep[row].nonzero()[:, 0]
        expected = torch.linalg.solve(hessian[kept][:, kept], moment[row, 0, kept])
        assert torch.allclose(whole[row, 0, kept], expected, rtol=0, atol=1e-9 * float(whole.abs().max()))
        assert not whole[row, 0, ~keep[row]].any()


def test_a_kept_set_that_cannot_be_factored_is_refused() -> None:
    with pytest.raises(SingularGramError, match="indefinite on the kept columns"):
        solve_kept(-torch.eye(3).double(), torch.ones(1, 1, 3).double(), torch.ones(1, 3).bool())


def test_no_steps_leave_everything() -> None:
    trace = eliminate(torch.eye(4).double(), torch.ones(3, 1, 4).double(), 1, 0)
    assert trace.keep(trace.counts(0)).all()
