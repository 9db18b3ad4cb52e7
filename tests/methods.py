"""The lists that every property test runs over: a new method or pattern is one line here.

KERNELS names every kernel: those of kernels.py as they run on a CPU, those of doubles.py by what stands in for a GPU.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from doubles import DOUBLES
from kernels import KERNELS as CPU_KERNELS
from torch import Tensor

from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.iobs_layer import IOBS, SOLVERS
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.pattern import NM, Block, Pattern, Scope, Unstructured
from sparsify_compiler.problem import Expansion, Gram, LayerProblem, LayerSolution, Needs, Pruner, Targets

KERNELS = tuple(kernel.name for kernel in (*CPU_KERNELS, *DOUBLES))


@dataclass(frozen=True)
class Case:
    """A pattern on a weight of one shape; `run` as in `LayerProblem`."""

    pattern: Pattern
    sparsity: float
    out: int
    in_: int
    run: int | None = None

    def __str__(self) -> str:
        run = f"/{self.run}" if self.run else ""
        return f"{self.pattern}@{self.sparsity:g}-{self.out}x{self.in_}{run}"


@dataclass(frozen=True)
class LaterRound:
    """`method` where it takes a step of its own: at a weight pruned before, with the model's loss around it.

    Both are made of the problem, so that they scale with it, and repeat. Rows and inputs differ in curvature; the
    Newton step of the gradient moves each weight by up to a tenth.
    """

    method: IOBS | WoodTaylor

    def __str__(self) -> str:
        return f"later {self.method}"

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def needs(self) -> Needs:
        return self.method.needs

    def prune(self, layer: LayerProblem) -> LayerSolution:
        assert layer.gram is not None
        generator = torch.Generator().manual_seed(3)
        (out, in_), matrix = layer.weight.shape, layer.gram.matrix
        share = 0.2 * torch.rand(out, in_, generator=generator, dtype=torch.float64) - 0.1
        rows, columns = (0.5 + torch.rand(count, generator=generator, dtype=torch.float64) for count in (out, in_))
        share, rows, columns = (drawn.to(matrix.device) for drawn in (share, rows, columns))
        expansion = Expansion(
            gradient=rows[:, None] * (share * layer.weight) @ matrix,
            output_curvature=rows,
            inputs=Gram(matrix * columns[:, None] * columns, layer.gram.tokens),
        )
        return self.method.prune(replace(layer, start=SparseGPT().prune(layer).weight, expansion=expansion))


METHODS: tuple[Pruner, ...] = (
    Magnitude(),
    Wanda(),
    SparseGPT(),
    SparseGPT(damp=0.1, block_columns=5),
    SparseGPT(block_columns=1),
    ALPS(),
    OBC(),
    IOBS(),
    WoodTaylor(),
    *(LaterRound(IOBS(solver=solver)) for solver in SOLVERS),
    LaterRound(WoodTaylor()),
    LaterRound(WoodTaylor(curvature="fisher", solver="alps")),
)

# Odd sides, one row, one column, tails, runs of a convolution with tails, every kind of tile.
PATTERNS: tuple[Case, ...] = (
    Case(Unstructured(), 0.5, 12, 20),
    Case(Unstructured(), 0.37, 7, 13),
    Case(Unstructured(), 0.9, 1, 31),
    Case(Unstructured(), 0.5, 9, 1),
    Case(Unstructured(), 0.0, 3, 5),
    Case(Unstructured(), 0.5, 6, 27, run=3),
    Case(NM(2, 4), 0.5, 12, 20),
    Case(NM(2, 4), 0.5, 5, 11),
    Case(NM(2, 4), 0.5, 6, 27, run=9),
    Case(NM(2, 4), 0.5, 4, 30, run=5),
    Case(NM(1, 3), 2 / 3, 5, 17),
    Case(NM(4, 8), 0.5, 3, 24),
    Case(NM(5, 7), 2 / 7, 4, 33, run=11),
    Case(NM(16, 32), 0.5, 2, 70),
    Case(Block(4, 4), 0.5, 12, 20),
    Case(Block(3, 5), 0.4, 9, 20),
    Case(Block(1, 7), 0.5, 5, 21),
    Case(Block(6, 1), 0.5, 6, 13),
    Case(Block(1, 1), 0.3, 5, 9),
    Case(Block(2, 3), 0.75, 6, 27, run=9),
)

every_method = pytest.mark.parametrize("method", METHODS, ids=str)
every_case = pytest.mark.parametrize("case", PATTERNS, ids=str)


def scope_of(method: Pruner, pattern: Pattern) -> Scope:
    """Say whether `method` removes as many weights from every row, or counts over the layer."""
    inner = method.method if isinstance(method, LaterRound) else method
    by_row = isinstance(inner, Wanda) or (isinstance(inner, IOBS) and inner.solver == "wanda")
    return "row" if by_row and not isinstance(pattern, Block) else "layer"


def inputs(tokens: int, in_: int, seed: int = 0) -> Tensor:
    """Make correlated inputs (tokens, in_), float64, whose sizes differ tenfold between columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_, in_, generator=generator, dtype=torch.float64) / max(in_, 1) ** 0.5
    mixing += torch.eye(in_, dtype=torch.float64)
    sizes = torch.logspace(-0.5, 0.5, in_, dtype=torch.float64)[torch.randperm(in_, generator=generator)]
    return torch.randn(tokens, in_, generator=generator, dtype=torch.float64) @ mixing * sizes


