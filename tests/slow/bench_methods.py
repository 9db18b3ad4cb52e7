"""How long a layer takes to prune and to re-solve: `make bench`, or pytest --benchmark-only on this file.

Sizes are those of SmolLM2-135M: gate / up (1536, 576), down (576, 1536), k / v (192, 576).
"""

from dataclasses import replace

import pytest
import torch
from methods import inputs, problem_from
from pytest_benchmark.fixture import BenchmarkFixture

from sparsify_compiler.passes.prune.refit import refit
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem

SHAPES = [(1536, 576), (576, 1536), (192, 576)]
PATTERNS: list[Pattern] = [Unstructured(), NM(2, 4), Block(16, 16)]

every_size = pytest.mark.parametrize(("out", "in_"), SHAPES)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def layer(out: int, in_: int, pattern: Pattern) -> LayerProblem:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0))
    return problem_from(inputs(2 * in_, in_), weight, pattern, 0.5)


def fresh(problem: LayerProblem) -> LayerProblem:
    """Forget the factor, so that it is paid for."""
    assert problem.gram is not None
    return replace(problem, gram=Gram(problem.gram.matrix, problem.gram.tokens))


@every_size
@every_pattern
def test_selection_with_its_factor(benchmark: BenchmarkFixture, out: int, in_: int, pattern: Pattern) -> None:
    problem = layer(out, in_, pattern)
    solution = benchmark.pedantic(
        lambda p: SparseGPT().prune(p), setup=lambda: ((fresh(problem),), {}), rounds=5, warmup_rounds=1
    )
    assert int((~solution.keep).sum()) == out * in_ // 2


@every_size
@every_pattern
def test_the_re_solve(benchmark: BenchmarkFixture, out: int, in_: int, pattern: Pattern) -> None:
    problem = layer(out, in_, pattern)
    selected = SparseGPT().prune(problem)
    solution = benchmark.pedantic(refit, (problem, selected), rounds=3, warmup_rounds=1)
    benchmark.extra_info["iterations"] = solution.stats["iterations"]
    benchmark.extra_info["exact_rows"] = solution.stats["exact_rows"]
    assert solution.loss < solution.loss_selected
