"""What every method promises on every pattern."""

from dataclasses import dataclass, replace

import pytest
import torch
from methods import (
    METHODS,
    PATTERNS,
    Case,
    every_case,
    every_method,
    inputs,
    obeys,
    problem_from,
    problem_of,
    scaled,
    scope_of,
)
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, DataError, ModelError, PatternError
from sparsify_compiler.passes.prune import METHODS as METHODS_BY_NAME
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import NM, Block, Pattern, Scope, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs, Pruner

# Weight and inputs times these: squares of weights, or of what a weight adds to an output, leave float32's range.
EXTREMES = (
    (2.0**-100, 1.0),
    (2.0**65, 1.0),
    (1.0, 2.0**-70),
    (2.0**-70, 2.0**60),
    (2.0**-40, 2.0**-40),
    (2.0**60, 2.0**60),
)

both_ways = pytest.mark.parametrize("refit", [False, True], ids=["selected", "refitted"])


def snapshot(problem: LayerProblem) -> list[Tensor]:
    assert problem.gram is not None
    assert problem.mean_square is not None
    return [tensor.clone() for tensor in (problem.weight, problem.gram.matrix, problem.mean_square)]


def unchanged(problem: LayerProblem, before: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(snapshot(problem), before, strict=True))


@every_method
@every_case
@both_ways
def test_the_solution_obeys_the_pattern_and_leaves_the_problem_alone(method: Pruner, case: Case, refit: bool) -> None:
    problem = problem_of(case)
    before = snapshot(problem)
    solution = prune_with(problem, method, refit)
    removed = case.pattern.removed(case.out, case.in_, case.sparsity, case.run, scope_of(method, case.pattern))
    assert obeys(case.pattern, solution.keep, case.run) is None
    assert int((~solution.keep).sum()) == removed
    assert solution.weight.dtype == torch.float32
    assert solution.weight.shape == solution.keep.shape == (case.out, case.in_)
    assert not solution.weight[~solution.keep].any()
    assert unchanged(problem, before)


def test_unchanged_tells_a_weight_that_was_written_to() -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 2, 8))
    before = snapshot(problem)
    problem.weight[0, 0] += 1
    assert not unchanged(problem, before)


@every_method
@every_case
def test_the_same_problem_twice_gives_the_same_solution(method: Pruner, case: Case) -> None:
    first, second = (prune_with(problem_of(case), method) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.keep, second.keep)
    assert first.loss == second.loss


@every_method
@every_case
def test_scaling_the_weight_or_the_inputs_scales_the_solution(method: Pruner, case: Case) -> None:
    problem = problem_of(case)
    plain = method.prune(problem)
    for weight, input_ in ((8, 1), (1, 0.25), *EXTREMES):
        other = method.prune(scaled(problem, weight, input_))
        # Powers of two shift exponents only, so every step of the arithmetic is the same: exact equality.
        assert torch.equal(plain.keep, other.keep), f"another mask at a weight times {weight}, inputs times {input_}"
        assert torch.equal(plain.weight * weight, other.weight)


@pytest.mark.parametrize("case", [*PATTERNS, Case(Unstructured(), 0.5, 6, 140)], ids=str)  # the last by iterations
@pytest.mark.parametrize("swaps", [0, 1], ids=["refitted", "swapped"])
def test_so_do_the_re_solve_and_swaps(case: Case, swaps: int) -> None:
    problem = problem_of(case)
    plain = prune_with(problem, Magnitude(), swaps=swaps)
    for weight, input_ in EXTREMES:
        other = prune_with(scaled(problem, weight, input_), Magnitude(), swaps=swaps)
        assert torch.equal(plain.keep, other.keep), f"another mask at a weight times {weight}, inputs times {input_}"
        assert torch.equal(plain.weight * weight, other.weight)


@every_method
@every_case
def test_the_losses_are_those_of_the_data(method: Pruner, case: Case) -> None:
    x = inputs(4 * case.in_ + 8, case.in_)
    problem = problem_of(case)
    solution = prune_with(problem, method)
    direct = (x @ (problem.weight - solution.weight).double().T).square().sum() / len(x)
    energy = (x @ problem.weight.double().T).square().sum() / len(x)
    assert solution.loss is not None
    assert solution.loss_selected is not None
    # Both sum the same squares in float64; the loss cancels from terms of the size of the energy.
    assert abs(solution.loss - float(direct)) <= 1e-12 * float(energy)
    assert solution.loss <= solution.loss_selected + 1e-12 * float(energy)


@pytest.mark.parametrize(("pattern", "sparsity"), [(Unstructured(), 0.5), (NM(2, 4), 0.5), (Block(4, 4), 0.5)], ids=str)
def test_on_correlated_inputs_more_statistics_select_better(pattern: Pattern, sparsity: float) -> None:
    losses = dict.fromkeys(METHODS_BY_NAME, 0.0)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        problem = problem_from(inputs(256, 48, seed), torch.randn(32, 48, generator=generator), pattern, sparsity)
        for name, method in METHODS_BY_NAME.items():
            losses[name] += method().prune(problem).loss or 0.0
    assert losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]


@pytest.mark.parametrize("method", [method for method in METHODS if method != Magnitude()], ids=str)
@both_ways
def test_on_correlated_inputs_every_method_beats_magnitude_on_average(method: Pruner, refit: bool) -> None:
    def relative_error(pruner: Pruner, case: Case, seed: int) -> float:
        problem = problem_of(case, seed)
        loss, energy = prune_with(problem, pruner, refit).loss, problem.energy()
        assert loss is not None
        assert energy is not None
        return loss / energy

    each = [(case, seed) for case in PATTERNS for seed in range(2)]
    own, magnitude = (sum(relative_error(pruner, *one) for one in each) for pruner in (method, Magnitude()))
    assert own < magnitude


