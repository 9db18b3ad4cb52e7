"""What removing a tile costs, w_Bᵀ ([G⁻¹]_BB)⁻¹ w_B over the tile's rows, against solving anew without it."""

from dataclasses import replace

import pytest
import torch
from methods import inputs, problem_from
from torch import Tensor

from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.pattern import Block
from sparsify_compiler.problem import LayerProblem

every_block = pytest.mark.parametrize(
    "pattern", [Block(8, 8), Block(16, 1), Block(1, 16), Block(32, 32), Block(64, 64), Block(128, 128)], ids=str
)


def problem_for(pattern: Block) -> LayerProblem:
    """Two rows of tiles, four tiles wide."""
    out, in_ = 2 * pattern.rows, 4 * pattern.cols
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0))
    return problem_from(inputs(3 * in_ + 8, in_), weight, pattern, 0.5)


def loss_without(problem: LayerProblem, damp: float, lane: int, tiles: list[int]) -> float:
    """The damped loss of a lane's rows, solved anew by a general solver with `tiles` at zero."""
    assert problem.gram is not None
    assert isinstance(problem.pattern, Block)
    rows, cols = problem.pattern.rows, problem.pattern.cols
    matrix = (
        problem.gram.matrix
        + damp * problem.gram.matrix.diagonal().mean() * torch.eye(len(problem.gram.matrix)).double()
    )
    dense = problem.weight[lane * rows : (lane + 1) * rows].double()
    kept = torch.ones(len(matrix), dtype=torch.bool)
    for tile in tiles:
        kept[tile * cols : (tile + 1) * cols] = False
    new = torch.zeros_like(dense)
    new[:, kept] = torch.linalg.solve(matrix[kept][:, kept], (dense @ matrix)[:, kept].T).T
    return float((((dense - new) @ matrix) * (dense - new)).sum())


@every_block
def test_the_cost_of_each_removal_is_that_of_solving_anew(pattern: Block) -> None:
    problem, method = problem_for(pattern), OBC()
    trace = method.trace(problem)
    for lane in range(2):
        gone: list[int] = []
        before = 0.0
        for tile, increment in zip(trace.order[lane].tolist(), trace.increments[lane].tolist(), strict=True):
            left = [other for other in range(4) if other not in gone]
            costs = {other: loss_without(problem, method.damp, lane, [*gone, other]) - before for other in left}
            # Sums of squares in float64; single columns of more than 256 inputs would be float32, there are none here.
            assert increment == pytest.approx(costs[tile], rel=1e-8)
            assert costs[tile] == pytest.approx(min(costs.values()), rel=1e-8)
            gone.append(tile)
            before += costs[tile]


@every_block
def test_the_saliency_is_its_formula(pattern: Block) -> None:
    problem, method = problem_for(pattern), OBC()
    assert problem.gram is not None
    rows, cols = pattern.rows, pattern.cols
    matrix = problem.gram.matrix
    inverse = torch.linalg.inv(matrix + method.damp * matrix.diagonal().mean() * torch.eye(len(matrix)).double())

    def saliency(lane: int, tile: int) -> Tensor:
        at = slice(tile * cols, (tile + 1) * cols)
        w = problem.weight[lane * rows : (lane + 1) * rows, at].double()
        return (w * torch.linalg.solve(inverse[at, at], w.T).T).sum()

    trace = method.trace(problem)
    for lane in range(2):
        costs = torch.stack([saliency(lane, tile) for tile in range(4)])
        assert int(trace.order[lane, 0]) == int(costs.argmin())
        assert float(trace.increments[lane, 0]) == pytest.approx(float(costs.min()), rel=1e-8)


def test_a_tile_goes_by_what_others_can_make_up_for_not_by_its_size() -> None:
    x = inputs(400, 8)
    x[:, 4:] = x[:, :4] + 0.01 * x[:, 4:]  # the second tile says nearly what the first does
    weight = torch.cat((torch.ones(2, 4), torch.full((2, 4), 3.0)), dim=1)
    other = torch.cat((weight, torch.full((2, 4), 0.5)), dim=1)
    wide = torch.cat((x, inputs(400, 4, seed=1)), dim=1)
    problem = problem_from(wide, other, Block(2, 4), 1 / 3)
    assert OBC(damp=1e-6).prune(problem).keep[0].tolist() == [False] * 4 + [True] * 8
    assert not OBC(damp=1e-6).prune(replace(problem, sparsity=2 / 3)).keep[0, 8:].any()
