"""Support selectors against surgery written out with explicit inverses, and against every support."""

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sparsify_compiler.errors import DataError
from sparsify_compiler.passes.prune.curvature import DenseCurvature
from sparsify_compiler.passes.prune.curvature_products import ProductCurvature
from sparsify_compiler.passes.prune.support_admm import ADMM
from sparsify_compiler.passes.prune.support_search import GreedyOBS, SwapSearch
from sparsify_compiler.passes.prune.supports import (
    ColumnSweep,
    DiagonalOBS,
    Exhaustive,
    Selector,
    TopK,
    inverse_factors,
    keep_counts,
)

Array = npt.NDArray[np.float64]

SELECTORS: tuple[Selector, ...] = (
    TopK(),
    DiagonalOBS(),
    ColumnSweep(),
    ColumnSweep(width=1),
    ColumnSweep(width=3),
    GreedyOBS(),
    SwapSearch(),
    SwapSearch(start=GreedyOBS()),
    ADMM(),
    Exhaustive(),
)
every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=str)


def problems(count: int, d: int, seed: int = 0, shared: bool = False) -> tuple[Tensor, DenseCurvature]:
    """Make Newton points (count, d) and Hessians whose entries are correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 if shared else count, 3 * d, d, generator=generator, dtype=torch.float64)
    x = x + torch.randn(len(x), 3 * d, 1, generator=generator, dtype=torch.float64)
    target = torch.randn(count, d, generator=generator, dtype=torch.float64)
    return target, DenseCurvature.of(x.mT @ x / (3 * d))


def entries(curvature: DenseCurvature, row: int) -> Array:
    return curvature.matrix[row if len(curvature.matrix) > 1 else 0].numpy()


def cost(matrix: Array, target: Array, keep: npt.NDArray[np.bool_]) -> float:
    """Return θ⁺_Sᵀ ([H⁻¹]_SS)⁻¹ θ⁺_S, the paper's score of a removed set, from an explicit inverse."""
    gone = ~keep
    inner = np.linalg.inv(matrix)[np.ix_(gone, gone)]
    return float(target[gone] @ np.linalg.solve(inner, target[gone])) if gone.any() else 0.0


def mean_cost(selector: Selector, kept: int, seed: int) -> float:
    target, curvature = problems(20, 10, seed)
    keep = selector.select(target, curvature, torch.full((20,), kept))
    costs = [cost(entries(curvature, i), target[i].numpy(), keep[i].numpy()) for i in range(20)]
    return sum(costs) / len(costs)


@every_selector
@pytest.mark.parametrize("shared", [True, False])
def test_every_row_keeps_the_count_it_was_given(selector: Selector, shared: bool) -> None:
    target, curvature = problems(8, 9, shared=shared)
    before = target.clone()
    kept = torch.tensor([0, 1, 2, 4, 5, 8, 9, 4])
    keep = selector.select(target, curvature, kept)
    assert keep.dtype == torch.bool
    assert torch.equal(keep.sum(dim=1), kept)
    assert torch.equal(target, before)


@every_selector
def test_a_row_is_chosen_for_itself_alone(selector: Selector) -> None:
    target, curvature = problems(6, 8)
    kept = torch.tensor([3, 4, 2, 5, 3, 4])
    together = selector.select(target, curvature, kept)
    for i in range(6):
        own = DenseCurvature.of(curvature.matrix[i])
        assert torch.equal(selector.select(target[i : i + 1], own, kept[i : i + 1])[0], together[i])


@pytest.mark.parametrize(
    "selector", [s for s in SELECTORS if not (isinstance(s, ColumnSweep) and s.width < 8)], ids=str
)  # a narrow sweep spends an equal share in every span
def test_with_a_diagonal_hessian_every_selector_but_magnitude_keeps_the_most_expensive(selector: Selector) -> None:
    target, _ = problems(5, 8)
    diagonal = torch.linspace(0.1, 3.0, 8, dtype=torch.float64)
    curvature = DenseCurvature.of(torch.diag(diagonal))
    kept = torch.full((5,), 3)
    expected = keep_counts(target.square() * diagonal, kept)
    if isinstance(selector, TopK):
        expected = keep_counts(target.abs(), kept)
    assert torch.equal(selector.select(target, curvature, kept), expected)


def test_counts_keep_the_lowest_index_where_scores_tie() -> None:
    keep = keep_counts(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([2, 3]))
    assert keep.tolist() == [[False, True, True, False], [True, True, True, False]]


