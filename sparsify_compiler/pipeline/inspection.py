"""Look at a model before compiling it: every site with what it could take and why not, and what compile would cost."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.frontends.layout import row_chunks
from sparsify_compiler.graph import Graph, MatmulLayout, Site
from sparsify_compiler.kernel import Kernel, MatmulSpec
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.pipeline.peak_memory import peak_memory_bytes
from sparsify_compiler.plan import Decision
from sparsify_compiler.recipe import make_rule
from sparsify_compiler.runtime.kernels import capability, kernels
from sparsify_compiler.runtime.tuning.verdicts import without_found

PATTERNS: tuple[Pattern, ...] = (Unstructured(), NM(2, 4), NM(4, 8), NM(16, 32), Block(16, 16), Block(64, 64))
"""The patterns that `inspect` tries on every site; a recipe may ask for any other."""

REFIT_PRODUCTS = 70
"""Products of a weight with its Gram matrix that selecting and re-solving cost together, on real Grams (about)."""


@dataclass(frozen=True)
class SiteInspection:
    """One site: rows its input would give over all batches, and per pattern and kernel None or the reason against.

    A kernel has none where it runs one of the patterns that fit; `runs` has, by pattern that fits, the sparse kernels
    that take it. How fast they are, compile finds.
    """

    site: Site
    tokens: int
    patterns: Mapping[str, str | None]
    kernels: Mapping[str, str | None]
    runs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """All sites in execution order, and estimates for SparseGPT with re-solve on every site that allows it."""

    rows: tuple[SiteInspection, ...]
    memory_bytes: int
    seconds: float
    notes: tuple[str, ...]


def inspect_graph(
    graph: Graph,
    batches: Sequence[Batch],
    tokens: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    model_bytes: int,
    generated: bool = False,
) -> Inspection:
    """Run the first batch through `graph`, count what every site reads, and estimate the cost of compiling.

    Kernels are asked about `dtype`, the compiled model's. `model_bytes` is the size of the weights: compile holds them
    twice, the user's, which this process has read, and the pruned ones. `generated` says that the batches were drawn at
    random because no data was given.
    """
    counts, seconds = _count(graph, batches[0])
    rows = tuple(
        _site_inspection(site, counts.get(site.reads, 0) * len(batches), _specs(site, tokens, dtype, device))
        for site in graph.sites
    )
    rule = make_rule("*", Unstructured(), METHODS["sparsegpt"](), 0.5)
    chosen = [site for site in graph.sites if site.refusal is None and site.dense_by_default is None]
    walk = Walk(graph, batches, [Decision(site, rule) for site in chosen])
    estimate = walk.estimate()
    memory = peak_memory_bytes() + model_bytes + estimate.statistics_bytes + estimate.boundary_bytes
    work = sum(2.0 * site.groups * site.out * site.in_**2 * REFIT_PRODUCTS for site in chosen)
    gathering = sum(2.0 * site.in_**2 * counts.get(site.reads, 0) * len(batches) for site in chosen)
    rate = _rate(device)
    notes: tuple[str, ...] = (
        f"{len(chosen)} of {len(graph.sites)} sites would be pruned by a rule for every site",
        f"statistics of the largest segment {size(estimate.statistics_bytes)}, values between segments "
        f"{size(estimate.boundary_bytes)} for {len(batches)} batches",
        "the time is for SparseGPT with re-solve at the speed measured now; exporting and tuning come on top",
    )
    if generated:
        drawn = f"{len(batches)} generated batch{'es' if len(batches) != 1 else ''}"
        notes += (
            f"no data was given: rows, memory and time are those of {drawn}; give the data you will compile with",
        )
    return Inspection(rows, memory, 2 * seconds * len(batches) + (work + gathering) / rate, notes)


def _count(graph: Graph, batch: Batch) -> tuple[dict[str, int], float]:
    """Run one batch: rows per `Site.reads`, and the seconds it took."""
    layouts = {site.reads: site.layout for site in graph.sites if site.layout is not None and site.refusal is None}
    counts: dict[str, int] = {}

    def observe(key: str, x: Tensor) -> None:
        layout = layouts.get(key)
        if layout is not None:
            counts[key] = counts.get(key, 0) + sum(chunk.shape[1] for chunk in row_chunks(x, layout))

    with torch.no_grad():
        values = graph.enter(batch)
        start = time.perf_counter()
        for segment in graph.segments:
            values = graph.run_segment(segment.index, values, observe)
    return counts, time.perf_counter() - start


def _site_inspection(site: Site, rows: int, specs: Sequence[MatmulSpec]) -> SiteInspection:
    """Ask every kernel whether it would take the site at half its weights in each of the patterns that fit it."""
    patterns = {str(pattern): site.refusal or pattern.misfit(site.out, site.in_, site.run) for pattern in PATTERNS}
    conv = not isinstance(site.layout, MatmulLayout) and len(site.shape) != 4
    refusal = site.refusal or ("only 2-d convolutions have a sparse layer" if conv else None)
    if refusal is not None:
        against = {kernel.name: None if kernel.name == "dense" else refusal for kernel in kernels()}
        return SiteInspection(site, rows, patterns, against)
    sparse = [kernel for kernel in kernels() if kernel.name != "dense"]
    runs = {str(spec.pattern): tuple(k.name for k in sparse if k.rejects(spec) is None) for spec in specs}
    return SiteInspection(site, rows, patterns, {k.name: _against(k, specs) for k in kernels()}, runs)


def _specs(site: Site, tokens: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[MatmulSpec]:
    """Describe the site's product at half its weights in each of the patterns that fit it."""
    return [
        MatmulSpec(
            out=site.out,
            in_=site.in_,
            dtype=dtype,
            pattern=pattern,
            density=0.5,
            tokens=tokens,
            device=device,
            capability=capability(device),
            run=site.run if site.run != site.in_ else None,
        )
        for pattern in PATTERNS
        if pattern.misfit(site.out, site.in_, site.run) is None
    ]


def _against(kernel: Kernel, specs: Sequence[MatmulSpec]) -> str | None:
    """Return None where a kernel takes one of `specs`, else what stands against it.

    Of several reasons the one it gives least often: the others say that most patterns are not its own.
    """
    found = [kernel.rejects(spec) for spec in specs]
    reasons = [reason for reason in found if reason is not None]
    if len(reasons) < len(found):
        return None
    counts = Counter(map(without_found, reasons))
    rarest = min(reversed(counts), key=lambda stem: counts[stem], default="no pattern fits")
    same = {reason for reason in reasons if without_found(reason) == rarest}
    if len(same) > 1:  # what was found differs: it is the pattern
        return f"{rarest}; found {', '.join(str(spec.pattern) for spec in specs)}"
    return next(iter(same), rarest)


def _rate(device: torch.device) -> float:
    """Measure a matrix product: floating-point operations per second."""
    a = torch.rand(512, 512, dtype=torch.float64, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best
