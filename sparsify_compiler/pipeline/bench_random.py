"""Benchmarks of single layers, and of whole decoders with random weights pruned to a pattern."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import partial

import torch

from sparsify_compiler.errors import DataError
from sparsify_compiler.export.torch import Artefact, PrunedSite
from sparsify_compiler.kernel import MatmulSpec, Packed
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.runtime.benchmark.ceilings import measure_ceilings
from sparsify_compiler.runtime.benchmark.decode import DecodeCase, bench_decode
from sparsify_compiler.runtime.benchmark.decoder import read_config
from sparsify_compiler.runtime.benchmark.layers import bench_layer, random_layer
from sparsify_compiler.runtime.benchmark.report import BenchReport
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.machine import describe_machine
from sparsify_compiler.runtime.tuning.selftest import Tester
from sparsify_compiler.runtime.tuning.tune import Budget, Verdict, tune

SECONDS = 1.0
"""How long each layer is measured at each token count."""


@dataclass(frozen=True)
class RandomLayers:
    """Weights `shapes` (out, in), each pruned to each of `patterns` and multiplied by each of `tokens` rows."""

    shapes: tuple[tuple[int, int], ...]
    patterns: tuple[Pattern, ...]
    sparsity: float | None = None
    tokens: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float16
    seed: int = 0


@dataclass(frozen=True)
class DecodeChoice:
    """How a decoder is built and timed; see `runtime.benchmark.decode.DecodeCase`."""

    sparsity: float | None = None
    dtype: torch.dtype = torch.float16
    device: str = "auto"
    batch: int = 1
    context: int = 512
    layers: int | None = None
    repeats: int = 20
    compiled: bool = False
    seed: int = 0


def bench_random_layers(
    asked: RandomLayers, device: torch.device, tester: Tester | None = None, progress: Progress = silent
) -> BenchReport:
    """Time every kernel that `tester` lets pass on every layer, beside dense and the machine's limit."""
    ceilings = measure_ceilings(device, asked.dtype)
    layers = []
    wanted = [(shape, pattern) for shape in asked.shapes for pattern in asked.patterns]
    for done, (shape, pattern) in enumerate(wanted):
        progress("bench", done, len(wanted))
        packed = random_layer(shape, pattern, asked.sparsity, asked.dtype, device, asked.seed)
        layers.append(bench_layer("random", packed, asked.tokens, device, ceilings, partial(_tune_one, tester)))
    progress("bench", len(wanted), len(wanted))
    return BenchReport(describe_machine(device), "random weights and inputs", ceilings, (), tuple(layers))


def bench_pruned_sites(
    artefact: Artefact,
    tokens: tuple[int, ...],
    device: torch.device,
    tester: Tester | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Time every kernel on an artefact's distinct weights: shape, pattern, run and density to 1 %.

    Of a convolution it is the product of one group that is timed, without the windows; compile times it as a whole.

    Raises:
        DataError: nothing was pruned.
    """
    distinct: dict[Hashable, tuple[str, Packed, int | None]] = {}
    counts: Counter[Hashable] = Counter()
    for site in artefact.sites:
        weight, run = _product(site, artefact.packed[site.site.name])
        spec = spec_for(weight, tokens, device, run)
        key: Hashable = (weight.shape, str(weight.pattern), run, round(spec.density, 2), spec.dtype)
        distinct.setdefault(key, (site.site.name, weight, run))
        counts[key] += 1
    if not distinct:
        raise DataError("no pruned layer to time; give a folder in which compile pruned something")
    dtype = next(iter(distinct.values()))[1].tensors["values"].dtype
    ceilings = measure_ceilings(device, dtype)
    layers = []
    for done, (key, (name, weight, run)) in enumerate(distinct.items()):
        progress("bench", done, len(distinct))
        here = replace(weight, tensors={part: tensor.to(device) for part, tensor in weight.tensors.items()})
        label = name if counts[key] == 1 else f"{name} and {counts[key] - 1} like it"
        layers.append(bench_layer(label, here, tokens, device, ceilings, partial(_tune_one, tester), run))
    progress("bench", len(distinct), len(distinct))
    return BenchReport(describe_machine(device), "the pruned weights, random inputs", ceilings, (), tuple(layers))


def _product(pruned: PrunedSite, packed: Packed) -> tuple[Packed, int | None]:
    """Return the weight of a site's first group, and the pattern's run in it."""
    site = pruned.site
    run = site.run if site.run != site.in_ else None
    if site.groups > 1:
        weight = unpack(packed)[: site.out]
        packed = format_for(packed.pattern).pack(weight, pruned.keep[0], packed.pattern, run)
    return packed, run


def bench_random_decoder(
    config: str,
    pattern: Pattern,
    choice: DecodeChoice,
    device: torch.device,
    tester: Tester | None = None,
    progress: Progress = silent,
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
    found = bench_decode(case, partial(_tune_one, tester), choice.repeats, choice.compiled, progress)
    chosen = tuple(f"{name}: {verdict.reason}" for name, verdict in found.verdicts)
    inputs = f"{config}, {pattern}, random weights, batch {choice.batch}, context {choice.context}"
    return BenchReport(describe_machine(device), inputs, None, found.rows, (), (*chosen, *found.notes))


def _tune_one(tester: Tester | None, packed: Packed, spec: MatmulSpec) -> Verdict:
    """Measure now: a benchmark never answers from the cache."""
    return tune(packed, spec, kernels(), budget=Budget(seconds=SECONDS), tester=tester)