def test_the_exhaustive_search_finds_the_support_of_least_cost() -> None:
    target, curvature = problems(10, 8)
    keep = Exhaustive().select(target, curvature, torch.full((10,), 3))
    for i in range(10):
        costs = {}
        for support in combinations(range(8), 3):
            option = np.isin(np.arange(8), support)
            costs[support] = cost(entries(curvature, i), target[i].numpy(), option)
        assert tuple(keep[i].nonzero()[:, 0].tolist()) == min(costs, key=lambda support: costs[support])


def test_the_exhaustive_search_refuses_more_supports_than_it_was_allowed() -> None:
    target, curvature = problems(1, 30)
    with pytest.raises(DataError, match=r"155117520 supports of 15 in 30 .* choose greedy"):
        Exhaustive().select(target, curvature, torch.tensor([15]))


@pytest.mark.parametrize("shared", [True, False])
def test_greedy_obs_equals_surgery_with_an_explicit_inverse_each_time(shared: bool) -> None:
    target, curvature = problems(6, 9, shared=shared)
    keep = GreedyOBS().select(target, curvature, torch.full((6,), 4))
    for i in range(6):
        matrix, weight, left = entries(curvature, i), target[i].numpy().copy(), list(range(9))
        while len(left) > 4:
            inverse = np.linalg.inv(matrix[np.ix_(left, left)])
            place = int(np.argmin(weight[left] ** 2 / np.diag(inverse)))
            weight[left] -= inverse[:, place] * weight[left[place]] / inverse[place, place]
            weight[left.pop(place)] = 0.0
        assert keep[i].nonzero()[:, 0].tolist() == left


def test_the_diagonal_score_is_that_of_the_inverse() -> None:
    target, curvature = problems(6, 9)
    keep = DiagonalOBS().select(target, curvature, torch.full((6,), 4))
    inverse = torch.from_numpy(np.stack([np.diag(np.linalg.inv(entries(curvature, i))) for i in range(6)]))
    assert torch.equal(keep, keep_counts(target.square() / inverse, torch.full((6,), 4)))


@pytest.mark.parametrize("width", [1, 4, 16])
def test_the_sweep_equals_surgery_on_the_columns_still_free(width: int) -> None:
    target, curvature = problems(6, 10)
    kept = 4
    keep = ColumnSweep(width).select(target, curvature, torch.full((6,), kept))
    for i in range(6):
        matrix, weight = entries(curvature, i), target[i].numpy().copy()
        upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
        expected = np.ones(10, dtype=bool)
        for start in range(0, 10, width):
            stop = min(start + width, 10)
            count = (10 - kept) * stop // 10 - (10 - kept) * start // 10
            scores = (weight[start:stop] / np.diag(upper)[start:stop]) ** 2
            expected[start + np.argsort(-scores, kind="stable")[stop - start - count :]] = False
            for j in range(start, stop):
                if not expected[j]:
                    inverse = np.linalg.inv(matrix[j:, j:])
                    weight[j:] -= weight[j] / inverse[0, 0] * inverse[0]
        assert np.array_equal(keep[i].numpy(), expected)


@pytest.mark.parametrize("start", [TopK(), GreedyOBS(), ColumnSweep(width=1)], ids=str)
def test_after_the_swap_search_no_exchange_of_two_entries_helps(start: Selector) -> None:
    target, curvature = problems(8, 9)
    counts = torch.full((8,), 4)
    first, keep = start.select(target, curvature, counts), SwapSearch(start).select(target, curvature, counts)
    for i in range(8):
        matrix, point = entries(curvature, i), target[i].numpy()
        found = cost(matrix, point, keep[i].numpy())
        assert found <= cost(matrix, point, first[i].numpy()) * (1 + 1e-12)
        for gone in keep[i].nonzero()[:, 0].tolist():
            for come in (~keep[i]).nonzero()[:, 0].tolist():
                option = keep[i].numpy().copy()
                option[[gone, come]] = option[[come, gone]]
                assert cost(matrix, point, option) >= found * (1 - 1e-10)  # rounding of two float64 solves


