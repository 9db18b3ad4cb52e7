"""One round of practical I-OBS: SparseGPT itself at first, a step towards the dense outputs later."""

from dataclasses import replace

import pytest
import torch
from methods import Case, every_case, inputs, problem_of, with_targets
from torch import Tensor

from sparsify_compiler.errors import DataError, SingularGramError
from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem, Pruner

CASE = Case(NM(2, 4), 0.5, 12, 32)


def later(case: Case = CASE, seed: int = 0) -> LayerProblem:
    """Make the problem of a second round: pruned inputs that differ from the dense ones, and a weight to start from."""
    problem = problem_of(case, seed)
    x = inputs(4 * case.in_ + 8, case.in_, seed)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    start = SparseGPT().prune(problem).weight
    return replace(with_targets(problem, x, x + 0.3 * noise), start=start)


def newton_point(problem: LayerProblem, step: float, damp: float) -> Tensor:
    """Write the step out with an explicit inverse."""
    assert problem.gram is not None
    assert problem.start is not None
    gram = problem.gram.matrix
    cross = gram if problem.targets is None else problem.targets.cross
    damped = gram + damp * gram.diagonal().mean() * torch.eye(len(gram))
    start, dense = problem.start.double(), problem.weight.double()
    return start - step * (start @ gram - dense @ cross.T) @ torch.linalg.inv(damped)


@every_case
@pytest.mark.parametrize("method", [IOBS(), IOBS(step=0.3), IOBS(damp=0.1)], ids=str)
def test_the_first_round_is_sparsegpt_bit_for_bit(case: Case, method: IOBS) -> None:
    problem = problem_of(case)
    found, expected = method.prune(problem), SparseGPT(damp=method.damp).prune(problem)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.keep, expected.keep)
    assert (found.loss, found.stats, found.notes) == (expected.loss, expected.stats, expected.notes)


@pytest.mark.parametrize(
    ("word", "solver"),
    [("sparsegpt", SparseGPT()), ("alps", ALPS()), ("obc", OBC()), ("wanda", Wanda()), ("magnitude", Magnitude())],
)
@pytest.mark.parametrize("step", [1.0, 0.2])
@pytest.mark.parametrize("targets", [True, False])
def test_a_later_round_prunes_the_newton_point(word: str, solver: Pruner, step: float, targets: bool) -> None:
    problem = later() if targets else replace(later(), targets=None)
    before = [tensor.clone() for tensor in (problem.weight, problem.start) if tensor is not None]
    solution = IOBS(step=step, solver=word).prune(problem)
    target = newton_point(problem, step, 0.01)
    expected = solver.prune(replace(problem, weight=target.float(), targets=None, start=None))
    # the step in float64 by Cholesky or by an inverse may round to different float32 weights, one unit apart
    assert torch.equal(solution.keep, expected.keep)
    assert float((solution.weight - expected.weight).abs().max()) <= 1e-4
    assert solution.loss == problem.loss(solution.weight)
    assert problem.start is not None
    moved = (target - problem.start.double()).norm() / problem.start.double().norm()
    assert solution.stats["moved"] == pytest.approx(float(moved))
    assert torch.equal(problem.weight, before[0])
    assert torch.equal(problem.start, before[1])


def test_a_step_towards_the_dense_outputs_beats_the_first_round_on_new_inputs() -> None:
    gained = []
    for seed in range(4):
        problem = later(seed=seed)
        assert problem.start is not None
        before, after = problem.loss(problem.start), IOBS(step=1.0).prune(problem).loss
        assert before is not None
        assert after is not None
        gained.append(after < before)
    assert all(gained)


def test_on_the_same_data_a_full_step_is_a_fixed_point_up_to_damping() -> None:
    # The trap of the docstring: nothing differs from the first round, so neither does the result.
    problem = problem_of(Case(Unstructured(), 0.5, 16, 24))
    method = IOBS(step=1.0, damp=1e-8)
    first = method.prune(problem)
    again = method.prune(replace(problem, start=first.weight))
    assert torch.equal(again.keep, first.keep)
    assert float((again.weight - first.weight).abs().max()) <= 1e-4  # the ridge, and float32 in the sweep
    partial = IOBS(step=0.5, damp=1e-8).prune(replace(problem, start=first.weight))
    assert not torch.equal(partial.weight, first.weight)


def test_an_exact_re_solve_after_it_reads_the_targets() -> None:
    problem = later()
    solution = prune_with(problem, IOBS())
    assert solution.loss is not None
    assert solution.loss_selected is not None
    assert solution.loss < solution.loss_selected


def test_damping_that_rose_is_told_and_past_the_limit_refused() -> None:
    def problem(share: float) -> LayerProblem:
        diagonal = torch.ones(12, dtype=torch.float64)
        diagonal[0] = share
        weight = torch.ones(4, 12)
        return LayerProblem("fc1", weight, NM(2, 4), 0.5, gram=Gram(torch.diag(diagonal), 99), start=weight / 2)

    notes = IOBS(solver="magnitude").prune(problem(-0.05)).notes
    assert notes == ("the curvature is indefinite at damp 0.01: raised to 0.1",)
    with pytest.raises(SingularGramError, match="layer 'fc1': iobs: the curvature is indefinite at every damping"):
        IOBS(solver="magnitude").prune(problem(-9.0))


def test_without_a_gram_matrix_it_says_what_to_do() -> None:
    for solver in ("sparsegpt", "magnitude"):
        with pytest.raises(DataError, match="layer 'fc1': iobs needs a Gram matrix"):
            IOBS(solver=solver).prune(LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5))


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": 2.0}, {"damp": 0.0}, {"solver": "obs"}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        IOBS(**options)  # type: ignore[arg-type]
