"""The re-solve on the final mask against NumPy's least squares, row by row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from methods import Case, every_case, every_method, inputs, obeys, problem_from, problem_of, with_targets
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, SingularGramError
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.refit import refit
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Pruner

PATTERNS: list[tuple[Pattern, float]] = [(Unstructured(), 0.6), (NM(2, 4), 0.5), (Block(4, 4), 0.5)]


def closed_form(x: Tensor, x_dense: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Solve min ‖X_dense w − X_Q ŵ_Q‖ for every row from the data themselves, by SVD: no Gram matrix is formed."""
    solved = np.zeros(tuple(weight.shape))
    for row in range(len(weight)):
        kept = keep[row].numpy()
        target = (x_dense @ weight[row].double()).numpy()
        solved[row, kept] = np.linalg.lstsq(x.numpy()[:, kept], target, rcond=None)[0]
    return torch.from_numpy(solved)


def assert_weights_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    difference = float((found.double() - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"weights differ by {difference:.1e} of the largest, allowed {tolerance:.0e}"


@every_case
def test_few_inputs_are_solved_to_the_closed_form(case: Case) -> None:
    x = inputs(4 * case.in_ + 8, case.in_)
    solution = prune_with(problem_of(case), Magnitude())
    expected = closed_form(x, x, problem_of(case).weight, solution.keep)
    # The weight is rounded to float32 (6e-8); the factor is float64.
    assert_weights_close(solution.weight, expected, 2e-7)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=str)
@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=str)
def test_many_inputs_are_solved_to_the_closed_form(pattern: Pattern, sparsity: float, method: Pruner) -> None:
    x = inputs(600, 160)
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(7))
    solution = prune_with(problem_from(x, weight, pattern, sparsity), method)
    assert solution.stats["iterations"] > 0
    expected = closed_form(x, x, weight, solution.keep)
    # A relative gradient of 1e-6, multiplied by at most the condition number of these Grams (about 1e3).
    assert_weights_close(solution.weight, expected, 1e-4)
    best = float((x @ (expected - weight).T).square().sum() / len(x))
    assert solution.loss == pytest.approx(best, rel=1e-8)  # the loss is quadratic around the optimum


@pytest.mark.parametrize("in_", [40, 160])
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=str)
def test_dense_targets_are_met_from_the_pruned_inputs(in_: int, pattern: Pattern, sparsity: float) -> None:
    x_dense = inputs(600, in_)
    x = x_dense + 0.3 * torch.randn(600, in_, generator=torch.Generator().manual_seed(3)).double()
    weight = torch.randn(12, in_, generator=torch.Generator().manual_seed(7))
    problem = with_targets(problem_from(x, weight, pattern, sparsity), x, x_dense)
    solution = prune_with(problem, SparseGPT())
    expected = closed_form(x, x_dense, weight, solution.keep)
    assert_weights_close(solution.weight, expected, 1e-4)  # as above
    direct = float((x @ solution.weight.double().T - x_dense @ weight.double().T).square().sum() / 600)
    assert solution.loss == pytest.approx(direct, rel=1e-10)  # the quadratic form cancels a hundredfold at most
    untargeted = prune_with(replace(problem, targets=None), SparseGPT())
    assert solution.loss < (problem.loss(untargeted.weight) or 0.0)


def test_the_comparison_tells_a_wrong_weight() -> None:
    expected = torch.eye(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="weights differ"):
        assert_weights_close(expected + 1e-3, expected, 1e-4)


@every_method
@every_case
def test_no_row_gets_worse_and_the_mask_stays(method: Pruner, case: Case) -> None:
    problem = problem_of(case)
    selected = method.prune(problem)
    solution = refit(problem, selected)
    assert torch.equal(solution.keep, selected.keep)
    assert obeys(case.pattern, solution.keep, case.run) is None
    assert solution.loss_selected == selected.loss
    assert problem.gram is not None
    before, after = (row_losses(problem.gram.matrix, s.weight - problem.weight) for s in (selected, solution))
    # Each row's loss is a float64 quadratic of the size of the row's energy, whose rounding the comparison allows.
    energy = row_losses(problem.gram.matrix, problem.weight)
    assert (after <= before + 1e-13 * energy).all()


