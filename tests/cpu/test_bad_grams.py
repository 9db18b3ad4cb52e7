"""Statistics and weights that are bad or at the edge, for every method, with the re-solve and with swaps."""

import re
from dataclasses import replace

import pytest
import torch
from methods import METHODS, Case, inputs, obeys, problem_from, problem_of
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, PatternError, SingularGramError
from sparsify_compiler.graph import MatmulLayout
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs, Pruner
from sparsify_compiler.statistics import Moments

OUT, IN = 8, 16
TOKENS = 4 * IN + 8

every_method = pytest.mark.parametrize(
    "method", {method.name: method for method in reversed(METHODS)}.values(), ids=str
)
with_and_without_swaps = pytest.mark.parametrize("swaps", [0, 2], ids=["re-solved", "swapped"])
every_pattern = pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 4)], ids=str)


def problem_with(matrix: Tensor, pattern: Pattern | None = None, tokens: int = TOKENS) -> LayerProblem:
    base = problem_of(Case(pattern or Unstructured(), 0.5, OUT, IN))
    return replace(base, gram=Gram(matrix, tokens), mean_square=matrix.diagonal().clone())


def matrix_with(least: float) -> Tensor:
    """A matrix (IN, IN) whose eigenvalues run from 0.1 to 2, but for the first, which is `least`."""
    rotation = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(0)).double())[0]
    values = torch.linspace(0.1, 2.0, IN).double()
    values[0] = least
    return (rotation * values) @ rotation.T


def sound(problem: LayerProblem, method: Pruner, solution: LayerSolution) -> None:
    """Pattern, exact count, and weights of a size that data and dense weights can explain."""
    out, in_ = problem.weight.shape
    scope = "row" if isinstance(method, Wanda) and not isinstance(problem.pattern, Block) else "layer"
    removed = problem.pattern.removed(out, in_, problem.sparsity, problem.run, scope)  # type: ignore[arg-type]
    assert obeys(problem.pattern, solution.keep, problem.run) is None
    assert int((~solution.keep).sum()) == removed
    assert not solution.weight[~solution.keep].any()
    assert solution.weight.abs().max() <= 10 * problem.weight.abs().max()


@every_method
@every_pattern
@with_and_without_swaps
def test_a_singular_matrix_is_held_by_the_damping_that_every_method_has(
    method: Pruner, pattern: Pattern, swaps: int
) -> None:
    problem = problem_with(matrix_with(0.0), pattern)
    solution = prune_with(problem, method, swaps=swaps)
    sound(problem, method, solution)
    assert not [note for note in solution.notes if "indefinite" in note]


@every_method
@every_pattern
@with_and_without_swaps
def test_an_indefinite_matrix_raises_the_damping_tenfold_and_each_step_is_noted(
    method: Pruner, pattern: Pattern, swaps: int
) -> None:
    problem = problem_with(matrix_with(-0.05), pattern)  # the mean diagonal is about 1
    solution = prune_with(problem, method, swaps=swaps)
    sound(problem, method, solution)
    steps = [note for note in solution.notes if "the Gram matrix is indefinite at damp" in note]
    assert any(re.search(r"raised to 0\.1\d*$", note) for note in steps)  # enough for an eigenvalue of -0.05
    for note in steps:
        before, after = map(float, re.findall(r"(?:damp|to) ([\d.e-]+\d)", note))
        assert after == pytest.approx(10 * before)
        assert after < 1


@every_method
@with_and_without_swaps
def test_past_the_largest_damping_the_layer_is_named_and_no_other_method_stands_in(method: Pruner, swaps: int) -> None:
    matrix = torch.eye(IN).double() - 3 * torch.ones(IN, IN).double() / IN  # least eigenvalue -2, mean diagonal 0.8
    with pytest.raises(SingularGramError, match=r"layer 'layer': \w+: .*indefinite at every damping .*give more"):
        prune_with(problem_with(matrix), method, swaps=swaps)


@every_method
def test_a_negative_mean_of_squares_is_refused(method: Pruner) -> None:
    matrix = torch.eye(IN).double()
    matrix[3, 3] = -0.25
    with pytest.raises((SingularGramError, CalibrationError), match=r"layer 'layer': .*(-0\.25|less than 0)"):
        prune_with(problem_with(matrix), method)


@every_method
@every_pattern
@with_and_without_swaps
def test_weights_of_dead_inputs_cost_nothing_and_are_not_made_up_for(
    method: Pruner, pattern: Pattern, swaps: int
) -> None:
    x = inputs(TOKENS, IN)
    x[:, 4:8] = 0.0
    problem = problem_with(x.T @ x / TOKENS, pattern)
    solution = prune_with(problem, method, swaps=swaps)
    sound(problem, method, solution)
    kept = solution.keep[:, 4:8]
    if method.needs is not Needs.NOTHING and isinstance(pattern, Unstructured):
        assert not kept.any()  # half of the weights go, and a quarter of them are free
    dead = solution.weight[:, 4:8]
    assert bool(((dead == problem.weight[:, 4:8]) | (dead == 0)).all())


