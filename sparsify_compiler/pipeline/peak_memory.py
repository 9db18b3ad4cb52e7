"""How much memory a stretch of work held at most."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
"""Linux: writing 5 here sets the process's high-water mark (VmHWM in STATUS) back to what it holds now."""


@dataclass
class Peak:
    """The most bytes that were held, filled in when the stretch ends; `now` reads it before."""

    now: Callable[[], int]
    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the most that was held at once inside: on CUDA what torch had there, else the process's resident size.

    Where the system cannot set its high-water mark back (not Linux), the size is the process's largest so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = Peak(lambda: int(torch.cuda.max_memory_allocated(device)))
    else:
        reset = _reset()
        peak = Peak(lambda: (_high_water() if reset else None) or peak_memory_bytes())
    try:
        yield peak
    finally:
        peak.bytes = peak.now()


def peak_memory_bytes() -> int:
    """Return the largest resident size the process had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset() -> bool:
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    lines = STATUS.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
