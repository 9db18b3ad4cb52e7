"""How calls are timed: stopwatches for CPU and CUDA, medians, and the words for a comparison."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Call = Callable[[], object]
Words = Literal["faster", "slower", "no difference beyond the spread"]


class Stopwatch(Protocol):
    """A source of time. Tests pass one that follows a script."""

    def load(self, label: str, calls: Sequence[Call]) -> Callable[[], float]:
        """Warm up and return a function that measures once: microseconds per call, over all `calls` in turn."""
        ...

    def now(self) -> float:
        """Return seconds since any fixed moment."""
        ...


@dataclass(frozen=True)
class CpuStopwatch:
    """Wall time. One measurement repeats short calls until it lasts about `shortest_us`, far above the clock's step."""

    warmup: int = 2
    shortest_us: float = 200.0

    def load(self, label: str, calls: Sequence[Call]) -> Callable[[], float]:
        """Run every call `warmup` times and choose how often one measurement repeats them."""
        for _ in range(self.warmup):
            once = _elapsed_us(calls, 1)
        rounds = max(1, math.ceil(self.shortest_us / max(once, 1e-3)))
        return lambda: _elapsed_us(calls, rounds) / (rounds * len(calls))

    def now(self) -> float:
        """Return `time.perf_counter`."""
        return time.perf_counter()


@dataclass(frozen=True)
class CudaStopwatch:
    """CUDA events around one replay of a CUDA graph that holds all calls, so launch overhead is not counted."""

    device: torch.device
    warmup: int = 3
    inner: int = 20

    def load(self, label: str, calls: Sequence[Call]) -> Callable[[], float]:
        """Capture at least `inner` calls in one graph and replay it once.

        Raises:
            RuntimeError: a call cannot be captured (raised by PyTorch).
        """
        rounds = max(1, math.ceil(self.inner / len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self.warmup):
                    for call in calls:
                        call()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(rounds):
                    for call in calls:
                        call()
            graph.replay()
            torch.cuda.synchronize()
        return lambda: self._replay_us(graph) / (rounds * len(calls))

    def now(self) -> float:
        """Return `time.perf_counter`."""
        return time.perf_counter()

    def _replay_us(self, graph: torch.cuda.CUDAGraph) -> float:
        with torch.cuda.device(self.device):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3


@dataclass(frozen=True)
class Comparison:
    """Paired measurements of two things: the median of first / second, and its spread (IQR / median).

    `speedup` above 1 says the second is faster. `gain` is beyond the spread when |speedup - 1| exceeds it.
    """

    speedup: float
    spread: float

    def words(self) -> Words:
        """Say whether the second is faster, slower, or neither beyond the spread."""
        if abs(self.speedup - 1) <= self.spread:
            return "no difference beyond the spread"
        return "faster" if self.speedup > 1 else "slower"


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare measurements taken in the same rounds, so that what slows a round down slows both."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return Comparison(statistics.median(ratios), spread(ratios))


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def _elapsed_us(calls: Sequence[Call], rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        for call in calls:
            call()
    return (time.perf_counter() - start) * 1e6
