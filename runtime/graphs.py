"""CUDA graphs: calls whose launches are recorded once and replayed without Python."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def graphed(call: Callable[[], object], device: torch.device, warmup: int = 3) -> Callable[[], object]:
    """Run `call` `warmup` times on a stream of its own, capture it once, and return the replay.

    What `call` reads must stay where it is; its result is overwritten by every replay.

    Raises:
        RuntimeError: something in `call` cannot be captured (raised by PyTorch); nothing is left behind.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                call()
        stream.synchronize()
        graph = capture(call, stream, torch.cuda.graph_pool_handle())
        torch.cuda.synchronize()
    return graph.replay


def capture(call: Callable[[], object], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    """Capture one run of `call` on `stream` of the current device, its memory from `pool`; nothing runs yet.

    Raises:
        RuntimeError: it cannot be captured, or memory ran out (raised by PyTorch). The current stream and PyTorch's
            allocator are as they were before.
    """
    before = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        # An error in another thread's CUDA work must not break this capture: thread_local.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            call()
    except torch.OutOfMemoryError:
        torch.cuda.set_stream(before)
        raise
    except RuntimeError:
        torch.cuda.set_stream(before)  # a capture that cannot end leaves its own stream current
        _end_pool(torch.cuda.current_device(), pool)
        torch.cuda.synchronize()
        raise
    return graph


def _end_pool(index: int, pool: Any) -> None:
    """Tell PyTorch's allocator that a capture which could not end is over.

    Up to 2.11 it goes on believing in the capture, and the next time it frees memory it fails (PyTorch #180395).
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with contextlib.suppress(RuntimeError):  # a later PyTorch has told it already
            end(index, pool)