def test_many_swaps_do_not_let_rounding_add_up() -> None:
    # from the worst support: more exchanges than the table is updated without a fresh start
    @torch.no_grad()
    def worst(target: Tensor, kept: Tensor) -> Tensor:
        return keep_counts(-target.abs(), kept)

    class Worst(TopK):
        def select(self, target: Tensor, curvature: object, kept: Tensor) -> Tensor:
            return worst(target, kept)

    target, curvature = problems(2, 200, seed=3)
    counts = torch.full((2,), 100)
    keep = SwapSearch(Worst()).select(target, curvature, counts)
    assert int((keep & ~worst(target, counts)).sum(dim=1).min()) > 64
    greedy = GreedyOBS().select(target, curvature, counts)
    for i in range(2):
        matrix, point = entries(curvature, i), target[i].numpy()
        # a local optimum of exchanges is about as good as the greedy one; a broken table is far from it
        assert cost(matrix, point, keep[i].numpy()) <= 1.1 * cost(matrix, point, greedy[i].numpy())


def test_selectors_that_look_further_cost_less_on_average() -> None:
    for kept in (3, 5, 7):
        costs = {str(s): sum(mean_cost(s, kept, seed) for seed in range(4)) for s in SELECTORS}
        exhaustive, greedy = costs[str(Exhaustive())], costs[str(GreedyOBS())]
        assert exhaustive <= min(costs.values()) * (1 + 1e-12)
        assert costs[str(SwapSearch(start=GreedyOBS()))] <= greedy * (1 + 1e-12)
        assert greedy < costs[str(DiagonalOBS())]
        assert costs[str(SwapSearch())] < costs[str(TopK())]


def test_once_solved_for_admm_beats_greedy_surgery_and_that_the_sweep_and_that_magnitudes() -> None:
    # the order that ALPS reports; ADMM needs some room to move in: with ten entries a row it does not lead
    target, curvature = problems(40, 64)
    costs = []
    for selector in (SwapSearch(), ADMM(), GreedyOBS(), ColumnSweep(), TopK()):
        keep = selector.select(target, curvature, torch.full((40,), 21))
        delta = curvature.project(target, keep) - target
        costs.append(float((delta * curvature.product(delta)).sum()))
    assert costs == sorted(costs)


def admm(matrix: Array, target: Array, kept: int) -> list[int]:
    """Run ALPS for one row, with a solve a step; s counts entries that came and that went."""
    scale = np.sqrt(np.diag(matrix))
    matrix, target = matrix / scale[:, None] / scale, target * scale

    def largest(values: Array) -> npt.NDArray[np.bool_]:
        return np.isin(np.arange(len(values)), np.argsort(-np.abs(values), kind="stable")[:kept])

    keep = before = largest(target)
    sparse, dual, rho, moved = target * keep, np.zeros_like(target), 0.1, False
    for iteration in range(1, 301):
        dense = np.linalg.solve(matrix + rho * np.eye(len(matrix)), matrix @ target - dual + rho * sparse)
        keep = largest(dense + dual / rho)
        sparse = (dense + dual / rho) * keep
        dual = dual + rho * (dense - sparse)
        if iteration % 3 == 0:
            s = int((keep ^ before).sum())
            moved = moved or s > 0
            if s == 0 and (moved or rho < 1e-4):
                break
            rho *= (1.3 if s > kept / 10 else 1.2 if s > kept / 200 else 1.1) if moved else 0.2
            before = keep
    return list(np.flatnonzero(keep))


def test_admm_raises_its_penalty_by_what_came_and_went() -> None:
    target, curvature = problems(40, 60, seed=3)
    keep = ADMM().select(target, curvature, torch.full((40,), 30))
    for row in range(40):
        expected = admm(entries(curvature, row), target[row].numpy(), 30)
        assert keep[row].nonzero()[:, 0].tolist() == expected, f"row {row}"


@every_selector
def test_what_reads_the_entries_of_the_hessian_refuses_products(selector: Selector) -> None:
    target, curvature = problems(3, 6)
    products = ProductCurvature.of(curvature.product, target)
    kept = torch.full((3,), 2)
    if isinstance(selector, TopK):
        assert torch.equal(selector.select(target, products, kept), selector.select(target, curvature, kept))
    else:
        with pytest.raises(DataError, match="only products"):
            selector.select(target, products, kept)


def test_the_factor_of_the_inverse_is_upper_triangular() -> None:
    _, curvature = problems(3, 7)
    upper = inverse_factors(curvature.matrix)
    assert torch.equal(upper, upper.triu())
    product = upper.mT @ upper @ curvature.matrix
    assert float((product - torch.eye(7)).abs().max()) <= 1e-11  # 7 terms at a condition number below 1e3


@pytest.mark.parametrize(
    ("kind", "options"), [(ColumnSweep, {"width": 0}), (ADMM, {"penalty": 0.0}), (ADMM, {"most_iterations": 0})]
)
def test_impossible_options_are_refused(kind: type, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        kind(**options)