def test_recipe_words_are_the_methods_own_names() -> None:
    assert {name: cls().name for name, cls in METHODS_BY_NAME.items()} == {name: name for name in METHODS_BY_NAME}
    assert {method.name for method in METHODS} == set(METHODS_BY_NAME)


def test_each_method_says_what_it_needs() -> None:
    needs = {name: cls().needs for name, cls in METHODS_BY_NAME.items()}
    expected = {"magnitude": Needs.NOTHING, "wanda": Needs.NORMS, "woodtaylor": Needs.GRADIENT}
    assert needs == dict.fromkeys(needs, Needs.GRAM) | expected


def test_magnitude_keeps_the_largest_weights_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0], [3.0, -2.0]])
    solution = Magnitude().prune(LayerProblem("layer", weight, Unstructured(), 0.5))
    assert solution.weight.tolist() == [[0.0, -4.0], [3.0, 0.0]]
    assert solution.loss is None


def test_magnitude_compares_tiles_by_their_sum_of_squares() -> None:
    weight = torch.tensor([[3.0, 0.0, 2.0, 2.0]])  # 9 against 8: a sum of sizes would say 3 against 4
    solution = Magnitude().prune(LayerProblem("layer", weight, Block(1, 2), 0.5))
    assert solution.keep.tolist() == [[True, True, False, False]]


def test_magnitude_tells_tiny_weights_apart() -> None:
    weight = torch.tensor([[1e-30, 2e-30, 3e-30, 4e-30]])  # their squares underflow in float32
    for pattern in (Unstructured(), Block(1, 1)):
        solution = Magnitude().prune(LayerProblem("layer", weight, pattern, 0.5))
        assert solution.keep.tolist() == [[False, False, True, True]]


def test_wanda_weighs_by_the_inputs_and_compares_within_a_row() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    mean_square = torch.tensor([16.0, 1.0, 1.0]).double()  # scores 4, 2, 3 and 40, 20, 30
    problem = LayerProblem("layer", weight, Unstructured(), 1 / 3, mean_square=mean_square)
    assert Wanda().prune(problem).keep.tolist() == [[True, False, True], [True, False, True]]


def test_wanda_reads_the_diagonal_of_the_gram_matrix_where_norms_are_missing() -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 6, 10))
    assert torch.equal(Wanda().prune(problem).keep, Wanda().prune(replace(problem, mean_square=None)).keep)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
def test_a_method_without_its_statistics_names_the_layer_and_what_to_do(method: Pruner) -> None:
    with pytest.raises(
        DataError, match=r"layer 'fc1': .*needs .*found none; give calibration data or choose magnitude"
    ):
        method.prune(LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
def test_statistics_that_are_not_finite_are_refused(method: Pruner, value: float) -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[1, 1] = value
    problem = LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5, None, matrix.diagonal(), Gram(matrix, 9))
    with pytest.raises(CalibrationError, match=r"layer 'fc1'.*calibration data"):
        method.prune(problem)


@every_method
def test_a_weight_that_is_not_finite_is_refused(method: Pruner) -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 2, 8))
    problem.weight[1, 3] = float("nan")
    with pytest.raises(ModelError, match=r"layer 'layer': the weight \(2, 8\) has NaN"):
        prune_with(problem, method)


@every_method
def test_a_pattern_that_does_not_tile_the_weight_is_refused(method: Pruner) -> None:
    problem = replace(problem_of(Case(NM(2, 4), 0.5, 2, 8)), pattern=Block(3, 3))
    with pytest.raises(PatternError, match=r"layer 'layer': Block\(3, 3\) does not tile weight \(2, 8\)"):
        prune_with(problem, method)


@dataclass(frozen=True)
class Careless:
    """Keeps what it was told to, whatever was asked."""

    keep: Tensor
    name: str = "careless"
    needs: Needs = Needs.NOTHING

    def prune(self, layer: LayerProblem) -> LayerSolution:
        return LayerSolution(layer.weight * self.keep, self.keep)


@dataclass(frozen=True)
class CarelessByRow(Careless):
    scope: Scope = "row"


def test_prune_with_tells_a_method_that_breaks_its_promise() -> None:
    problem = LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5)
    with pytest.raises(AssertionError, match="removed 0 entries"):
        prune_with(problem, Careless(torch.ones(2, 4, dtype=torch.bool)))


def test_prune_with_tells_a_method_that_counts_in_another_scope_than_it_says() -> None:
    # Of 2 x 3 entries 0.5 is three by the layer, two by the row.
    problem = LayerProblem("fc1", torch.ones(2, 3), Unstructured(), 0.5)
    three = torch.tensor([[True, True, True], [False, False, False]])
    rows, uneven = torch.tensor([[True, False, False]] * 2), torch.tensor([[False, False, False], [True, True, False]])
    for keep in (three, rows):
        assert torch.equal(prune_with(problem, Careless(keep)).keep, keep)
    assert torch.equal(prune_with(problem, CarelessByRow(rows)).keep, rows)
    with pytest.raises(AssertionError, match=r"removed 3 entries, \[4\] were asked"):
        prune_with(problem, CarelessByRow(three))
    with pytest.raises(AssertionError, match="rows lost different counts"):
        prune_with(problem, Careless(uneven))