def row_losses(gram: Tensor, delta: Tensor) -> Tensor:
    return ((delta.double() @ gram) * delta.double()).sum(dim=1)


@pytest.mark.parametrize("in_", [48, 200])
@pytest.mark.parametrize("tokens", [1, 20, 45])
def test_fewer_tokens_than_kept_weights_keep_the_solution_near_the_selected_one(in_: int, tokens: int) -> None:
    weight = torch.randn(16, in_, generator=torch.Generator().manual_seed(2))
    problem = problem_from(inputs(tokens, in_), weight, NM(2, 4), 0.5)
    selected = SparseGPT().prune(problem)
    solution = refit(problem, selected)
    assert solution.loss is not None
    assert selected.loss is not None
    assert solution.loss <= selected.loss
    # Directions without data must not be walked along: the weight stays of the size it had.
    assert solution.weight.abs().max() <= 10 * weight.abs().max()


def test_kept_weights_of_inputs_that_never_fired_stay_as_selected() -> None:
    x = inputs(400, 140)
    x[:, [3, 70]] = 0.0
    for in_ in (100, 140):
        weight = torch.randn(6, in_, generator=torch.Generator().manual_seed(2))
        problem = problem_from(x[:, :in_].clone(), weight, NM(2, 4), 0.5)
        selected = Magnitude().prune(problem)
        solution = refit(problem, selected)
        assert torch.equal(solution.weight[:, [3, 70]], selected.weight[:, [3, 70]])


def test_ill_conditioned_rows_are_finished_exactly_and_the_notes_say_so() -> None:
    generator = torch.Generator().manual_seed(0)
    # Gram eigenvalues over six decades that no diagonal scaling mends: 150 iterations are not enough.
    rotation = torch.linalg.qr(torch.randn(300, 300, generator=generator).double())[0]
    x = (
        torch.randn(900, 300, generator=generator).double()
        @ (rotation * torch.logspace(0, -3, 300).double())
        @ rotation
    )
    weight = torch.randn(10, 300, generator=generator)
    problem = problem_from(x, weight, Unstructured(), 0.1)
    solution = prune_with(problem, Magnitude())
    assert solution.stats["exact_rows"] > 0
    assert any("ill-conditioned" in note for note in solution.notes)
    expected = closed_form(x, x, weight, solution.keep)
    best = float((x @ (expected - weight).T).square().sum() / len(x))
    # The least eigenvalue is 14 times the ridge of 1e-6 of the diagonal, which holds a row to what the iterations left.
    assert solution.loss == pytest.approx(best, rel=1e-3)


def test_curvature_below_the_rounding_of_the_gram_matrix_is_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    # Sixty directions carry data, the others nothing but the noise of float32 products, 3e-7 of the diagonal.
    rows = torch.randn(2000, 60, generator=generator).double() @ torch.randn(60, 300, generator=generator).double()
    clean = rows.t() @ rows / len(rows)
    noise = torch.randn(300, 300, generator=generator).double() * 3e-7 * clean.diagonal().mean()
    weight = torch.randn(10, 300, generator=generator)
    gram = Gram(clean + noise @ noise.t() / noise.abs().mean() / 300, len(rows))
    problem = LayerProblem("fc1", weight, NM(2, 4), 0.5, gram=gram)
    selected = prune_with(problem, SparseGPT(), refit=False)
    solution = prune_with(problem, SparseGPT())
    true = LayerProblem("fc1", weight, NM(2, 4), 0.5, gram=Gram(clean, len(rows)))
    before, after = true.loss(selected.weight), true.loss(solution.weight)
    assert before is not None
    assert after is not None
    assert after < before
    assert solution.weight.abs().max() < 10 * weight.abs().max()