def problem_from(x: Tensor, weight: Tensor, pattern: Pattern, sparsity: float, run: int | None = None) -> LayerProblem:
    """Build the problem whose statistics are those of `x` (tokens, in) float64."""
    matrix = x.T @ x / len(x)
    return LayerProblem("layer", weight, pattern, sparsity, run, matrix.diagonal().clone(), Gram(matrix, len(x)))


def problem_of(case: Case, seed: int = 0) -> LayerProblem:
    """Build a problem for `case` with four times as many tokens as inputs."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = torch.randn(case.out, case.in_, generator=generator)
    return problem_from(inputs(4 * case.in_ + 8, case.in_, seed), weight, case.pattern, case.sparsity, case.run)


def with_targets(problem: LayerProblem, x: Tensor, x_dense: Tensor) -> LayerProblem:
    """Give `problem`, whose inputs are `x`, the dense targets of `x_dense` (both (tokens, in) float64)."""
    energy = float((x_dense @ problem.weight.double().T).square().sum() / len(x))
    return replace(problem, targets=Targets(x.T @ x_dense / len(x), energy))


def scaled(problem: LayerProblem, weight: float, input_: float) -> LayerProblem:
    """Return the problem with its weight times `weight` and its inputs times `input_`."""
    assert problem.gram is not None
    assert problem.mean_square is not None
    return replace(
        problem,
        weight=problem.weight * weight,
        mean_square=problem.mean_square * input_**2,
        gram=Gram(problem.gram.matrix * input_**2, problem.gram.tokens),
    )


def obeys(pattern: Pattern, keep: Tensor, run: int | None) -> str | None:
    """Say where `keep` (out, in) breaks the shape of `pattern`, entry by entry, or None. Counts are not looked at."""
    out, in_ = keep.shape
    match pattern:
        case NM():
            run = run or in_
            for row in range(out):
                for tap in range(0, in_, run):
                    for start in range(tap, tap + run, pattern.of):
                        group = keep[row, start : min(start + pattern.of, tap + run)]
                        if int(group.sum()) != min(pattern.keep, len(group)):
                            return f"row {row}, columns from {start}: {group.tolist()}"
        case Block():
            for row in range(0, out, pattern.rows):
                for column in range(0, in_, pattern.cols):
                    tile = keep[row : row + pattern.rows, column : column + pattern.cols]
                    if tile.any() != tile.all():
                        return f"tile at ({row}, {column}): {tile.tolist()}"
    return None
