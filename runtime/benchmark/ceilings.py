"""What the machine can do at most: bytes moved and products computed per second, measured; and the limit they set."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsify_compiler.kernel import Packed


@dataclass(frozen=True)
class Ceilings:
    """The best of a few measurements on one device.

    `bytes_per_s` counts the bytes read and written by a copy much larger than the last-level cache, `flops_per_s`
    2 n^3 for a square product in `dtype`.
    """

    device: str
    dtype: str
    bytes_per_s: float
    flops_per_s: float

    def limit_us(self, moved_bytes: int, flops: int) -> float:
        """Return the least time in microseconds in which so many bytes and operations could be done."""
        return 1e6 * max(moved_bytes / self.bytes_per_s, flops / self.flops_per_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> Ceilings:
    """Time a copy and a square product on `device`: 1 GiB and 8192^3 on CUDA, 256 MiB and 1024^3 elsewhere.

    Less where that memory is not free. Raises what PyTorch raises for a dtype that the device cannot multiply.
    """
    on_cuda = device.type == "cuda"
    count = 2**30 if on_cuda else 2**28
    side = 8192 if on_cuda else 1024
    if on_cuda:
        free = torch.cuda.mem_get_info(device)[0]
        count = min(count, free // 8)
        side = side if 6 * side * side * dtype.itemsize < free else 2048
    copy_s, product_s = _copy_seconds(count, device, rounds), _product_seconds(side, device, dtype, rounds)
    name = torch.cuda.get_device_name(device) if on_cuda else str(device)
    return Ceilings(name, str(dtype).removeprefix("torch."), 2 * count / copy_s, 2 * side**3 / product_s)


def product_bytes(packed: Packed, tokens: int) -> int:
    """Return the bytes a product with a packed weight must move at least: the weight, x and y, each once."""
    out, in_ = packed.shape
    return packed.size_bytes() + tokens * (out + in_) * packed.tensors["values"].element_size()


def product_flops(kept: int, tokens: int) -> int:
    """Return the operations a product must do at least: a multiplication and an addition per kept weight and token."""
    return 2 * kept * tokens


def _copy_seconds(count: int, device: torch.device, rounds: int) -> float:
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _least_seconds(lambda: target.copy_(source), device, rounds)


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    return _least_seconds(lambda: a @ b, device, rounds)


def _least_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    call()
    least = float("inf")
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        least = min(least, time.perf_counter() - start)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