@every_method
@every_pattern
@with_and_without_swaps
def test_rows_of_zeros_stay_zero_and_give_their_share_first(method: Pruner, pattern: Pattern, swaps: int) -> None:
    problem = problem_of(Case(pattern, 0.5, OUT, IN))
    problem.weight[2:4] = 0.0
    solution = prune_with(problem, method, swaps=swaps)
    sound(problem, method, solution)
    assert not solution.weight[2:4].any()
    free = isinstance(pattern, Unstructured | Block) and not (
        isinstance(method, Wanda) and isinstance(pattern, Unstructured)
    )
    assert solution.keep[2:4].any() != free
    everything = prune_with(replace(problem, weight=torch.zeros(OUT, IN)), method, swaps=swaps)
    assert not everything.weight.any()
    assert everything.loss == 0.0


@every_method
@every_pattern
@with_and_without_swaps
def test_of_equal_weights_on_equal_inputs_those_of_lowest_index_stay(
    method: Pruner, pattern: Pattern, swaps: int
) -> None:
    problem = replace(problem_with(torch.eye(IN).double(), pattern), weight=torch.ones(OUT, IN))
    keep = prune_with(problem, method, swaps=swaps).keep
    if isinstance(pattern, NM):
        assert keep.tolist() == [[True, True, False, False] * (IN // 4)] * OUT
    elif isinstance(pattern, Block) or not isinstance(method, Wanda):
        assert keep[: OUT // 2].all()
    else:
        assert keep[:, : IN // 2].all()


@every_method
@with_and_without_swaps
def test_sparsity_zero_leaves_the_weight_as_it_is(method: Pruner, swaps: int) -> None:
    for pattern in (Unstructured(), Block(2, 4)):
        problem = replace(problem_of(Case(pattern, 0.5, OUT, IN)), sparsity=0.0)
        solution = prune_with(problem, method, swaps=swaps)
        assert solution.keep.all()
        assert torch.equal(solution.weight, problem.weight)


@every_method
@with_and_without_swaps
def test_a_share_may_leave_rows_and_the_whole_weight_empty(method: Pruner, swaps: int) -> None:
    for sparsity, pattern in ((0.97, Unstructured()), (0.95, Block(2, 4)), (0.999, Unstructured())):
        problem = replace(problem_of(Case(pattern, 0.5, OUT, IN)), sparsity=sparsity)
        solution = prune_with(problem, method, swaps=swaps)
        sound(problem, method, solution)
        assert not solution.keep.any(dim=1).all()
        assert solution.loss is not None
        energy = problem.energy()
        assert energy is not None
        assert solution.loss <= energy * (1 + 1e-12)  # the loss of the empty weight


@every_method
@every_pattern
@with_and_without_swaps
def test_fewer_tokens_than_inputs_are_noted_and_no_weight_runs_away(
    method: Pruner, pattern: Pattern, swaps: int
) -> None:
    x = inputs(5, IN)
    problem = problem_with(x.T @ x / 5, pattern, tokens=5)
    solution = prune_with(problem, method, swaps=swaps)
    sound(problem, method, solution)
    assert any(f"5 tokens for {IN} inputs leave the weights undetermined" in note for note in solution.notes)
    selected, energy = method.prune(problem), problem.energy()
    assert solution.loss is not None
    assert selected.loss is not None
    assert energy is not None
    assert solution.loss <= selected.loss + 1e-12 * energy  # float64 sums of the size of the energy


@every_method
@with_and_without_swaps
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [(3, 3), (3, 4)], ids=["diagonal", "beside"])
def test_statistics_that_are_not_finite_name_the_layer(
    method: Pruner, swaps: int, value: float, at: tuple[int, int]
) -> None:
    matrix = torch.eye(IN).double()
    matrix[at] = value
    with pytest.raises(CalibrationError, match=r"layer 'layer': .*check the calibration data"):
        prune_with(problem_with(matrix), method, swaps=swaps)


@pytest.mark.parametrize("needs", [Needs.NORMS, Needs.GRAM], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_or_overflow_name_the_site_and_the_batch(needs: Needs, value: float) -> None:
    moments = Moments(MatmulLayout(transposed=False), 1, 4, needs)
    x = torch.ones(3, 4)
    moments.add(x, "fc1", 6)
    x[1, 2] = value
    with pytest.raises(CalibrationError, match=r"site 'fc1': .*calibration batch 7"):
        moments.add(x, "fc1", 7)


@every_method
@with_and_without_swaps
def test_fewer_inputs_than_a_group_has_are_refused(method: Pruner, swaps: int) -> None:
    problem = problem_from(inputs(20, 3), torch.ones(4, 3), NM(2, 4), 0.5)
    with pytest.raises(PatternError, match="layer 'layer': 2:4 needs at least 4 inputs to choose from; found 3"):
        prune_with(problem, method, swaps=swaps)
