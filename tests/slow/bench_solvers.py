"""How long pruning takes: a layer by method and pattern, the re-solve, swaps; a block of Llama-3-8B's sizes; SmolLM2.

    OMP_NUM_THREADS=1 python -m pytest tests/slow/bench_solvers.py --benchmark-only --benchmark-columns=min,median

Inputs are made up, with a spectrum that falls like that of a language model's; the cases called "smollm2" are the gate
and down projections of SmolLM2-135M's first layer on real text and are skipped where ../shared is missing. The Llama
block (random weights, 262,144 tokens, statistics included) needs a CUDA GPU. The whole of SmolLM2-135M is pruned on 128
windows of 2,048 tokens where there is a GPU, else on two of 256, from the traced graph on, without a re-solve.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sparsify_compiler.calibrate import Walk
from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.graph import MatmulLayout
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.layerwise import prune_layerwise
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.refit import refit
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.swaps import refine
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.plan import decide
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs, Pruner
from sparsify_compiler.recipe import Recipe, make_rule
from sparsify_compiler.sources.models import demo_model_path, load_model
from sparsify_compiler.statistics import Moments

pytestmark = pytest.mark.slow
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPES = [(1536, 576), (576, 1536)]
PATTERNS: list[Pattern] = [Unstructured(), NM(2, 4), NM(16, 32), Block(8, 8), Block(16, 1), Block(1, 16), Block(64, 64)]
SOLVERS = {
    name: method() for name, method in METHODS.items() if method().needs in (Needs.NOTHING, Needs.NORMS, Needs.GRAM)
}
STARTS = [SparseGPT(), ALPS()]

LLAMA = {"attention": 4096, "o": 4096, "mlp": 4096, "down": 14336}
"""Distinct inputs of a Llama-3-8B decoder layer and their widths."""
LLAMA_SITES = [
    (4096, "attention"), (1024, "attention"), (1024, "attention"), (4096, "o"),
    (14336, "mlp"), (14336, "mlp"), (4096, "down"),
]  # fmt: skip
"""Outputs and input of q, k, v, o, gate, up and down."""
TOKENS, CHUNK = 1 << 18, 1 << 13

every_shape = pytest.mark.parametrize(("out", "in_"), SHAPES, ids=lambda side: str(side))
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def layer(out: int, in_: int, pattern: Pattern) -> LayerProblem:
    """A layer whose inputs have eigenvalues that fall as k^-1.2, in a random basis, and sizes that differ fourfold."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(in_, in_, generator=generator).double())[0]
    sizes = torch.exp(torch.randn(in_, generator=generator).double().mul_(0.5))
    mixed = basis * torch.arange(1, in_ + 1).double().pow(-0.6) @ basis.T * sizes
    matrix = mixed.T @ mixed
    weight = torch.randn(out, in_, generator=generator) / in_**0.5
    return LayerProblem("made", weight, pattern, 0.5, None, matrix.diagonal().clone(), Gram(matrix, 1 << 14))


def fresh(problem: LayerProblem) -> LayerProblem:
    """Forget factors, so that they are paid for."""
    assert problem.gram is not None
    return replace(problem, gram=Gram(problem.gram.matrix, problem.gram.tokens))