def test_an_optimal_solution_stays_as_it_is() -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 8, 24))
    first = prune_with(problem, SparseGPT())
    second = refit(problem, first)
    assert first.loss is not None
    assert second.loss == pytest.approx(first.loss, rel=1e-12)  # only rounding is left to gain


def test_without_a_gram_matrix_the_solution_comes_back_with_a_note() -> None:
    problem = LayerProblem("fc1", torch.randn(4, 8), NM(2, 4), 0.5)
    selected = Magnitude().prune(problem)
    solution = refit(problem, selected)
    assert torch.equal(solution.weight, selected.weight)
    assert solution.loss is None
    assert solution.notes == ("not refitted: no Gram matrix was gathered for this method",)


def test_refit_fills_the_loss_of_a_selector_that_left_it_out() -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 8, 24))
    selected = Magnitude().prune(problem)
    solution = refit(problem, LayerSolution(selected.weight, selected.keep))
    assert solution.loss_selected == selected.loss


@pytest.mark.parametrize("in_", [12, 150])
def test_an_indefinite_gram_matrix_names_the_layer_and_a_way_out(in_: int) -> None:
    # On two thirds of the columns its least eigenvalue is 1 - 3 * 2 / 3 = -1.
    matrix = torch.eye(in_, dtype=torch.float64) - 3 * torch.ones(in_, in_, dtype=torch.float64) / in_
    problem = LayerProblem("fc1", torch.randn(4, in_), NM(2, 3), 1 / 3, gram=Gram(matrix, 2 * in_))
    with pytest.raises(SingularGramError, match=r"layer 'fc1': refit: .*give more calibration tokens, or set refit"):
        refit(problem, Magnitude().prune(problem))


def test_a_gram_matrix_that_is_not_finite_is_refused() -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 4, 8))
    assert problem.gram is not None
    problem.gram.matrix[2, 2] = float("inf")
    with pytest.raises(CalibrationError, match=r"layer 'layer': refit: .*NaN or infinite"):
        refit(problem, Magnitude().prune(problem))


def test_fewer_tokens_than_inputs_are_re_solved_quickly_and_said_to_be_too_few() -> None:
    rows = torch.randn(64, 700, generator=torch.Generator().manual_seed(0)).double()
    gram = Gram(rows.t() @ rows / 64, 64)
    weight = torch.randn(8, 700, generator=torch.Generator().manual_seed(1))
    problem = LayerProblem("fc1", weight, NM(2, 4), 0.5, gram=gram)
    found = prune_with(problem, SparseGPT())
    # 350 kept weights a row can reproduce 64 tokens exactly: what remains is rounding against the dense energy.
    assert found.loss is not None
    energy = problem.energy()
    assert energy is not None
    assert found.loss < 1e-6 * energy
    assert found.stats["exact_rows"] == 0
    assert any("64 tokens for 700 inputs" in note for note in found.notes)


@pytest.mark.parametrize(("inputs", "spread"), [(128, 0.03), (128, 0.01), (192, 0.01), (64, 0.001)])
def test_inputs_that_hardly_differ_are_not_fitted_to_the_rounding_of_their_gram(inputs: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.logspace(0, -3, inputs)
    x = torch.rand(1, inputs, generator=generator) + spread * torch.randn(32, inputs, generator=generator) * shape
    weight = torch.randn(64, inputs, generator=generator) / inputs**0.5
    gram = Gram((x.T @ x).double() / 32, 32)  # products in float32, as statistics are gathered
    problem = LayerProblem("near", weight, NM(2, 4), 0.5, gram=gram)
    selected = SparseGPT().prune(problem)
    solved = refit(problem, selected)
    wide, dense = x.double(), weight.double()

    def error(pruned: torch.Tensor) -> torch.Tensor:
        return (wide @ (pruned.double() - dense).T).square().sum(dim=0)

    assert (error(solved.weight) <= error(selected.weight) * (1 + 1e-6)).all()  # every row, on the inputs themselves
    # Fitted to rounding, weights reached 1e7 here.
    assert solved.weight.abs().max() <= 100 * weight.abs().max()
