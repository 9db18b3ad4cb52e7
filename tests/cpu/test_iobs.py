"""I-OBS against least squares on every support, its bounds, its two forms of curvature, and its baselines."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, DataError, SingularGramError
from sparsify_compiler.passes.prune.curvature import DenseCurvature
from sparsify_compiler.passes.prune.curvature_products import ProductCurvature
from sparsify_compiler.passes.prune.hard_thresholding import IHT, StochasticIOBS
from sparsify_compiler.passes.prune.iobs import IOBSStep, Stop, minimise, top_k
from sparsify_compiler.passes.prune.iobs_bounds import Constants, constants_along, hard_thresholding_ratio
from sparsify_compiler.passes.prune.smooth import Differentiable, Quadratic
from sparsify_compiler.passes.prune.support_search import GreedyOBS, SwapSearch
from sparsify_compiler.passes.prune.supports import Exhaustive, TopK


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(count: int, n: int, d: int, seed: int = 0) -> tuple[Quadratic, Tensor, Tensor]:
    x, y = randn(count, n, d, seed=seed), randn(count, n, seed=seed + 1)
    return Quadratic.least_squares(x, y), x, y


@dataclass(frozen=True)
class Bowl:
    """½ (θ − c)ᵀA(θ − c) + Σ cosh(θ_i − c_i): strongly convex, no quadratic, least at c."""

    matrix: Tensor
    center: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        delta = weight - self.center
        return (delta @ self.matrix * delta).sum(dim=1) / 2 + delta.cosh().sum(dim=1)

    def constants(self, radius: float) -> Constants:
        """Return bounds that hold within `radius` of the centre: the third derivative is sinh."""
        values = torch.linalg.eigvalsh(self.matrix)
        one = torch.ones(len(self.center), dtype=torch.float64)
        return Constants(
            one * (values[0] + 1),
            one * (values[-1] + np.cosh(radius)),
            one * np.sinh(radius),
            (self.center != 0).sum(dim=1),
            one * (self.matrix.diagonal().mean() + 1),
        )


def bowl(count: int, d: int, nonzero: int, seed: int = 0) -> Bowl:
    mixing = randn(2 * d, d, seed=seed)
    center = top_k(randn(count, d, seed=seed + 1), torch.full((count,), nonzero))[0]
    return Bowl(mixing.T @ mixing / d, center)


def test_with_every_support_tried_a_step_is_the_best_least_squares_of_all_supports() -> None:
    problem, x, y = regression(200, 14, 7)
    solution = minimise(problem, IOBSStep(Exhaustive()), randn(200, 7, seed=9), kept=3)
    for i in range(200):
        least, best, value = np.inf, (), np.zeros(3)
        for support in combinations(range(7), 3):
            found, residual, *_ = np.linalg.lstsq(x[i][:, support].numpy(), y[i].numpy(), rcond=None)
            if residual[0] < least:
                least, best, value = residual[0], support, found
        assert tuple(solution.keep[i].nonzero()[:, 0].tolist()) == best
        assert np.abs(solution.weight[i, list(best)].numpy() - value).max() <= 1e-8
        assert float(solution.trace.loss[-1, i]) == pytest.approx(least / 2, rel=1e-10)
    assert not solution.weight[~solution.keep].any()
    assert solution.settled.all()
    assert solution.steps == 2  # the second step confirms the first


@pytest.mark.parametrize(("d", "kept"), [(4, 1), (6, 3), (10, 5), (10, 8)])
def test_a_step_is_the_papers_option_2_written_with_explicit_inverses(d: int, kept: int) -> None:
    problem, *_ = regression(4, 2 * d, d, seed=d)
    start = randn(4, d, seed=5)
    solution = minimise(problem, IOBSStep(Exhaustive(), step=0.7), start, kept, Stop(1))
    for i in range(4):
        matrix = problem.matrix[i].numpy()
        inverse = np.linalg.inv(matrix)
        point = start[i].numpy() - 0.7 * inverse @ problem.value_and_gradient(start)[1][i].numpy()
        best = (np.inf, np.zeros(d))
        for gone in combinations(range(d), d - kept):
            pick = np.eye(d)[list(gone)]
            schur = pick.T @ np.linalg.inv(pick @ inverse @ pick.T) @ pick
            score = point @ schur @ point
            if score < best[0]:
                best = (score, point - inverse @ schur @ point)
        assert np.abs(solution.weight[i].numpy() - best[1]).max() <= 1e-8


def test_the_projection_is_oblique_idempotent_and_short_in_the_norm_of_the_hessian_only() -> None:
    longest = 0.0
    for seed in range(20):
        mixing = randn(8, 8, seed=seed) * torch.logspace(-1, 1, 8, dtype=torch.float64)
        matrix = mixing.T @ mixing + 1e-3 * torch.eye(8)
        keep = torch.randperm(8, generator=torch.Generator().manual_seed(seed)) < 4
        project = DenseCurvature.of(matrix).project(torch.eye(8).double(), keep.expand(8, 8)).T
        removed = torch.eye(8) - project  # H⁻¹Hˢ
        root = torch.linalg.cholesky(matrix).T
        for operator in (project, removed):
            size = float(torch.linalg.matrix_norm(operator, 2))
            longest = max(longest, size)
            # condition numbers up to 1e6 and operators of norm `size`: 1e-15 · 1e6 · size², with a factor to spare
            assert float((operator @ operator - operator).abs().max()) <= 1e-8 * size**2
            in_norm = root @ operator @ torch.linalg.inv(root)
            assert float(torch.linalg.matrix_norm(in_norm, 2)) <= 1 + 1e-8
    assert longest > 10  # the paper's Lemma 7 says at most 1


def test_hard_thresholding_obeys_the_tight_ratio_always_and_meets_it() -> None:
    for d, kept, nonzero in ((10, 3, 2), (10, 9, 1), (6, 6, 3), (40, 20, 20), (7, 4, 0)):
        ratio = hard_thresholding_ratio(d, kept, nonzero)
        x, reference = randn(300, d, seed=d), top_k(randn(300, d, seed=1), torch.full((300,), nonzero))[0]
        reference[::2] = top_k(x, torch.full((300,), nonzero))[0][::2]  # the nearest ones, where it is sharpest
        cut = top_k(x, torch.full((300,), kept))[0]
        left, right = (cut - x).square().sum(dim=1), (x - reference).square().sum(dim=1)
        assert bool((left <= ratio * right * (1 + 1e-12)).all())
        flat = torch.ones(1, d, dtype=torch.float64)
        nearest = top_k(flat, torch.tensor([nonzero]))[0]
        cut = top_k(flat, torch.tensor([kept]))[0]
        assert float((cut - flat).square().sum()) == pytest.approx(ratio * float((flat - nearest).square().sum()))
    with pytest.raises(ValueError, match="needs 0 <= sparsity"):
        hard_thresholding_ratio(4, 2, 3)


@pytest.mark.parametrize("step", [1.0, 0.5])
@pytest.mark.parametrize("damp", [0.0, 0.1])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("selector", [TopK(), Exhaustive(), SwapSearch()], ids=str)
def test_no_step_leaves_more_than_the_theorems_allow(
    selector: TopK | Exhaustive | SwapSearch, compensate: bool, damp: float, step: float
) -> None:
    loss = bowl(30, 9, 3)
    method = IOBSStep(selector, compensate, step, damp)
    start = loss.center + 0.2 * randn(30, 9, seed=2)
    assert float((start - loss.center).norm(dim=1).max()) <= 1.2
    constants = loss.constants(1.2)
    solution = minimise(Differentiable(loss), method, start, 5, Stop(8, None), loss.center, constants)
    trace = solution.trace
    assert trace.distance is not None
    if not compensate and not isinstance(selector, TopK):
        assert trace.bound is None  # no theorem
        return
    assert trace.bound is not None
    inside = trace.distance[:-1] <= 1.2  # where the constants hold
    floor = 1e-13  # rounding of a Newton step near the solution
    assert bool(((trace.distance[1:] <= trace.bound.tight[1:] + floor) | ~inside).all())
    assert bool((trace.bound.tight[1:] <= trace.bound.printed[1:] * (1 + 1e-12)).all())
    assert trace.bound.tight[0].isnan().all()


def test_on_a_smooth_loss_the_distance_falls_quadratically() -> None:
    loss = bowl(20, 12, 4)
    solution = minimise(
        Differentiable(loss), IOBSStep(TopK(), compensate=False), loss.center + 0.1, 4, reference=loss.center
    )
    assert solution.trace.distance is not None
    assert float(solution.trace.distance[-1].max()) <= 1e-14
    assert solution.steps <= 6
    assert solution.settled.all()


def test_a_greedy_selector_has_no_theorem_and_is_given_no_bound() -> None:
    loss = bowl(2, 6, 2)
    solution = minimise(
        Differentiable(loss), IOBSStep(GreedyOBS()), loss.center, 3, Stop(2), loss.center, loss.constants(1)
    )
    assert solution.trace.bound is None


def test_on_a_quadratic_the_bound_is_zero_after_a_full_step_and_the_printed_one_too() -> None:
    problem, *_ = regression(3, 20, 6)
    sparse = top_k(problem.center, torch.full((3,), 2))[0]
    problem = Quadratic(problem.matrix, sparse)
    constants = constants_along(problem, [sparse + 1], sparse)
    assert constants.lipschitz.tolist() == [0.0] * 3
    assert constants.sparsity.tolist() == [2] * 3
    solution = minimise(problem, IOBSStep(), sparse + 1, 3, reference=sparse, constants=constants)
    assert solution.trace.bound is not None
    assert solution.trace.distance is not None
    assert not solution.trace.bound.tight[1:].any()
    assert float(solution.trace.distance[-1].max()) <= 1e-12


def test_estimated_constants_lie_inside_those_that_hold() -> None:
    loss = bowl(4, 6, 2)
    found = constants_along(Differentiable(loss), [loss.center + 0.2, loss.center - 0.4], loss.center)
    true = loss.constants(1.0)
    assert bool((found.convexity >= true.convexity - 1e-12).all())
    assert bool((found.smoothness <= true.smoothness + 1e-12).all())
    assert bool((found.lipschitz <= true.lipschitz + 1e-12).all())
    assert bool((found.lipschitz > 0).all())


def test_a_full_step_on_a_fixed_quadratic_forgets_where_it_started() -> None:
    # The fixed-point trap: rounds on the same layer quadratic return the same answer each time.
    problem, *_ = regression(5, 20, 8)
    first = minimise(problem, IOBSStep(GreedyOBS()), torch.zeros(5, 8), 4, Stop(1))
    for start in (first.weight, randn(5, 8, seed=7), 100 * randn(5, 8, seed=8)):
        again = minimise(problem, IOBSStep(GreedyOBS()), start, 4, Stop(1))
        assert torch.equal(again.keep, first.keep)
        assert float((again.weight - first.weight).abs().max()) <= 1e-10  # 1e-15 · 100 · a condition number of 1e2


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("damp", [0.0, 0.05])
def test_products_give_the_same_steps_as_the_matrix(compensate: bool, damp: float) -> None:
    loss = bowl(6, 10, 3)
    start = loss.center + 0.3 * randn(6, 10, seed=3)
    method = IOBSStep(TopK(), compensate, damp=damp)
    with_matrix = minimise(Differentiable(loss), method, start, 5, Stop(4, None))
    with_products = minimise(Differentiable(loss, "products"), method, start, 5, Stop(4, None))
    # Conjugate gradients end at 1e-10; the mean diagonal that damping is a share of is estimated to some percent.
    allowed = 1e-8 if damp == 0 else 3e-3
    assert float((with_matrix.weight - with_products.weight).abs().max()) <= allowed


def test_the_largest_curvature_by_products_is_that_of_the_matrix() -> None:
    problem, *_ = regression(4, 30, 9)
    dense = DenseCurvature.of(problem.matrix)
    products = ProductCurvature.of(dense.product, problem.center)
    assert torch.allclose(products.largest(), dense.largest(), rtol=0.03)  # the power method, from below
    assert bool((products.largest() <= dense.largest() * (1 + 1e-12)).all())


def test_one_hessian_for_all_rows_is_the_same_as_one_each() -> None:
    matrix = regression(1, 30, 8)[0].matrix[0]
    center = randn(12, 8)
    kept = torch.arange(12) % 8 + 1
    for method in (IOBSStep(GreedyOBS()), IOBSStep(SwapSearch()), IOBSStep(TopK(), compensate=False, damp=0.1), IHT()):
        shared = minimise(Quadratic(matrix, center), method, torch.zeros(12, 8), kept, Stop(3, None))
        own = minimise(Quadratic(matrix.expand(12, -1, -1), center), method, torch.zeros(12, 8), kept, Stop(3, None))
        assert torch.equal(shared.keep, own.keep)
        assert torch.equal(shared.keep.sum(dim=1), kept)
        assert torch.allclose(shared.weight, own.weight, rtol=1e-10, atol=1e-12)


def test_a_row_that_settled_waits_unchanged_for_the_others() -> None:
    problem, *_ = regression(2, 12, 6)
    start = torch.stack([minimise(problem, IOBSStep(), torch.zeros(2, 6), 3).weight[0], randn(6, seed=4)])
    damped = IOBSStep(step=0.3)
    both = minimise(problem, damped, start, 3, Stop(200, 1e-10))
    alone = minimise(Quadratic(problem.matrix[:1], problem.center[:1]), damped, start[:1], 3, Stop(200, 1e-10))
    assert both.settled.all()
    assert torch.allclose(both.weight[0], alone.weight[0], rtol=1e-12)
    assert both.steps > alone.steps
    late = both.trace.moved[alone.steps + 1 :, 0]
    assert len(late) > 0
    assert not late.any()


def test_the_trace_counts_what_entered_and_left() -> None:
    problem = Quadratic(torch.eye(4).double(), torch.tensor([[3.0, 2.0, 1.0, 0.0]]).double())
    start = torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    trace = minimise(problem, IOBSStep(), start, 2).trace
    assert trace.changed[:, 0].tolist() == [0, 4, 0]
    assert trace.loss[:, 0].tolist() == [27.0, 0.5, 0.5]  # (9 + 4 + 16 + 25) / 2, then 1² / 2
    assert trace.moved[1:, 0].tolist() == [pytest.approx((63 / 13) ** 0.5), 0.0]  # 3² + 2² + 5² + 5² over 3² + 2²


def test_an_indefinite_hessian_is_damped_in_steps_that_are_told_and_refused_past_the_last() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05])).double()
    solution = minimise(
        Quadratic(matrix, torch.zeros(1, 4).double()), IOBSStep(damp=0.01), torch.ones(1, 4), 2, Stop(1)
    )
    assert solution.notes == ("the curvature is indefinite at damp 0.01: raised to 0.1",)
    undamped = minimise(Quadratic(matrix, torch.zeros(1, 4).double()), IOBSStep(), torch.ones(1, 4), 2, Stop(1))
    assert len(undamped.notes) == 8  # to 1e-8, then tenfold up to 0.1
    with pytest.raises(SingularGramError, match=r"every damping from 0\.01 to 1; give more data"):
        minimise(Quadratic(-matrix, torch.zeros(1, 4).double()), IOBSStep(damp=0.01), torch.ones(1, 4), 2)
    with pytest.raises(SingularGramError, match="not positive along a search direction; raise damp"):
        ProductCurvature.of(lambda v: v @ matrix, torch.ones(1, 4).double()).solve(torch.ones(1, 4).double())


def test_conjugate_gradients_that_do_not_end_are_an_error() -> None:
    matrix = torch.diag(torch.logspace(0, 6, 40, dtype=torch.float64))
    curvature = ProductCurvature(lambda v: v @ matrix, torch.ones(1, 40), torch.zeros(1), most_iterations=5)
    with pytest.raises(SingularGramError, match="did not reach 1e-10 in 5 products"):
        curvature.solve(torch.ones(1, 40).double())


def test_k_iht_takes_one_over_the_largest_curvature_and_keeps_the_largest() -> None:
    problem, *_ = regression(3, 12, 6)
    start = randn(3, 6, seed=6)
    solution = minimise(problem, IHT(), start, 2, Stop(1))
    for i in range(3):
        matrix = problem.matrix[i].numpy()
        moved = start[i].numpy() - matrix @ (start - problem.center)[i].numpy() / np.linalg.eigvalsh(matrix)[-1]
        moved[np.argsort(-np.abs(moved))[2:]] = 0.0
        assert np.abs(solution.weight[i].numpy() - moved).max() <= 1e-12
    fixed = minimise(problem, IHT(step=0.5, smoothness=100.0), start, 6, Stop(1))
    assert torch.allclose(fixed.weight, start - problem.value_and_gradient(start)[1] / 200, rtol=1e-12)


def test_the_stochastic_step_divides_by_the_gradient_on_the_support_and_draws_its_batches() -> None:
    rows = [(torch.tensor([[1.0, 2.0, 2.0]]).double(), 4.0), (torch.tensor([[0.0, 3.0, 1.0]]).double(), -1.0)]
    seen: list[int] = []

    def batch(step: int) -> Differentiable:
        seen.append(step)
        x, y = rows[step % 2]
        return Differentiable(lambda weight: ((weight * x).sum(dim=1) - y).square() / 2)

    whole = Differentiable(lambda w: sum(((w * x).sum(dim=1) - y).square() / 2 for x, y in rows))  # type: ignore[arg-type, return-value]
    solution = minimise(whole, StochasticIOBS(0.5), torch.tensor([[1.0, 0.0, 0.0]]), 2, Stop(1), batches=batch)
    gradient = np.array([-3.0, -6.0, -6.0])  # (1 − 4) x, of length 9 and 3 on the support
    moved = np.array([1.0, 0.0, 0.0]) - gradient / (0.5 + 9 / 9)
    assert solution.weight[0].tolist() == pytest.approx([0.0, *moved[1:]])
    assert seen == [0]
    assert solution.trace.loss[0, 0] == pytest.approx((9 + 1) / 2)


def test_stochastic_steps_recover_a_sparse_vector() -> None:
    x, truth = randn(400, 20), torch.zeros(1, 20).double()
    truth[0, [2, 7, 11]] = torch.tensor([1.0, -2.0, 0.5]).double()

    def batch(step: int) -> Quadratic:
        rows = torch.randperm(400, generator=torch.Generator().manual_seed(step))[:64]
        return Quadratic(x[rows].T @ x[rows] / 64, truth)

    solution = minimise(Quadratic(x.T @ x / 400, truth), StochasticIOBS(3.0), torch.zeros(1, 20), 6, batches=batch)
    assert float((solution.weight - truth).norm()) <= 1e-3  # 100 steps, each a factor of about 2/3 and no noise at θ*


@pytest.mark.parametrize("kept", [-1, 7, torch.tensor([1, 9])])
def test_impossible_counts_are_refused(kept: int | Tensor) -> None:
    with pytest.raises(ValueError, match="must lie in 0"):
        minimise(Quadratic(torch.eye(6).double(), torch.ones(2, 6).double()), IOBSStep(), torch.zeros(2, 6), kept)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": 1.5}, {"damp": -0.1}, {"damp": 2.0}])
def test_impossible_options_of_the_step_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        IOBSStep(**options)  # type: ignore[arg-type]


def test_impossible_options_of_the_baselines_are_refused() -> None:
    for options in ({"step": 0.0}, {"smoothness": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            IHT(**options)
    with pytest.raises(ValueError, match="must be positive"):
        StochasticIOBS(0.0)


def test_a_loss_that_is_not_finite_is_refused_with_its_step() -> None:
    bad = Differentiable(lambda weight: weight.log().sum(dim=1))
    with pytest.raises(CalibrationError, match="not finite after 0 steps"):
        minimise(bad, IHT(smoothness=1.0), -torch.ones(1, 3), 2)
    broken = Quadratic(torch.full((2, 2), float("nan")).double(), torch.zeros(1, 2).double())
    with pytest.raises(CalibrationError, match="not finite"):
        minimise(broken, IOBSStep(), torch.ones(1, 2), 1)


def test_a_singular_regression_has_no_centre() -> None:
    with pytest.raises(SingularGramError, match="not positive definite"):
        Quadratic.least_squares(torch.zeros(1, 5, 3), torch.zeros(1, 5))


def test_constants_cannot_be_read_off_products() -> None:
    with pytest.raises(DataError, match="only products"):
        constants_along(Differentiable(bowl(1, 4, 2), "products"), [], torch.zeros(1, 4))
