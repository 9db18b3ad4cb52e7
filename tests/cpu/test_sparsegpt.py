"""SparseGPT against two independent implementations, and on the inputs that break factorisations."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from methods import PATTERNS, Case, every_case, inputs, problem_from, problem_of
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, SingularGramError
from sparsify_compiler.passes.prune import sparsegpt
from sparsify_compiler.passes.prune.algebra import InverseFactor
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.pattern import NM, Block, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem

Array = npt.NDArray[np.float64]

# The sweep is float32, the references float64: rounding of up to 70 updates of weights of size 1, grown by the
# largest update factor that these Grams give, stays below 1e-4.
TOLERANCE = 1e-4


def damped(problem: LayerProblem, damp: float = 0.01) -> Array:
    assert problem.gram is not None
    matrix = problem.gram.matrix.numpy()
    return matrix + damp * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def reference(problem: LayerProblem, block_columns: int) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Run Alg. 1 entry by entry in float64, from the inverse and its Cholesky factor as the paper writes them."""
    factor = np.linalg.cholesky(np.linalg.inv(damped(problem))).T
    weight = problem.weight.double().numpy().copy()
    out, in_ = weight.shape
    keep = np.ones((out, in_), dtype=bool)
    pattern, total = problem.pattern, round(out * in_ * problem.sparsity)
    starts = dict(pattern.groups(in_, problem.run)) if isinstance(pattern, NM) else {}
    for j in range(in_):
        if isinstance(pattern, NM):
            if j in starts:
                scores = weight[:, j : starts[j]] ** 2 / np.diag(factor)[j : starts[j]] ** 2
                for row in range(out):
                    keep[row, j + np.argsort(-scores[row], kind="stable")[pattern.keep :]] = False
        elif j % block_columns == 0:
            stop = min(j + block_columns, in_)
            scores = (weight[:, j:stop] ** 2 / np.diag(factor)[j:stop] ** 2).reshape(-1)
            count = total * stop // in_ - total * j // in_
            lost = np.argsort(-scores, kind="stable")[len(scores) - count :]
            keep[lost // (stop - j), j + lost % (stop - j)] = False
        for row in range(out):
            if not keep[row, j]:
                weight[row, j:] -= weight[row, j] / factor[j, j] * factor[j, j:]
                weight[row, j] = 0.0
    return weight, keep


def obs_sweep(problem: LayerProblem, keep: Tensor) -> Array:
    """Remove the entries off `keep` from left to right, each by the OBS update on the columns still free.

    Uses an explicit inverse of the Gram matrix on those columns and no Cholesky factor.
    """
    gram, weight = damped(problem), problem.weight.double().numpy().copy()
    for j in range(weight.shape[1]):
        inverse = np.linalg.inv(gram[j:, j:])
        for row in np.flatnonzero(~keep[:, j].numpy()):
            weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
            weight[row, j] = 0.0
    return weight


def assert_close(found: Tensor, expected: Array) -> None:
    difference = float(np.abs(found.double().numpy() - expected).max())
    assert difference <= TOLERANCE, f"weights differ by {difference:.1e}, allowed {TOLERANCE:.0e}"


@pytest.mark.parametrize("case", [case for case in PATTERNS if not isinstance(case.pattern, Block)], ids=str)
@pytest.mark.parametrize("block_columns", [1, 6, 128])
def test_it_equals_the_paper_written_out_entry_by_entry(case: Case, block_columns: int) -> None:
    problem = problem_of(case)
    solution = SparseGPT(block_columns=block_columns).prune(problem)
    weight, keep = reference(problem, block_columns)
    assert np.array_equal(solution.keep.numpy(), keep)
    assert_close(solution.weight, weight)


@every_case
def test_it_equals_repeated_surgery_with_explicit_inverses(case: Case) -> None:
    problem = problem_of(case)
    solution = SparseGPT(block_columns=4).prune(problem)
    assert_close(solution.weight, obs_sweep(problem, solution.keep))


def test_the_comparison_tells_a_wrong_weight() -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 4, 12))
    solution = SparseGPT().prune(problem)
    wrong = solution.weight.clone()
    wrong[2, -1] += 10 * TOLERANCE
    with pytest.raises(AssertionError, match="weights differ"):
        assert_close(wrong, obs_sweep(problem, solution.keep))


def test_the_first_tile_to_go_is_the_one_whose_removal_costs_least() -> None:
    for seed in range(6):
        problem = problem_of(Case(Block(2, 3), 1 / 12, 4, 18), seed)  # 12 tiles, one goes
        solution = SparseGPT().prune(problem)
        gram, weight = damped(problem), problem.weight.double().numpy()
        costs = {}
        for row in range(0, 4, 2):
            for column in range(0, 18, 3):
                # Free are the columns after the tile: the least squares of paying for w_T with them.
                tile, rest = slice(column, column + 3), slice(column + 3, 18)
                lost = weight[row : row + 2, tile]
                schur = gram[tile, tile]
                if column + 3 < 18:
                    schur = schur - gram[tile, rest] @ np.linalg.solve(gram[rest, rest], gram[rest, tile])
                costs[row, column] = float(np.einsum("ri,ij,rj->", lost, schur, lost))
        row, column = min(costs, key=lambda place: costs[place])
        expected = torch.ones(4, 18, dtype=torch.bool)
        expected[row : row + 2, column : column + 3] = False
        assert torch.equal(solution.keep, expected)


