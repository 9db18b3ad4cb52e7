"""How much memory of a device work may take: asked in one place, on CPU and GPU."""

import torch

WORK_SHARE = 16
"""Work on a GPU takes one part in so many of its memory, rounded down to a power of two: 1 GiB of 16 or 24, 8 of 139.
Solvers allocate up to four times that at their peak, so a quarter of the memory."""

LEAST_WORK = 1 << 26
"""Where even 64 MiB are too many, nothing would fit: work goes on at that size, and PyTorch says what is missing."""


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of a GPU that an allocation could get now, or None for any other device.

    What PyTorch's allocator holds without using it counts as free. Asking does not wait for the GPU.
    """
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def work_bytes(device: torch.device, on_cpu: int) -> int:
    """Return the bytes of the matrices to work on at once: `on_cpu`, or on a GPU a share of its memory.

    The share is of all its memory, not of what is free, and is halved while four times it is not free: chunks, and with
    them roundings, are then the same in every run on the same kind of GPU that has room.
    """
    free = free_bytes(device)
    if free is None:
        return on_cpu
    share = torch.cuda.get_device_properties(device).total_memory // WORK_SHARE
    return _power_of_two(share, free // 4)


def _power_of_two(most: int, room: int) -> int:
    """Return the largest power of two up to `most` and to `room`, at least `LEAST_WORK`."""
    return max(1 << max(min(most, room), 1).bit_length() - 1, LEAST_WORK)
