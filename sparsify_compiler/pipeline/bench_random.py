"""Benchmarks that need no model: single layers and whole decoders with random weights pruned to a pattern."""

from dataclasses import dataclass

import torch

from sparsify_compiler.kernel import MatmulSpec, Packed
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.runtime.bench_decode import DecodeCase, bench_decode
from sparsify_compiler.runtime.bench_layers import bench_layer, random_layer
from sparsify_compiler.runtime.bench_report import BenchReport
from sparsify_compiler.runtime.ceilings import measure_ceilings
from sparsify_compiler.runtime.decoder import read_config
from sparsify_compiler.runtime.kernels import kernels
from sparsify_compiler.runtime.machine import describe_machine
from sparsify_compiler.runtime.tune import Budget, Verdict, tune


@dataclass(frozen=True)
class RandomLayers:
    """Weights `shapes` (out, in), each pruned to each of `patterns` and multiplied by each of `tokens` rows."""

    shapes: tuple[tuple[int, int], ...]
    patterns: tuple[Pattern, ...]
    sparsity: float | None = None
    tokens: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float16
    seed: int = 0
    seconds: float = 1.0


@dataclass(frozen=True)
class DecodeChoice:
    """How a decoder is built and timed; see `runtime.bench_decode.DecodeCase`."""

    sparsity: float | None = None
    dtype: torch.dtype = torch.float16
    device: str = "auto"
    batch: int = 1
    context: int = 512
    layers: int | None = None
    repeats: int = 20
    compiled: bool = False
    seed: int = 0


def bench_random_layers(asked: RandomLayers, device: torch.device, progress: Progress = silent) -> BenchReport:
    """Time every kernel on every layer asked for, beside dense and the machine's limit."""
    ceilings = measure_ceilings(device, asked.dtype)
    budget = Budget(seconds=asked.seconds)

    def tune_one(packed: Packed, spec: MatmulSpec) -> Verdict:
        return tune(packed, spec, kernels(), budget=budget)

    layers = []
    wanted = [(shape, pattern) for shape in asked.shapes for pattern in asked.patterns]
    for done, (shape, pattern) in enumerate(wanted):
        progress("bench", done, len(wanted))
        packed = random_layer(shape, pattern, asked.sparsity, asked.dtype, device, asked.seed)
        label = f"{shape[0]}x{shape[1]} {pattern}"
        if pattern.fixed_sparsity() is None:
            label += f" {asked.sparsity}"
        layers.append(bench_layer(label, packed, asked.tokens, device, ceilings, tune_one))
    progress("bench", len(wanted), len(wanted))
    return BenchReport(describe_machine(device), "random weights and inputs", ceilings, (), tuple(layers))


def bench_random_decoder(
    config: str, pattern: Pattern, choice: DecodeChoice, device: torch.device, progress: Progress = silent
) -> BenchReport:
    """Time one decoding step of a decoder with random weights, dense against sparse."""
    case = DecodeCase(
        config=read_config(config),
        pattern=pattern,
        sparsity=choice.sparsity,
        dtype=choice.dtype,
        device=device,
        batch=choice.batch,
        context=choice.context,
        layers=choice.layers,
        seed=choice.seed,
    )

    def tune_one(packed: Packed, spec: MatmulSpec) -> Verdict:
        return tune(packed, spec, kernels(), budget=Budget(seconds=1.0))

    found = bench_decode(case, tune_one, choice.repeats, choice.compiled, progress)
    chosen = tuple(f"{name}: {verdict.kernel} ({verdict.reason})" for name, verdict in found.verdicts)
    inputs = f"{config}, {pattern}, random weights, batch {choice.batch}, context {choice.context}"
    return BenchReport(describe_machine(device), inputs, None, found.rows, (), (*chosen, *found.notes))
