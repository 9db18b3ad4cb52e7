"""Curvatures on the edge of positive definite: an error that says what to do, or damping raised in steps told."""

from collections.abc import Iterator

import pytest
import torch
from methods import problem_from
from torch import Tensor

from sparsify_compiler.errors import SingularGramError
from sparsify_compiler.passes.prune.curvature import DenseCurvature
from sparsify_compiler.passes.prune.curvature_products import ProductCurvature
from sparsify_compiler.passes.prune.iobs import IOBSStep, Stop, minimise
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.smooth import Differentiable, Quadratic
from sparsify_compiler.passes.prune.supports import ColumnSweep, DiagonalOBS, Selector, TopK, inverse_factors
from sparsify_compiler.pattern import Block


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearly_singular(count: int) -> Iterator[Tensor]:
    """Yield matrices (6, 6) of rank 3 plus rounding's share of their diagonal: about half are told to be definite."""
    for seed in range(count):
        x = randn(3, 6, seed=seed)
        matrix = x.T @ x
        yield matrix + 2e-16 * matrix.diagonal().mean() * torch.eye(6)


@pytest.mark.parametrize("selector", [DiagonalOBS(), ColumnSweep()], ids=str)
def test_a_matrix_that_factors_one_way_round_only_is_refused_with_what_to_do(selector: Selector) -> None:
    refused = 0
    for matrix in nearly_singular(100):
        curvature = DenseCurvature.of(matrix)
        if curvature.is_definite() and int(torch.linalg.cholesky_ex(matrix.flip(0, 1)).info):
            refused += 1
            with pytest.raises(SingularGramError, match="not positive definite up to rounding; raise damp"):
                selector.select(randn(1, 6), curvature, torch.tensor([3]))
    assert refused > 0


def test_an_inverse_factor_of_one_bad_matrix_in_a_stack_is_refused() -> None:
    stack = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 1.0]))]).double()
    with pytest.raises(SingularGramError, match="raise damp"):
        inverse_factors(stack)


def test_too_little_damping_for_obc_on_tiles_names_the_layer_and_what_to_do() -> None:
    said = []
    for seed in range(20):
        problem = problem_from(randn(4, 8, seed=seed), randn(2, 8, seed=seed + 1).float(), Block(1, 2), 0.5)
        try:
            OBC(damp=1e-16).prune(problem)
        except SingularGramError as error:
            said.append(str(error))
        OBC(damp=1e-10).prune(problem)  # as it says, more of it helps
    assert set(said) == {"layer 'layer': obc: the curvature is not positive definite up to rounding; raise damp"}


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_both_forms_raise_the_damping_of_an_indefinite_hessian_and_say_so_alike(damp: float) -> None:
    values = torch.tensor([1.0, 2.0, 0.5, -0.05]).double()
    turn = torch.linalg.qr(randn(4, 4)).Q
    matrix = turn @ torch.diag(values) @ turn.T

    def loss(weight: Tensor) -> Tensor:
        return ((weight @ matrix) * weight).sum(dim=1) / 2

    step, start, once = IOBSStep(TopK(), damp=damp), torch.ones(2, 4), Stop(1)
    dense = minimise(Quadratic(matrix, torch.zeros(2, 4).double()), step, start, 2, once)
    found = minimise(Differentiable(loss, "products"), step, start, 2, once)
    last = "the curvature is indefinite at damp 0.01: raised to 0.1"  # the mean of the diagonal is 0.86
    assert found.notes == dense.notes
    assert found.notes[-1] == last
    assert len(found.notes) == (8 if damp == 0 else 1)
    # The mean diagonal is estimated from 16 vectors; a ridge that is 20 % off moves the step by less than that.
    assert float((found.weight - dense.weight).norm()) <= 0.2 * float(dense.weight.norm())


def test_products_that_no_damping_makes_definite_are_refused_as_a_matrix_is() -> None:
    matrix = -torch.eye(3).double()
    for curvature in (DenseCurvature.of(matrix), ProductCurvature.of(lambda v: v @ matrix, torch.ones(2, 3).double())):
        with pytest.raises(SingularGramError, match=r"every damping from 0\.01 to 1; give more data"):
            curvature.damped(0.01)


def test_definite_products_are_damped_as_asked_without_a_note() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, 1.0]).double())
    products = ProductCurvature.of(lambda v: v @ matrix, torch.ones(2, 3).double())
    assert products.damped(0.0).notes == products.damped(0.5).notes == ()
    assert products.damped(0.0).ridge.tolist() == [0.0, 0.0]
    assert products.damped(0.5).ridge.tolist() == [1.0, 1.0]  # of a diagonal matrix sign vectors tell the trace exactly
