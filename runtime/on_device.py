"""The current device and stream, for libraries called by address. On a CPU, where tests run stand-ins: 0 and none."""

import contextlib
from contextlib import AbstractContextManager

import torch


def device_index(device: torch.device) -> int:
    """Return the number of a CUDA device, that of the current one where it has none; 0 for others."""
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def guard(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current CUDA device meanwhile."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def stream_address(device: torch.device) -> int:
    """Return the address of PyTorch's current stream on `device`; 0 for a CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
