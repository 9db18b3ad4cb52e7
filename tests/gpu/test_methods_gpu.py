"""Every pruning method, selector and search on a GPU: what it promises, and the solution that a CPU finds."""

from dataclasses import replace

import pytest
import torch
from methods import Case, every_case, every_method, obeys, problem_of
from torch import Tensor

from sparsify_compiler.passes.prune.algebra import MaskedLeastSquares, solve_masked_cg, solve_masked_exactly
from sparsify_compiler.passes.prune.curvature import DenseCurvature
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparse_recovery import sparse_recovery
from sparsify_compiler.passes.prune.sparse_recovery_result import Scale
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.supports import Selector
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import LONG_ROW, MANY_ROWS, NM, Block, Scope, Unstructured, keep_largest
from sparsify_compiler.problem import Gram, LayerProblem, Needs, Pruner
from sparsify_compiler.statistics import Moments
from tests.cpu.test_statistics import LINEAR
from tests.cpu.test_supports import every_selector, problems

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]

CLOSE = 1e-3
"""How far a loss may be from the CPU's: sums in another order move a score by a few roundings, and near ties fall the
other way. On a CPU, weights moved by 1e-7 of their size change no mask of these problems."""


def moved(problem: LayerProblem) -> LayerProblem:
    """Return the problem with its tensors on the device."""
    assert problem.gram is not None
    assert problem.mean_square is not None
    return replace(
        problem,
        weight=problem.weight.to(DEVICE),
        mean_square=problem.mean_square.to(DEVICE),
        gram=Gram(problem.gram.matrix.to(DEVICE), problem.gram.tokens),
    )


def tensors(problem: LayerProblem) -> list[Tensor]:
    assert problem.gram is not None
    assert problem.mean_square is not None
    return [problem.weight, problem.mean_square, problem.gram.matrix]


def check(problem: LayerProblem, method: Pruner, refit: bool = False, swaps: int = 0) -> None:
    """Assert what a method promises of its solution on the device, and that it is as good as the CPU's."""
    here, (out, in_) = moved(problem), problem.weight.shape
    before = [tensor.clone() for tensor in tensors(here)]
    found = prune_with(here, method, refit, swaps)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors(here), strict=True))
    assert found.weight.device == found.keep.device == here.weight.device
    assert found.weight.dtype == torch.float32
    scope: Scope = "row" if isinstance(method, Wanda) and not isinstance(problem.pattern, Block) else "layer"
    removed = problem.pattern.removed(out, in_, problem.sparsity, problem.run, scope)
    assert int((~found.keep).sum()) == removed
    assert obeys(problem.pattern, found.keep.cpu(), problem.run) is None
    assert not found.weight[~found.keep].any()
    again = prune_with(moved(problem), method, refit, swaps)
    assert torch.equal(found.weight, again.weight)
    expected = prune_with(problem, method, refit, swaps)
    energy = problem.energy()
    assert energy is not None
    assert found.loss is not None
    # Where nothing is lost, both losses are rounding in units of the energy.
    assert found.loss == pytest.approx(expected.loss, rel=CLOSE, abs=1e-9 * energy)


@every_method
@every_case
@pytest.mark.parametrize("refit", [False, True], ids=["selected", "refitted"])
def test_a_method_keeps_its_promises_and_loses_what_it_loses_on_a_cpu(method: Pruner, case: Case, refit: bool) -> None:
    check(problem_of(case), method, refit)


@every_case
@pytest.mark.parametrize("method", [Magnitude(), SparseGPT()], ids=lambda method: method.name)
def test_swaps_find_what_they_find_on_a_cpu(method: Pruner, case: Case) -> None:
    check(problem_of(case), method, swaps=3)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(16, 32), Block(16, 16)], ids=str)
@every_method
def test_a_layer_of_many_column_blocks_loses_what_it_loses_on_a_cpu(
    method: Pruner, pattern: Unstructured | NM | Block
) -> None:
    check(problem_of(Case(pattern, 0.5, 96, 320)), method, refit=True)


def test_an_elimination_in_float32_loses_what_it_loses_on_a_cpu() -> None:
    check(problem_of(Case(Unstructured(), 0.5, 24, 320)), OBC())


@every_selector
@pytest.mark.parametrize("shared", [True, False])
def test_a_selector_finds_the_support_that_it_finds_on_a_cpu(selector: Selector, shared: bool) -> None:
    target, curvature = problems(8, 9, shared=shared)
    kept = torch.tensor([0, 1, 2, 4, 5, 8, 9, 4])
    expected = selector.select(target, curvature, kept)
    here = DenseCurvature.of(curvature.matrix.to(DEVICE))
    keep = selector.select(target.to(DEVICE), here, kept.to(DEVICE))
    assert keep.device.type == DEVICE
    assert torch.equal(keep.cpu(), expected)  # float64, and no two supports of these problems cost nearly the same


@pytest.mark.parametrize("scale", ["paper", "correct"])
def test_sparse_recovery_draws_the_curves_of_a_cpu(scale: Scale) -> None:
    here, there = (sparse_recovery(scale=scale, runs=4, steps=40, device=device) for device in (DEVICE, "cpu"))
    for curve, other in zip(here.curves, there.curves, strict=True):
        assert curve.method == other.method
        # The same problems in float64, drawn on the host; sums in another order, over 40 steps.
        assert curve.distance.mean == pytest.approx(other.distance.mean, rel=1e-6, abs=1e-9)
        assert curve.loss.mean == pytest.approx(other.loss.mean, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 2 * LONG_ROW), (3, LONG_ROW), (40, 700), (MANY_ROWS, 4)], ids=str)
def test_the_largest_are_kept_bit_for_bit_as_on_a_cpu_ties_included(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for scores in (torch.randn(shape, generator=generator), torch.randint(0, 5, shape, generator=generator).float()):
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            count = round(share * shape[1])
            assert torch.equal(keep_largest(scores.to(DEVICE), count).cpu(), keep_largest(scores, count))


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_both_solvers_reach_the_gradient_of_a_cpu(density: float) -> None:
    case = Case(Unstructured(), 0.5, 40, 300)
    problem = moved(problem_of(case))
    assert problem.gram is not None
    matrix = problem.gram.matrix
    keep = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE) < density
    asked = MaskedLeastSquares(matrix, problem.weight.double() @ matrix, keep, problem.weight * keep)
    by_steps, exact = solve_masked_cg(asked, 1e-8, 600), solve_masked_exactly(asked)
    assert by_steps.relative_gradient.max() <= 1e-8
    assert exact.relative_gradient.max() <= 1e-10
    # A gradient of 1e-8 against condition numbers of about 1e4.
    assert (by_steps.weight - exact.weight).abs().max() <= 1e-4 * exact.weight.abs().max()


@pytest.mark.parametrize("width", [1, 300, 1024, 1500])
def test_statistics_are_the_float64_product(width: int) -> None:
    x = torch.randn(2, 5000, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    moments = Moments(LINEAR, 1, width, Needs.GRAM)
    moments.add(x, "site", 0)
    rows = x.reshape(-1, width).double()
    exact = rows.t() @ rows / len(rows)
    found = moments.gram(0).matrix
    assert found.device.type == DEVICE
    assert torch.equal(found, found.t())
    # Slices are multiplied in float32 without TF32, which would be off by 1e-4.
    assert (found - exact).abs().max() < 1e-6 * exact.diagonal().max()
