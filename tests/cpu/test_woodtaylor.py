"""WoodTaylor on one layer: WoodFisher and WoodTaylor as published, and the I-OBS step, on the damped curvature."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from methods import Case, every_case, inputs, obeys, problem_of
from torch import Tensor

from sparsify_compiler.errors import DataError, SingularGramError
from sparsify_compiler.passes.prune.curvature import DenseCurvature
from sparsify_compiler.passes.prune.iobs import IOBSStep, Stop, minimise
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.support_search import GreedyOBS
from sparsify_compiler.passes.prune.supports import Exhaustive
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.problem import Expansion, Gram, LayerProblem

DAMP = 0.01


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expanded(problem: LayerProblem, seed: int = 0, slope: float = 0.1) -> LayerProblem:
    """Give the problem a gradient, output curvatures of very different sizes, and inputs weighed otherwise."""
    out, in_ = problem.weight.shape
    x = inputs(3 * in_ + 5, in_, seed + 50)
    curvature = randn(out, seed=seed + 1).exp()
    expansion = Expansion(slope * randn(out, in_, seed=seed + 2), curvature, Gram(x.T @ x / len(x), len(x)))
    return replace(problem, expansion=expansion)


def hessian(problem: LayerProblem, fisher: bool) -> tuple[Tensor, Tensor]:
    """Write the two damped factors of the curvature out: one number a row (out,), and a matrix (in, in)."""
    assert problem.expansion is not None
    assert problem.gram is not None
    assert problem.expansion.inputs is not None
    matrix = problem.expansion.inputs.matrix if fisher else problem.gram.matrix
    rows = problem.expansion.output_curvature
    damped = matrix + DAMP * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    return rows + DAMP * rows.mean(), damped


@pytest.mark.parametrize("curvature", ["gram", "fisher"])
@pytest.mark.parametrize("slope", [0.0, 0.3], ids=["WoodFisher", "WoodTaylor"])
def test_to_remove_one_weight_it_takes_the_published_choice_and_update(curvature: str, slope: float) -> None:
    for seed in range(5):
        problem = expanded(problem_of(Case(Unstructured(), 1 / 24 + 1e-9, 4, 6), seed), seed, slope)
        solution = WoodTaylor(step=1.0, damp=DAMP, curvature=curvature, solver="obc").prune(problem)  # type: ignore[arg-type]
        rows, matrix = hessian(problem, curvature == "fisher")
        inverse = torch.linalg.inv(matrix)
        assert problem.expansion is not None
        theta = problem.weight.double() - problem.expansion.gradient @ inverse / rows[:, None]
        scores = rows[:, None] * theta.square() / inverse.diagonal()  # θ_i² / [H⁻¹]_ii
        row, column = divmod(int(scores.argmin()), 6)
        expected = theta.clone()
        expected[row] -= theta[row, column] * inverse[:, column] / inverse[column, column]
        assert (~solution.keep).nonzero().tolist() == [[row, column]]
        # the solver works on float32 weights of the size of 1, scaled by a row's share and back
        assert torch.allclose(solution.weight.double(), expected, atol=2e-6)


@dataclass(frozen=True)
class Model:
    """A loss known by its gradient and curvature at one point."""

    gradient: Tensor
    matrix: Tensor

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.new_zeros(len(weight)), self.gradient

    def curvature(self, weight: Tensor) -> DenseCurvature:
        return DenseCurvature.of(self.matrix)


@pytest.mark.parametrize("kept", [2, 5, 8])
@pytest.mark.parametrize("step", [1.0, 0.3])
def test_a_row_is_the_i_obs_step_and_near_the_best_of_all_supports(kept: int, step: float) -> None:
    excess = []
    for seed in range(10):
        problem = expanded(problem_of(Case(Unstructured(), 1 - kept / 9 - 1e-9, 1, 9), seed), seed)
        start = SparseGPT().prune(problem).weight if seed % 2 else None
        problem = replace(problem, start=start)
        solution = WoodTaylor(step=step, damp=DAMP, solver="obc").prune(problem)
        rows, matrix = hessian(problem, fisher=False)
        assert problem.expansion is not None
        model = Model(problem.expansion.gradient, matrix * rows)
        at = (problem.weight if start is None else start).double()
        once = Stop(most_steps=1)
        greedy = minimise(model, IOBSStep(GreedyOBS(), step=step), at, kept, once)
        best = minimise(model, IOBSStep(Exhaustive(), step=step), at, kept, once)
        assert torch.equal(solution.keep, greedy.keep)
        assert torch.allclose(solution.weight.double(), greedy.weight, atol=5e-6)
        target = at - step * torch.linalg.solve(matrix * rows, problem.expansion.gradient.T).T
        costs = [float(((w - target) @ matrix * (w - target)).sum()) for w in (solution.weight, best.weight)]
        assert costs[0] >= costs[1] * (1 - 1e-5)
        excess.append(costs[0] / costs[1])
    assert sum(excess) / len(excess) < 1.25


def test_of_a_gradient_that_is_noise_of_few_terms_almost_no_step_is_taken() -> None:
    problem = expanded(problem_of(Case(Unstructured(), 0.5, 24, 40)))
    assert problem.expansion is not None
    assert problem.gram is not None
    values, vectors = torch.linalg.eigh(problem.gram.matrix)
    rows = problem.expansion.output_curvature.sqrt()[:, None]
    noise = rows * (randn(24, 40, seed=9) * values.clamp_min(0).sqrt()) @ vectors.T / 10  # of covariance H / 100
    for gradient, terms, low, high in ((noise, 100, 0.0, 0.1), (noise, 10000, 0.97, 1.0), (noise, math.inf, 1.0, 1.0)):
        expansion = replace(problem.expansion, gradient=gradient, terms=terms)
        trusted = WoodTaylor(damp=DAMP).prune(replace(problem, expansion=expansion)).stats["trusted"]
        assert low <= trusted <= high  # 960 squared normal numbers: their mean is within 0.1 of 1 but in 1 of 40


def test_the_step_is_shared_among_the_sites_that_step_at_once() -> None:
    problem = expanded(problem_of(Case(Unstructured(), 0.0, 6, 8)))
    assert problem.expansion is not None
    found = []
    for step, sites in ((0.5, 1), (1.0, 2)):
        shared = replace(problem, expansion=replace(problem.expansion, sites=sites))
        found.append(WoodTaylor(step=step).prune(shared).weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], problem.weight)


def test_rows_with_more_output_curvature_keep_more_weights() -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 8, 16))
    curvature = torch.tensor([100.0] * 4 + [0.01] * 4, dtype=torch.float64)
    expansion = Expansion(torch.zeros(8, 16, dtype=torch.float64), curvature)
    keep = WoodTaylor().prune(replace(problem, expansion=expansion)).keep
    assert int(keep[:4].sum()) > 2 * int(keep[4:].sum())
    assert int(keep.sum()) == 64


def test_one_curvature_for_all_rows_and_no_gradient_is_the_solver() -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 12, 32))
    even = Expansion(torch.zeros(12, 32, dtype=torch.float64), torch.full((12,), 7.0, dtype=torch.float64))
    found = WoodTaylor(step=1.0).prune(replace(problem, expansion=even))
    expected = SparseGPT().prune(problem)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.keep, expected.keep)


@pytest.mark.parametrize("curvature", ["gram", "fisher"])
def test_the_unit_of_the_loss_does_not_matter(curvature: str) -> None:
    problem = expanded(problem_of(Case(Unstructured(), 0.5, 8, 12)))
    assert problem.expansion is not None
    method = WoodTaylor(curvature=curvature)  # type: ignore[arg-type]
    scaled = replace(
        problem.expansion,
        gradient=problem.expansion.gradient * 4.0,
        output_curvature=problem.expansion.output_curvature * 4.0,
    )
    one, other = method.prune(problem), method.prune(replace(problem, expansion=scaled))
    assert torch.equal(one.weight, other.weight)  # a power of two shifts exponents only


@every_case
@pytest.mark.parametrize("curvature", ["gram", "fisher"])
def test_with_a_gradient_it_obeys_every_pattern_and_leaves_the_problem_alone(case: Case, curvature: str) -> None:
    problem = expanded(problem_of(case))
    assert problem.expansion is not None
    held = [problem.weight, problem.expansion.gradient, problem.expansion.output_curvature]
    before = [tensor.clone() for tensor in held]
    solution = prune_with(problem, WoodTaylor(curvature=curvature), refit=False)  # type: ignore[arg-type]
    assert obeys(case.pattern, solution.keep, case.run) is None
    assert solution.loss == problem.loss(solution.weight)
    assert all(torch.equal(tensor, old) for tensor, old in zip(held, before, strict=True))


def test_without_a_gradient_the_first_round_is_the_solvers_and_says_so_and_later_ones_are_refused() -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 8, 12))
    solution = WoodTaylor(solver="obc").prune(problem)
    assert torch.equal(solution.weight, OBC().prune(problem).weight)
    assert any("no gradient of the model's loss was given: pruned by obc alone" in note for note in solution.notes)
    with pytest.raises(DataError, match=r"layer 'layer': woodtaylor needs the gradient .* or choose iobs"):
        WoodTaylor().prune(replace(problem, start=solution.weight))
    with pytest.raises(DataError, match="layer 'fc1': woodtaylor needs a Gram matrix"):
        WoodTaylor().prune(LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5))


def test_a_layer_that_no_gradient_reaches_is_pruned_by_its_gram_matrix_and_told() -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 8, 12))
    nothing = Expansion(torch.zeros(8, 12, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    solution = WoodTaylor().prune(replace(problem, expansion=nothing))
    assert torch.equal(solution.weight, SparseGPT().prune(problem).weight)
    assert "woodtaylor: no gradient of the model's loss reaches this layer" in solution.notes


def test_an_indefinite_curvature_is_damped_in_steps_that_are_told_and_past_the_limit_refused() -> None:
    def problem(share: float) -> LayerProblem:
        diagonal = torch.ones(12, dtype=torch.float64)
        diagonal[0] = share
        even = Expansion(torch.zeros(4, 12, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        return LayerProblem(
            "fc1", torch.ones(4, 12), NM(2, 4), 0.5, gram=Gram(torch.diag(diagonal), 99), expansion=even
        )

    notes = WoodTaylor(solver="magnitude").prune(problem(-0.05)).notes
    assert notes == ("the curvature is indefinite at damp 0.01: raised to 0.1",)
    with pytest.raises(SingularGramError, match="layer 'fc1': woodtaylor: the curvature is indefinite at every"):
        WoodTaylor(solver="magnitude").prune(problem(-9.0))


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": 2.0}, {"damp": 0.0}, {"solver": "x"}, {"curvature": "x"}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        WoodTaylor(**options)  # type: ignore[arg-type]
