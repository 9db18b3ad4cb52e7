"""Pruning on a made-up GPU: no operation mixes devices, results stay where they are made, and the host seldom waits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from methods import METHODS, PATTERNS, Case, every_method, problem_of
from pretend_gpu import GPU, GPUTensor, pretend_gpu
from torch import Tensor

from sparsify_compiler.passes.prune.algebra import REFRESH, MaskedLeastSquares, solve_masked_cg
from sparsify_compiler.passes.prune.curvature import DenseCurvature
from sparsify_compiler.passes.prune.elimination import PANEL
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparse_recovery import sparse_recovery
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.pattern import LONG_ROW, NM, Block, Unstructured, keep_largest
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs, Pruner
from sparsify_compiler.statistics import GPU_PANEL, Moments
from tests.cpu.test_statistics import LINEAR
from tests.cpu.test_supports import every_selector, problems

CASES = tuple(case for case in PATTERNS if case.out > 4 and case.sparsity)[::2]
every_kind = pytest.mark.parametrize("case", CASES, ids=str)


def moved(problem: LayerProblem) -> LayerProblem:
    assert problem.gram is not None
    assert problem.mean_square is not None
    gram = Gram(problem.gram.matrix.to(GPU), problem.gram.tokens)
    return replace(problem, weight=problem.weight.to(GPU), mean_square=problem.mean_square.to(GPU), gram=gram)


def solved(problem: LayerProblem, solve: Callable[[LayerProblem], LayerSolution]) -> tuple[Tensor, Tensor, int]:
    """Solve on the made-up GPU; return weight and keep on the CPU, and how often the host waited."""
    with pretend_gpu() as gpu:
        here = moved(problem)
        waits = gpu.waits
        found = solve(here)
        waits = gpu.waits - waits
        assert isinstance(found.weight, GPUTensor)
        assert isinstance(found.keep, GPUTensor)
        return found.weight.cpu(), found.keep.cpu(), waits


def test_the_made_up_gpu_refuses_what_cuda_refuses() -> None:
    with pretend_gpu() as gpu:
        x = torch.arange(6.0).reshape(2, 3).to(GPU)
        assert x.is_cuda
        assert x.device == torch.zeros(2, device=x.device).device == GPU
        for mixed in (lambda: x + torch.ones(2, 3), lambda: torch.where(torch.ones(2, 3) > 0, x, x)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert torch.equal((x * 2 + torch.tensor(1.0))[torch.tensor([1])].cpu(), torch.tensor([[7.0, 9.0, 11.0]]))
        before = gpu.waits
        assert float(x.sum()) == 15
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert gpu.waits == before + 2
        x[1].mul_(0)
        assert torch.equal(x.cpu(), torch.tensor([[0.0, 1, 2], [0, 0, 0]]))


@every_method
@every_kind
def test_a_method_works_where_its_problem_lies_and_finds_what_it_finds_on_a_cpu(method: Pruner, case: Case) -> None:
    problem = problem_of(case)
    weight, keep, _ = solved(problem, lambda here: prune_with(here, method))
    expected = prune_with(problem, method)
    assert torch.equal(keep, expected.keep)
    # The re-solve looks for its end less often on a GPU: it comes at least as near to the optimum, to 1e-6.
    assert torch.allclose(weight, expected.weight, rtol=0, atol=1e-4 * float(expected.weight.abs().max()))


@every_kind
@pytest.mark.parametrize("method", [Magnitude(), SparseGPT()], ids=lambda method: method.name)
def test_swaps_work_where_the_problem_lies(method: Pruner, case: Case) -> None:
    problem = problem_of(case)
    _, keep, _ = solved(problem, lambda here: prune_with(here, method, swaps=3))
    assert torch.equal(keep, prune_with(problem, method, swaps=3).keep)


@every_selector
def test_a_selector_works_where_the_curvature_lies(selector: object) -> None:
    target, curvature = problems(8, 9)
    kept = torch.tensor([0, 1, 2, 4, 5, 8, 9, 4])
    expected = selector.select(target, curvature, kept)
    with pretend_gpu():
        keep = selector.select(target.to(GPU), DenseCurvature.of(curvature.matrix.to(GPU)), kept.to(GPU))
        assert torch.equal(keep.cpu(), expected)


def test_sparse_recovery_runs_on_the_device_it_is_given() -> None:
    with pretend_gpu():
        here = sparse_recovery(scale="correct", runs=2, steps=3, device=str(GPU))
    for curve, other in zip(here.curves, sparse_recovery(scale="correct", runs=2, steps=3).curves, strict=True):
        # Losses of 5 fall to rounding; another order of strides rounds otherwise.
        assert curve.loss.mean == pytest.approx(other.loss.mean, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 4)], ids=str)
@pytest.mark.parametrize("method", [SparseGPT(), SparseGPT(block_columns=8)], ids=str)
def test_sparsegpt_never_waits_inside_its_loop_over_columns(method: Pruner, pattern: Unstructured | NM | Block) -> None:
    few, many = (solved(problem_of(Case(pattern, 0.5, 8, in_)), method.prune)[2] for in_ in (32, 96))
    assert few == many <= 16


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 4)], ids=str)
def test_obc_waits_once_in_so_many_removed_columns(pattern: Unstructured | NM | Block) -> None:
    few, many = (solved(problem_of(Case(pattern, 0.5, 8, in_)), OBC().prune)[2] for in_ in (4 * PANEL, 8 * PANEL))
    assert many - few <= 2 * 4  # two for each of four more panels of columns, whatever the number of steps


@pytest.mark.parametrize("iterations", [REFRESH, 4 * REFRESH])
def test_conjugate_gradients_wait_once_in_so_many_iterations(iterations: int) -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 8, 60))
    assert problem.gram is not None
    keep, matrix = torch.rand(8, 60, generator=torch.Generator().manual_seed(0)) < 0.5, problem.gram.matrix
    with pretend_gpu() as gpu:
        asked = MaskedLeastSquares(
            matrix.to(GPU), problem.weight.double().to(GPU) @ matrix.to(GPU), keep.to(GPU), torch.zeros(8, 60).to(GPU)
        )
        before = gpu.waits
        assert solve_masked_cg(asked, 1e-30, iterations).iterations == iterations
        assert gpu.waits - before <= 2 * iterations // REFRESH


def test_the_largest_of_a_long_row_are_found_as_on_a_cpu_ties_included() -> None:
    scores = torch.randint(0, 9, (1, LONG_ROW), generator=torch.Generator().manual_seed(0)).float()
    with pretend_gpu():
        for count in (1, LONG_ROW // 3, LONG_ROW - 1):
            assert torch.equal(keep_largest(scores.to(GPU), count).cpu(), keep_largest(scores, count))


def test_statistics_are_summed_in_wide_panels_where_the_input_lies() -> None:
    width = GPU_PANEL + 5
    x = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    with pretend_gpu():
        moments = Moments(LINEAR, 1, width, Needs.GRAM)
        moments.add(x.to(GPU), "site", 0)
        found = moments.gram(0).matrix
        assert isinstance(found, GPUTensor)
        gram = found.cpu()
    assert torch.equal(gram, gram.t())
    exact = x.double().t() @ x.double() / 30
    assert (gram - exact).abs().max() < 1e-6 * exact.diagonal().max()


def test_the_lists_of_methods_and_patterns_are_those_of_the_other_tests() -> None:
    assert len(METHODS) > 8
    assert {type(case.pattern) for case in CASES} == {Unstructured, NM, Block}
