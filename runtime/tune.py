"""Which kernel runs a weight: every candidate is checked, then timed against dense in the same rounds.

Design rule 1, measured, never assumed: one weight copy serves all token counts, so the kernel with the least total
time over the counts that were asked wins, and only when its gain exceeds the spread. Otherwise the layer stays dense.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.timing import Call, CpuStopwatch, CudaStopwatch, Stopwatch, compare_pairs

DENSE = "dense"
CHECKED_ROWS = 64
MOST_COPIES = 256


@dataclass(frozen=True)
class Budget:
    """How long to measure one specification.

    Rounds go on until `seconds` are spent, but at least `least_rounds` and at most `most_rounds`. After
    `look_rounds` a candidate whose total is still below `hopeless` times dense in every round is timed no further.
    Checking and warming up come before the clock starts.
    """

    seconds: float = 0.5
    least_rounds: int = 5
    most_rounds: int = 30
    look_rounds: int = 3
    hopeless: float = 0.5


@dataclass(frozen=True)
class KernelTiming:
    """One candidate at one token count: medians in microseconds over the rounds.

    `speedup` is the median over the rounds of dense time / this kernel's time, `spread` that ratio's interquartile
    range over its median. The fields are those of `sparsify_compiler.export.report.Timing`.
    """

    kernel: str
    tokens: int
    time_us: float
    dense_us: float
    spread: float
    speedup: float
    verdict: str


@dataclass(frozen=True)
class Verdict:
    """The kernel to run, why in words, what was measured, and each refused kernel with its reason.

    `rounds` is the number of measurements of dense, and of every candidate that was not given up early.
    """

    kernel: str
    reason: str
    timings: tuple[KernelTiming, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 0


def spec_key(spec: MatmulSpec, bias: bool = False) -> Hashable:
    """Return a key under which layers share one verdict: equal but for the density, which is rounded to 1 %.

    For the caller's memo, so that a model with thirty equal layers is tuned once.
    """
    shape = (spec.out, spec.in_, str(spec.dtype), str(spec.pattern), round(spec.density, 2))
    return (*shape, spec.tokens, str(spec.device), spec.capability, bias)


def tune(
    packed: Packed,
    spec: MatmulSpec,
    kernels: Sequence[Kernel],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    budget: Budget | None = None,
    stopwatch: Stopwatch | None = None,
) -> Verdict:
    """Time `kernels` (one of them named "dense") on standard normal inputs of `spec.tokens` rows; see the module.

    On CUDA the weights are rotated through copies larger than twice the L2 cache, so every call reads them from
    memory; on a CPU they are as warm as the caches keep them, which favours dense, the larger one.

    Raises:
        KernelError: no kernel is named "dense", dense itself cannot run or `spec.tokens` is empty.
    """
    dense = next((kernel for kernel in kernels if kernel.name == DENSE), None)
    if dense is None or not spec.tokens or min(spec.tokens) < 1:
        names = ", ".join(kernel.name for kernel in kernels) or "none"
        raise KernelError(
            f"cannot tune ({spec.out}, {spec.in_}): needs a kernel named dense and token counts of at least 1; "
            f"found kernels {names} and tokens {spec.tokens}"
        )
    watch = stopwatch or (CudaStopwatch(spec.device) if spec.device.type == "cuda" else CpuStopwatch())
    job = _Job(packed, spec, _inputs(spec), unpack(packed).to(spec.device), bias, activation, watch)
    entries: dict[str, Measures] = {}
    refused: dict[str, str] = {}
    for kernel in (dense, *(kernel for kernel in kernels if kernel is not dense)):
        found = _load(kernel, job)
        if isinstance(found, str):
            refused[kernel.name] = found
        else:
            entries[kernel.name] = found
    if DENSE in refused:
        raise KernelError(f"dense cannot run ({spec.out}, {spec.in_}) {spec.dtype}: {refused[DENSE]}")
    if len(entries) == 1:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "none was given"
        return Verdict(DENSE, f"dense: no sparse kernel can run this weight ({reasons})", (), refused)
    return _verdict(_measure(entries, budget or Budget(), watch), spec.tokens, refused)


Measures = Mapping[int, Callable[[], float]]
"""By token count, a function that measures once and returns microseconds."""

Times = Mapping[str, Mapping[int, Sequence[float]]]
"""By kernel and token count, the microseconds of every round."""


@dataclass(frozen=True)
class _Job:
    packed: Packed
    spec: MatmulSpec
    inputs: Mapping[int, Tensor]
    weight: Tensor
    bias: Tensor | None
    activation: Activation | None
    watch: Stopwatch


def _load(kernel: Kernel, job: _Job) -> Measures | str:
    """Check a kernel at every token count and load it into the stopwatch, or say why it cannot be used."""
    if reason := kernel.rejects(job.spec):
        return reason
    measures = {}
    try:
        prepared = kernel.prepare(job.packed, job.spec)
        copies = _cold_copies(prepared, job.spec.device)
        for tokens, x in job.inputs.items():
            if wrong := _wrong(kernel.run(prepared, x, job.bias, job.activation), x, job):
                return f"wrong result for {tokens} tokens: {wrong}"
            calls = [_call(kernel, copy, x, job) for copy in copies]
            measures[tokens] = job.watch.load(f"{kernel.name} {tokens}", calls)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {_first_line(error)}"
    except (RuntimeError, KernelError) as error:  # what PyTorch and kernels raise for what they cannot run
        return f"failed: {_first_line(error)}"
    return measures


def _call(kernel: Kernel, prepared: Prepared, x: Tensor, job: _Job) -> Call:
    return lambda: kernel.run(prepared, x, job.bias, job.activation)


def _wrong(y: Tensor, x: Tensor, job: _Job) -> str | None:
    """Compare the first and last rows with float64: all of them would cost more than the measurement."""
    tokens = x.shape[0]
    if tokens > CHECKED_ROWS and y.shape[0] == tokens:
        rows = [*range(CHECKED_ROWS // 2), *range(tokens - CHECKED_ROWS // 2, tokens)]
        x, y = x[rows], y[rows]
    return difference(y, x, job.weight, job.bias, job.activation)


def _measure(entries: Mapping[str, Measures], budget: Budget, watch: Stopwatch) -> Times:
    """Measure everything once a round, kernel after kernel at each token count (A B A B ...)."""
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in found} for name, found in entries.items()}
    active = list(entries)
    start = watch.now()
    for done in range(budget.most_rounds):
        if done >= budget.least_rounds and watch.now() - start > budget.seconds:
            break
        if done == budget.look_rounds:
            active = [name for name in active if name == DENSE or not _hopeless(times, name, budget)]
        if len(active) == 1:
            break
        for tokens in times[DENSE]:
            for name in active:
                times[name][tokens].append(entries[name][tokens]())
    return times


def _hopeless(times: Times, name: str, budget: Budget) -> bool:
    dense, sparse = _totals(times[DENSE]), _totals(times[name])
    return all(d < budget.hopeless * s for d, s in zip(dense, sparse, strict=True))


def _totals(by_tokens: Mapping[int, Sequence[float]]) -> list[float]:
    return [sum(measured) for measured in zip(*by_tokens.values(), strict=True)]


def _verdict(times: Times, tokens: tuple[int, ...], refused: Mapping[str, str]) -> Verdict:
    measured = len(times[DENSE][tokens[0]])
    timings = []
    best, best_speedup, losers = "", 1.0, []
    for name in (name for name in times if name != DENSE):
        rows = [_timing(name, n, times) for n in dict.fromkeys(tokens)]
        timings += rows
        rounds = len(times[name][tokens[0]])
        total = compare_pairs(_totals(times[DENSE])[:rounds], _totals(times[name]))
        words = (
            f"{name}: {total.words()}, {total.speedup:.2f}x over {_list(tokens)} tokens together, "
            f"spread {total.spread:.0%}, {rounds} rounds{' (given up early)' if rounds < measured else ''}"
        )
        if lost := [row for row in rows if row.verdict.startswith("slower")]:
            words += f"; slower at {', '.join(f'{row.tokens} ({row.speedup:.2f}x)' for row in lost)}"
        if total.words() == "faster" and total.speedup > best_speedup:
            best, best_speedup = name, total.speedup
            reason = words
        losers.append(words)
    if best:
        return Verdict(best, reason, tuple(timings), refused, measured)
    return Verdict(DENSE, f"dense: {'; '.join(losers)}", tuple(timings), refused, measured)


def _timing(name: str, tokens: int, times: Times) -> KernelTiming:
    sparse = times[name][tokens]
    dense = times[DENSE][tokens][: len(sparse)]
    pair = compare_pairs(dense, sparse)
    words = f"{pair.words()}: {pair.speedup:.2f}x, spread {pair.spread:.0%}"
    time_us, dense_us = statistics.median(sparse), statistics.median(dense)
    return KernelTiming(name, tokens, time_us, dense_us, pair.spread, pair.speedup, words)


def _inputs(spec: MatmulSpec) -> dict[int, Tensor]:
    """Draw the inputs on the CPU from a fixed seed, so that all machines tune on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    return {
        tokens: torch.randn(tokens, spec.in_, generator=generator).to(spec.device, spec.dtype)
        for tokens in dict.fromkeys(spec.tokens)
    }


def _cold_copies(prepared: Prepared, device: torch.device) -> list[Prepared]:
    """Return enough copies of a weight that one round of them does not fit the L2 cache twice; on a CPU just one."""
    if device.type != "cuda":
        return [prepared]
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = sum(t.numel() * t.element_size() for t in prepared.tensors)
    count = min(MOST_COPIES, max(1, math.ceil(2 * cache / max(size, 1))))
    clones = [tuple(t.clone() for t in prepared.tensors) for _ in range(count - 1)]
    return [prepared, *(Prepared(prepared.kernel, prepared.shape, tensors) for tensors in clones)]


def _list(tokens: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in dict.fromkeys(tokens))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