def measure(
    benchmark: BenchmarkFixture, problem: LayerProblem, solve: Callable[[LayerProblem], LayerSolution]
) -> LayerSolution:
    solution: LayerSolution = benchmark.pedantic(
        solve, setup=lambda: ((fresh(problem),), {}), rounds=3, warmup_rounds=1
    )
    energy = problem.energy()
    assert energy
    assert solution.loss is not None
    benchmark.extra_info["relative_error"] = round(solution.loss / energy, 6)
    return solution


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    """SmolLM2-135M."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    try:
        module = load_model(str(demo_model_path())).module
    except ModelError as error:
        pytest.skip(str(error))
    assert module is not None
    return module


def windows(shared: Path, count: int, length: int) -> Tensor:
    return torch.from_numpy(np.load(shared / "smollm2_tokens.npz")["calib_c4"][:count, :length].astype(np.int64))


@pytest.fixture(scope="module")
def smollm2(shared: Path, module: torch.nn.Module) -> dict[str, LayerProblem]:
    """Gate and down of the first layer on four windows of 1,024 tokens."""
    problems, hooks = {}, []
    for name in ("gate_proj", "down_proj"):
        linear = module.get_submodule(f"model.layers.0.mlp.{name}")

        def keep(
            _: torch.nn.Module, inputs: tuple[Tensor, ...], name: str = name, linear: torch.nn.Module = linear
        ) -> None:
            weight = linear.get_parameter("weight").detach().float()
            moments = Moments(MatmulLayout(transposed=False), 1, weight.shape[1], Needs.GRAM)
            moments.add(inputs[0], name, 0)
            gram = moments.gram(0)
            problems[name] = LayerProblem(name, weight, Unstructured(), 0.5, None, gram.matrix.diagonal().clone(), gram)

        hooks.append(linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        module(windows(shared, 4, 1024))
    for hook in hooks:
        hook.remove()
    return problems


@every_shape
@every_pattern
@pytest.mark.parametrize("method", SOLVERS.values(), ids=SOLVERS)
def test_selection(benchmark: BenchmarkFixture, method: Pruner, out: int, in_: int, pattern: Pattern) -> None:
    measure(benchmark, layer(out, in_, pattern), method.prune)


@every_shape
@every_pattern
def test_the_re_solve(benchmark: BenchmarkFixture, out: int, in_: int, pattern: Pattern) -> None:
    problem = layer(out, in_, pattern)
    selected = SparseGPT().prune(problem)
    solution = measure(benchmark, problem, lambda fresh: refit(fresh, selected))
    benchmark.extra_info["iterations"] = solution.stats["iterations"]


@pytest.mark.parametrize("method", STARTS, ids=lambda method: method.name)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(8, 8)], ids=str)
def test_swaps(benchmark: BenchmarkFixture, method: Pruner, pattern: Pattern) -> None:
    problem = layer(1536, 576, pattern)
    selected = method.prune(problem)
    solution = measure(benchmark, problem, lambda fresh: refine(fresh, selected, rounds=3))
    benchmark.extra_info["loss"] = solution.stats["loss_after_swaps"] / solution.stats["loss_before_swaps"]


@pytest.mark.parametrize("site", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", SOLVERS.values(), ids=SOLVERS)
def test_selection_on_smollm2(
    benchmark: BenchmarkFixture, smollm2: dict[str, LayerProblem], method: Pruner, pattern: Pattern, site: str
) -> None:
    measure(benchmark, replace(smollm2[site], pattern=pattern), method.prune)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", [SparseGPT(), ALPS()], ids=lambda method: method.name)
def test_a_llama_block(benchmark: BenchmarkFixture, method: Pruner, pattern: Pattern) -> None:
    weights = [torch.randn(out, LLAMA[key], device="cuda") / LLAMA[key] ** 0.5 for out, key in LLAMA_SITES]

    def block() -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        moments = {key: Moments(MatmulLayout(transposed=False), 1, width, Needs.GRAM) for key, width in LLAMA.items()}
        for batch in range(TOKENS // CHUNK):
            for key, width in LLAMA.items():
                moments[key].add(torch.randn(1, CHUNK, width, device="cuda", dtype=torch.bfloat16), key, batch)
        torch.cuda.synchronize()
        benchmark.extra_info["statistics_s"] = round(time.perf_counter() - start, 2)
        for weight, (_, key) in zip(weights, LLAMA_SITES, strict=True):
            gram = moments[key].gram(0)
            problem = LayerProblem(key, weight, pattern, 0.5, None, gram.matrix.diagonal(), gram)
            prune_with(problem, method, refit=False)
        torch.cuda.synchronize()

    benchmark.pedantic(block, rounds=3, warmup_rounds=1)
    benchmark.extra_info["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("out", [1024, 4096])
def test_obc_on_an_attention_site_of_llama(benchmark: BenchmarkFixture, out: int) -> None:
    """k or v, and q or o. Down, 14,336 inputs wide, would take 7e15 operations: minutes."""
    x = torch.randn(1, 1 << 14, 4096, device="cuda")
    moments = Moments(MatmulLayout(transposed=False), 1, 4096, Needs.GRAM)
    moments.add(x, "attention", 0)
    weight, gram = torch.randn(out, 4096, device="cuda") / 64, moments.gram(0)
    problem = LayerProblem("attention", weight, Unstructured(), 0.5, None, gram.matrix.diagonal().clone(), gram)
    benchmark.pedantic(lambda: (OBC().prune(fresh(problem)), torch.cuda.synchronize()), rounds=1)
    benchmark.extra_info["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", [SparseGPT(), ALPS()], ids=lambda method: method.name)
def test_the_whole_of_smollm2(
    benchmark: BenchmarkFixture, shared: Path, module: torch.nn.Module, method: Pruner, pattern: Pattern
) -> None:
    on_gpu = torch.cuda.is_available()
    ids = windows(shared, 128, 2048) if on_gpu else windows(shared, 2, 256)
    batches = [{"input_ids": part} for part in ids.split(8)]
    graph = trace_module(module, batches[0], torch.device("cuda" if on_gpu else "cpu"))
    decisions = decide(Recipe((make_rule("*", pattern, method, 0.5, refit=False),)), graph.sites)
    pruned = [decision.site for decision in decisions if decision.rule is not None]
    dense = {site.name: graph.weight(site) for site in pruned}

    def begin() -> tuple[tuple[Walk], dict[str, object]]:
        for site in pruned:
            graph.set_weight(site, dense[site.name])
        return (Walk(graph, batches, decisions),), {}

    def prune(walk: Walk) -> None:
        outcomes = prune_layerwise(walk)
        if on_gpu:
            torch.cuda.synchronize()
        benchmark.extra_info["solving_s"] = round(sum(outcome.seconds for outcome in outcomes.values()), 2)
        benchmark.extra_info["notes"] = walk.notes

    benchmark.pedantic(prune, setup=begin, rounds=3 if on_gpu else 1, warmup_rounds=int(on_gpu))
    if on_gpu:
        benchmark.extra_info["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