def test_inputs_that_never_fired_lose_their_weights_and_make_no_nan() -> None:
    x = inputs(100, 16)
    x[:, [0, 5, 15]] = 0.0
    for pattern in (Unstructured(), NM(2, 4), Block(2, 2)):
        problem = problem_from(x, torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), pattern, 0.5)
        solution = SparseGPT().prune(problem)
        assert torch.isfinite(solution.weight).all()
        assert not solution.weight[:, [0, 5, 15]].any()
        assert solution.stats["dead_inputs"] == 3


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.9])
def test_an_unstructured_budget_is_spent_on_inputs_that_never_fired_first(sparsity: float) -> None:
    x = inputs(100, 16)
    x[:, 2:6] = 0.0
    problem = problem_from(x, torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), Unstructured(), sparsity)
    keep = SparseGPT(block_columns=3).prune(problem).keep
    assert int((~keep).sum()) == round(96 * sparsity)
    assert int((~keep[:, 2:6]).sum()) == min(24, round(96 * sparsity))


def test_fewer_tokens_than_inputs_is_what_damping_is_for() -> None:
    problem = problem_from(inputs(5, 40), torch.randn(8, 40), NM(2, 4), 0.5)
    solution = SparseGPT().prune(problem)
    assert torch.isfinite(solution.weight).all()
    assert solution.notes == ()


def gram_with_eigenvalue(share: float, in_: int = 12) -> Gram:
    """Make a Gram matrix whose least eigenvalue is `share` of the mean diagonal."""
    rotation = torch.linalg.qr(torch.randn(in_, in_, generator=torch.Generator().manual_seed(0)).double())[0]
    eigenvalues = torch.linspace(0.5, 1.5, in_, dtype=torch.float64)
    eigenvalues[0] = 0.0
    eigenvalues[0] = share * float(eigenvalues.sum()) / (in_ - share)
    return Gram(rotation @ torch.diag(eigenvalues) @ rotation.T, 100)


def test_damping_rises_tenfold_and_every_step_is_told() -> None:
    solution = SparseGPT().prune(LayerProblem("fc1", torch.ones(4, 12), NM(2, 4), 0.5, gram=gram_with_eigenvalue(-0.5)))
    assert solution.stats["damp"] == pytest.approx(1.0)  # 0.01 and 0.1 are below 0.5, 1 is above
    assert solution.notes == (
        "the Gram matrix is indefinite at damp 0.01: raised to 0.1",
        "the Gram matrix is indefinite at damp 0.1: raised to 1",
    )


def test_past_the_largest_damping_the_error_names_layer_damping_and_a_way_out() -> None:
    problem = LayerProblem("fc1", torch.ones(4, 12), NM(2, 4), 0.5, gram=gram_with_eigenvalue(-2.0))
    with pytest.raises(SingularGramError, match=r"layer 'fc1': .*from 0\.01 to 1; give more .* or choose wanda"):
        SparseGPT().prune(problem)


def test_a_layer_that_no_input_reached_is_refused() -> None:
    problem = LayerProblem("fc1", torch.ones(4, 12), NM(2, 4), 0.5, gram=Gram(torch.zeros(12, 12).double(), 9))
    with pytest.raises(SingularGramError, match=r"layer 'fc1': .*all zero"):
        SparseGPT().prune(problem)


def test_sites_that_share_a_gram_matrix_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    original: Callable[[Tensor, float], InverseFactor] = sparsegpt.inverse_factor

    def counted(gram: Tensor, damp: float) -> InverseFactor:
        calls.append(damp)
        return original(gram, damp)

    monkeypatch.setattr(sparsegpt, "inverse_factor", counted)
    gram = problem_of(Case(NM(2, 4), 0.5, 4, 12)).gram
    for out in (4, 7):
        SparseGPT().prune(LayerProblem(f"out {out}", torch.ones(out, 12), NM(2, 4), 0.5, gram=gram))
    SparseGPT(damp=0.1).prune(LayerProblem("damped", torch.ones(4, 12), NM(2, 4), 0.5, gram=gram))
    assert calls == [0.01, 0.1]


@pytest.mark.parametrize("options", [{"damp": 0.0}, {"damp": -1.0}, {"damp": 2.0}, {"block_columns": 0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        SparseGPT(**options)  # type: ignore[arg-type]


def test_the_width_of_the_lazy_update_changes_rounding_only() -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 8, 64))
    narrow, wide = (SparseGPT(block_columns=width).prune(problem) for width in (8, 64))
    assert torch.equal(narrow.keep, wide.keep)
    assert_close(narrow.weight, wide.weight.double().numpy())


def test_a_gram_matrix_that_is_not_finite_is_refused() -> None:
    matrix = torch.full((4, 4), float("nan")).double()
    with pytest.raises(CalibrationError, match=r"layer 'fc1': .*NaN or infinite"):
        SparseGPT().prune(LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5, gram=Gram(matrix, 9)))
