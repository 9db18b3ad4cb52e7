"""How calls are timed: stopwatches for CPU and CUDA, medians, and the words for a comparison."""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from sparsify_compiler.errors import first_line
from sparsify_compiler.runtime import graphs

Call = Callable[[], object]
Words = Literal["faster", "slower", "no difference beyond the spread", "too noisy to tell"]


@dataclass(frozen=True)
class Measure:
    """What a stopwatch has loaded: called, it measures once and returns microseconds per call.

    `note` says what a reader of the figure must know, "" where it was taken as the stopwatch promises.
    """

    once: Callable[[], float]
    note: str = ""

    def __call__(self) -> float:
        """Measure once."""
        return self.once()


class Stopwatch(Protocol):
    """A source of time. Tests pass one that follows a script."""

    def load(self, label: str, calls: Sequence[Call], capture: bool = True) -> Measure:
        """Warm up and return what measures `calls`, taken in turn. `capture` False: never in a CUDA graph."""
        ...

    def now(self) -> float:
        """Return seconds since any fixed moment."""
        ...


@dataclass(frozen=True)
class CpuStopwatch:
    """Wall time. One measurement lasts about `shortest_us`, far above the clock's step, or one call if that is longer.

    Measurements go on where the last one stopped among the calls, so that calls on copies of a weight meet it cold.
    """

    warmup: int = 2
    shortest_us: float = 200.0

    def load(self, label: str, calls: Sequence[Call], capture: bool = True) -> Measure:
        """Run the first call `warmup` times and choose how many calls one measurement takes."""
        for _ in range(self.warmup):
            once = _elapsed_us(iter(calls[:1]))
        count = max(1, math.ceil(self.shortest_us / max(once, 1e-3)))
        following = itertools.cycle(calls)
        return Measure(lambda: _elapsed_us(itertools.islice(following, count)) / count)

    def now(self) -> float:
        """Return `time.perf_counter`."""
        return time.perf_counter()


class CudaStopwatch:
    """CUDA events around one replay of a CUDA graph that holds all calls, so launch overhead is not counted.

    A graph holds whole turns of the calls: enough for `target_us` of work, at least `fewest` calls and, where single
    calls are short, about `most`. Calls that cannot be captured are timed without a graph, and the note says so.
    All graphs share one stream and one memory pool: a stream of its own for each would keep a cuBLAS workspace each.
    """

    def __init__(
        self, device: torch.device, warmup: int = 3, target_us: float = 1000.0, fewest: int = 3, most: int = 200
    ) -> None:
        """Take the stream that all measurements of `device` run on; needs CUDA."""
        self.device, self.warmup = device, warmup
        self.target_us, self.fewest, self.most = target_us, fewest, most
        with torch.cuda.device(device):
            self._stream = _side_stream(torch.cuda.current_device())
        self._anchor: torch.cuda.CUDAGraph | None = None

    def load(self, label: str, calls: Sequence[Call], capture: bool = True) -> Measure:
        """Warm up, capture whole turns of `calls` in one graph and replay it twice.

        Raises:
            RuntimeError: a call fails outside a capture, or memory ran out (raised by PyTorch).
        """
        kept = tuple(calls)  # a graph holds addresses only: the closures below keep the tensors alive
        with torch.cuda.device(self.device):
            turns = self._turns(self._warm(kept), len(kept))
            note = "timed without a CUDA graph"
            if capture:
                graph = self._captured(kept, turns)
                if isinstance(graph, torch.cuda.CUDAGraph):
                    graph.replay()
                    graph.replay()
                    torch.cuda.synchronize()
                    return Measure(lambda: self._events_us(graph.replay) / (turns * len(kept)))
                note = f"timed without a CUDA graph, which cannot hold it ({graph})"
        return Measure(lambda: self._events_us(lambda: _run(kept, turns)) / (turns * len(kept)), note)

    def now(self) -> float:
        """Return `time.perf_counter`."""
        return time.perf_counter()

    def _turns(self, each_us: float, calls: int) -> int:
        """Return how often a graph repeats `calls` calls of `each_us` microseconds."""
        wanted = min(self.most, max(self.fewest, math.ceil(self.target_us / max(each_us, 1e-3))))
        return max(1, math.ceil(wanted / calls))

    def _warm(self, calls: tuple[Call, ...]) -> float:
        """Run every call once and the first `warmup` times more; return microseconds of one, launch included."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls:
                call()
            us = self._events_us(lambda: _run(calls[:1], self.warmup))
        self._stream.synchronize()
        return us / self.warmup

    def _captured(self, calls: tuple[Call, ...], turns: int) -> torch.cuda.CUDAGraph | str:
        """Capture, or return in words why it cannot be done."""
        try:
            return graphs.capture(lambda: _run(calls, turns), self._stream, self._pool())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return first_line(error)

    def _pool(self) -> Any:
        """Return the pool of a graph that lives as long as this stopwatch: a pool dies with its last graph."""
        if self._anchor is None:
            handle = torch.cuda.graph_pool_handle()
            self._anchor = graphs.capture(lambda: torch.zeros(1, device=self.device), self._stream, handle)
        return self._anchor.pool()

    def _events_us(self, work: Call) -> float:
        with torch.cuda.device(self.device):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return the stopwatch of a device: CUDA's own clock, wall time elsewhere."""
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


@dataclass(frozen=True)
class Comparison:
    """Paired measurements of two things: the median of first / second, its spread (IQR / median) and its quartiles.

    `speedup` above 1 says the second is faster. The difference counts when it exceeds the spread and three quarters of
    the rounds agree on its direction, so that a few wild rounds decide nothing.
    """

    speedup: float
    spread: float
    quartiles: tuple[float, float]

    def words(self) -> Words:
        """Say whether the second is faster, slower or neither; too noisy where rounds agree but not on how much."""
        low, high = self.quartiles
        if low <= 1 <= high:
            return "no difference beyond the spread"
        if abs(self.speedup - 1) <= self.spread:
            return "too noisy to tell"
        return "faster" if self.speedup > 1 else "slower"


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare measurements taken in the same rounds, so that what slows a round down slows both."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return Comparison(statistics.median(ratios), spread(ratios), _quartiles(ratios))


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median; 0 for fewer than two values."""
    low, high = _quartiles(values)
    return (high - low) / statistics.median(values)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@functools.lru_cache(maxsize=64)
def _side_stream(index: int) -> torch.cuda.Stream:
    """Return the stream for measurements on a device: cuBLAS keeps a workspace for every stream it ever ran on."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _run(calls: tuple[Call, ...], turns: int) -> None:
    for _ in range(turns):
        for call in calls:
            call()


def _elapsed_us(calls: Iterator[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6
