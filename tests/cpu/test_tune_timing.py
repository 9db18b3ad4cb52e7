"""The stopwatches: a CPU's by what it calls, CUDA's by the order of its calls to a stand-in for torch.cuda."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sparsify_compiler.runtime.graphs import graphed
from sparsify_compiler.runtime.tuning import timing as timing_module
from sparsify_compiler.runtime.tuning.timing import CpuStopwatch, CudaStopwatch, stopwatch_for

CUDA = torch.device("cuda", 0)


@dataclass
class FakeCuda:
    """torch.cuda as far as graphs and stopwatches use it: a clock that calls move on, and graphs that record calls."""

    clock_us: float = 0.0
    stream: str = "current"
    capturing: list[Any] | None = None
    log: list[str] = field(default_factory=list)

    def call(self, us: float, problem: Exception | None = None) -> Any:
        def one() -> None:
            if problem and self.capturing is not None:
                raise problem
            if self.capturing is not None:
                self.capturing.append(us)
            else:
                self.clock_us += us

        return one

    def end_pool(self, index: int, pool: object) -> None:
        self.log.append(f"end {index} {pool}")
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        outer = self

        class Stream:
            def __init__(self, index: int = 0) -> None:
                outer.log.append(f"stream {index}")

            def wait_stream(self, other: object) -> None:
                outer.log.append("wait")

            def synchronize(self) -> None:
                outer.log.append("sync stream")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = outer.clock_us

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) / 1e3

        class Graph:
            def __init__(self) -> None:
                self.held: list[float] = []

            def pool(self) -> tuple[int, int]:
                return (0, 7)

            def replay(self) -> None:
                outer.log.append(f"replay {len(self.held)}")
                outer.clock_us += sum(self.held)

        @contextlib.contextmanager
        def graph(into: Graph, pool: object = None, stream: object = None, **mode: str) -> Iterator[None]:
            assert mode == {"capture_error_mode": "thread_local"}
            outer.log.append(f"capture {pool}")
            outer.capturing, outer.stream = into.held, "side"
            try:
                yield
                outer.stream = "current"
            finally:  # a capture that fails leaves its stream current, as torch does
                outer.capturing = None

        @contextlib.contextmanager
        def within(what: object) -> Iterator[None]:
            yield

        def set_stream(stream: str) -> None:
            outer.stream = stream

        cuda = torch.cuda
        replaced = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "device": within}
        replaced |= {"stream": within, "set_stream": set_stream, "synchronize": lambda: outer.log.append("sync")}
        replaced |= {"current_stream": lambda: outer.stream, "current_device": lambda: 0}
        replaced["graph_pool_handle"] = lambda: (0, 7)
        for name, value in replaced.items():
            patch.setattr(cuda, name, value)
        patch.setattr(timing_module, "_side_stream", Stream)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_pool, raising=False)
        patch.setattr(torch, "zeros", lambda *size, device: None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.mark.parametrize(
    ("us", "copies", "held"),
    [
        (50.0, 1, 20),  # 1 ms of calls
        (1.0, 1, 200),  # no more than `most`
        (2000.0, 1, 3),  # no fewer than `fewest`
        (2000.0, 5, 5),  # whole turns of the copies
        (50.0, 12, 24),
        (1.0, 256, 256),
    ],
)
def test_a_graph_holds_whole_turns_of_the_calls(cuda: FakeCuda, us: float, copies: int, held: int) -> None:
    measure = CudaStopwatch(CUDA).load("kernel 1", [cuda.call(us) for _ in range(copies)])
    assert measure() == pytest.approx(us)
    assert measure.note == ""
    assert cuda.log[-3:] == [f"replay {held}", "sync", f"replay {held}"]
    assert cuda.log.count(f"replay {held}") == 3  # two to warm up, one measured


def test_calls_of_different_length_are_averaged(cuda: FakeCuda) -> None:
    assert CudaStopwatch(CUDA).load("kernel 1", [cuda.call(10), cuda.call(30)])() == pytest.approx(20)


def test_graphs_share_one_pool_and_one_stream(cuda: FakeCuda) -> None:
    watch = CudaStopwatch(CUDA)
    for _ in range(3):
        watch.load("kernel 1", [cuda.call(50)])
    assert [line for line in cuda.log if line.startswith("capture")] == ["capture (0, 7)"] * 4  # one is empty
    assert [line for line in cuda.log if line.startswith("stream")] == ["stream 0"]


def test_a_call_that_cannot_be_captured_is_timed_without_a_graph_and_says_so(cuda: FakeCuda) -> None:
    broken = cuda.call(40, RuntimeError("operation not permitted when stream is capturing\nmore"))
    measure = CudaStopwatch(CUDA).load("kernel 1", [broken])
    assert measure() == pytest.approx(40)
    assert measure.note == (
        "timed without a CUDA graph, which cannot hold it (operation not permitted when stream is capturing)"
    )
    assert cuda.stream == "current"
    assert cuda.log.count("end 0 (0, 7)") == 1  # or PyTorch up to 2.11 cannot free memory from here on


def test_a_call_known_to_be_uncapturable_is_never_captured(cuda: FakeCuda) -> None:
    measure = CudaStopwatch(CUDA).load("kernel 1", [cuda.call(40)], capture=False)
    assert measure() == pytest.approx(40)
    assert measure.note == "timed without a CUDA graph"
    assert not any(line.startswith("capture") for line in cuda.log)


def test_memory_that_runs_out_in_a_capture_is_raised_with_the_stream_restored(cuda: FakeCuda) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        CudaStopwatch(CUDA).load("kernel 1", [cuda.call(40, torch.OutOfMemoryError("9 GiB"))])
    assert cuda.stream == "current"


def test_a_whole_model_that_cannot_be_captured_leaves_pytorch_as_it_was(cuda: FakeCuda) -> None:
    replay = graphed(cuda.call(40), CUDA)
    replay()
    assert cuda.log[-1] == "replay 1"
    assert not any(line.startswith("end") for line in cuda.log)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphed(cuda.call(40, RuntimeError("operation not permitted when stream is capturing")), CUDA)
    assert cuda.stream == "current"
    assert cuda.log.count("end 0 (0, 7)") == 1


def test_a_cpu_measurement_goes_on_where_the_last_one_stopped() -> None:
    called: list[int] = []

    def slow(number: int) -> Any:
        def one() -> None:
            called.append(number)
            sum(range(20_000))  # longer than shortest_us below

        return one

    watch = CpuStopwatch(warmup=1, shortest_us=1.0)
    measure = watch.load("kernel 1", [slow(n) for n in range(3)])
    assert called == [0]
    for _ in range(5):
        assert measure() > 1.0
    assert called == [0, 0, 1, 2, 0, 1]
    assert stopwatch_for(torch.device("cpu")) == CpuStopwatch()
