"""Calls captured in a CUDA graph: the launches are recorded once and replayed without Python."""

from collections.abc import Callable

import torch


def graphed(call: Callable[[], object], device: torch.device, warmup: int = 3) -> Callable[[], object]:
    """Run `call` `warmup` times on a stream of its own, capture it once, and return the replay.

    What `call` reads must stay where it is; its result is overwritten by every replay.

    Raises:
        RuntimeError: something in `call` cannot be captured (raised by PyTorch); nothing is left behind.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
        torch.cuda.synchronize()
    return graph.replay
