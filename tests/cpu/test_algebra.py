"""Damped factors and the two solvers of masked least squares."""

import pytest
import torch
from methods import inputs
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, SingularGramError
from sparsify_compiler.passes.prune.algebra import (
    REFRESH,
    MaskedLeastSquares,
    chunk_rows,
    inverse_factor,
    require_finite,
    solve_masked_cg,
    solve_masked_exactly,
)


def gram_of(in_: int, seed: int = 0) -> Tensor:
    x = inputs(4 * in_, in_, seed)
    return x.T @ x / len(x)


def masked(rows: int, in_: int, density: float = 0.5, seed: int = 0) -> MaskedLeastSquares:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, in_, generator=generator) < density
    weight = torch.randn(rows, in_, generator=generator)
    gram = gram_of(in_, seed)
    return MaskedLeastSquares(gram, weight.double() @ gram, keep, weight * keep)


@pytest.mark.parametrize("damp", [0.01, 0.5])
@pytest.mark.parametrize("in_", [1, 7, 60])
def test_the_factor_is_upper_triangular_and_multiplies_to_the_damped_inverse(in_: int, damp: float) -> None:
    gram = gram_of(in_)
    factor = inverse_factor(gram, damp)
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    product = upper.T @ upper @ (gram + damp * gram.diagonal().mean() * torch.eye(in_).double())
    # float32 entries (6e-8) times the condition number that damping leaves (at most about 1e3), 60 terms.
    assert torch.allclose(product, torch.eye(in_).double(), atol=1e-4)
    assert factor.damp == damp
    assert factor.notes == ()


def test_the_gram_matrix_is_not_modified() -> None:
    gram = gram_of(9)
    before = gram.clone()
    inverse_factor(gram, 0.01)
    solve_masked_exactly(
        MaskedLeastSquares(gram, torch.ones(2, 9).double(), torch.ones(2, 9).bool(), torch.zeros(2, 9))
    )
    assert torch.equal(gram, before)


def test_inputs_that_never_fired_are_marked() -> None:
    x = inputs(50, 6)
    x[:, 4] = 0
    assert inverse_factor(x.T @ x, 0.01).dead.tolist() == [False] * 4 + [True, False]


def test_an_all_zero_gram_matrix_is_refused() -> None:
    with pytest.raises(SingularGramError, match="all zero: no calibration input reached this layer"):
        inverse_factor(torch.zeros(4, 4).double(), 0.01)


def test_entries_that_are_not_finite_are_refused() -> None:
    require_finite(gram_of(3))
    for value in (float("nan"), float("inf"), -float("inf")):
        gram = gram_of(3)
        gram[0, 2] = value
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            require_finite(gram)


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_both_solvers_agree_and_reach_a_zero_gradient(density: float) -> None:
    problem = masked(30, 90, density)
    by_steps, exact = solve_masked_cg(problem, 1e-10, 500), solve_masked_exactly(problem)
    size = exact.weight.abs().max()
    # A gradient of 1e-10 against condition numbers of about 1e3.
    assert (by_steps.weight - exact.weight).abs().max() <= 1e-6 * size
    for solution in (by_steps, exact):
        assert not solution.weight[~problem.keep].any()
        assert solution.relative_gradient.max() <= 1e-10


def test_the_relative_gradient_returned_is_the_one_of_the_weight_returned() -> None:
    problem = masked(5, 70)
    scale = problem.gram.diagonal().rsqrt()
    for most in (3, 15, 40):
        solution = solve_masked_cg(problem, 1e-8, most)
        gradient = (problem.moment - solution.weight @ problem.gram) * problem.keep * scale
        expected = gradient.norm(dim=1) / (problem.moment * problem.keep * scale).norm(dim=1)
        # Two float64 evaluations of the same expression: the moment's rounding, relative to the moment.
        assert (solution.relative_gradient - expected).abs().max() <= 1e-13
        assert solution.iterations <= most


def test_rows_in_chunks_equal_rows_alone() -> None:
    in_ = 5000  # so wide that a chunk holds 104 rows
    rows = chunk_rows(in_, torch.device("cpu")) + 3
    generator = torch.Generator().manual_seed(0)
    gram = torch.eye(in_, dtype=torch.float64)
    weight = torch.randn(rows, in_, generator=generator)
    keep = torch.rand(rows, in_, generator=generator) < 0.5
    solution = solve_masked_cg(MaskedLeastSquares(gram, weight.double(), keep, torch.zeros(rows, in_)))
    # With the identity the answer is the weight on the mask, found in one float32 step.
    assert torch.allclose(solution.weight, (weight * keep).double(), atol=1e-6)


def test_rows_without_a_kept_weight_stay_zero() -> None:
    problem = masked(4, 20, density=0.0)
    for solution in (solve_masked_cg(problem), solve_masked_exactly(problem)):
        assert not solution.weight.any()
        assert not solution.relative_gradient.any()


def test_rows_of_very_different_sizes_converge_alike() -> None:
    problem = masked(6, 64)
    sizes = torch.logspace(-15, 15, 6)[:, None]
    other = MaskedLeastSquares(problem.gram, problem.moment * sizes, problem.keep, problem.start * sizes)
    solution = solve_masked_cg(other)
    assert solution.relative_gradient.max() <= 1e-6


def test_a_singular_matrix_moves_only_along_directions_with_data() -> None:
    x = inputs(10, 40)
    gram = x.T @ x / 10
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(4, 40, dtype=torch.bool)
    # The start is optimal already, plus something no token can see: it may not move.
    solution = solve_masked_exactly(MaskedLeastSquares(gram, weight.double() @ gram, keep, weight))
    # Rounding of the gradient (1e-15 of terms up to 100), divided by the ridge 1e-8: without it the step is unbounded.
    assert (solution.weight - weight).abs().max() <= 1e-4


@pytest.mark.parametrize("tolerance", [1e-10, 1e-4])
def test_asking_less_often_for_the_end_solves_as_well(monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
    problem = masked(12, 60, 0.5)
    often = solve_masked_cg(problem, tolerance, 500)
    monkeypatch.setattr("sparsify_compiler.passes.prune.algebra.ask_every", lambda device: REFRESH)
    seldom = solve_masked_cg(problem, tolerance, 500)
    assert seldom.relative_gradient.max() <= tolerance
    assert often.iterations <= seldom.iterations
    assert seldom.iterations % REFRESH == 0
    # Both are within the tolerance of the optimum, in gradient; condition numbers are about 1e3.
    assert (seldom.weight - often.weight).abs().max() <= 1e4 * tolerance * often.weight.abs().max()
    assert solve_masked_cg(problem, tolerance, 7).iterations == 7
