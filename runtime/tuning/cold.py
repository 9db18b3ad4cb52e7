"""Weights that no cache still holds when they are read again, as in a model that is larger than the cache.

A layer's weight is read once per forward pass, with all other weights in between. Timing one weight over and over
would find it in the last-level cache and flatter whichever kernel reads more. So calls take turns over copies that
together are larger than that cache twice. Inputs stay warm: in a model the layer before has just written them.
"""

import dataclasses
import functools
import math
import os
from pathlib import Path

import torch

from sparsify_compiler.kernel import Prepared

MOST_COPIES = 256
SHARE_OF_FREE = 0.05
"""The most of the free memory that one kernel's copies may take."""


def cold_copies(prepared: Prepared, device: torch.device) -> tuple[list[Prepared], str]:
    """Return copies of a weight to take in turn, itself first, and a note: "" or why they are not enough to be cold."""
    size = prepared_bytes(prepared)
    count, note = copies(size, last_level_cache(device), free_bytes(device))
    clones = [
        dataclasses.replace(prepared, tensors=tuple(t.clone() for t in prepared.tensors)) for _ in range(count - 1)
    ]
    return [prepared, *clones], note


def copies(size: int, cache: int, free: int) -> tuple[int, str]:
    """Return how many copies of `size` bytes outgrow a cache of `cache` bytes twice within a share of `free` bytes.

    >>> copies(10, 100, 100_000)
    (20, '')
    >>> copies(10, 100, 1000)
    (6, 'weights partly in the cache: too little free memory for copies')
    """
    size = max(size, 1)
    needed = max(1, math.ceil(2 * cache / size))
    count = min(needed, MOST_COPIES, 1 + int(free * SHARE_OF_FREE / size))
    if count == needed:
        return count, ""
    why = f"{MOST_COPIES} copies are the most" if count == MOST_COPIES else "too little free memory for copies"
    return count, f"weights partly in the cache: {why}"


def prepared_bytes(prepared: Prepared) -> int:
    """Bytes of all tensors that a kernel keeps for a weight."""
    return sum(t.numel() * t.element_size() for t in prepared.tensors)


def last_level_cache(device: torch.device) -> int:
    """Return the bytes of a device's last-level cache; 0 where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache() if device.type == "cpu" else 0


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; 0 where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release(device: torch.device) -> None:
    """Hand memory that PyTorch caches back to a CUDA device, after something large was dropped."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


@functools.lru_cache(maxsize=1)
def _cpu_cache() -> int:
    """Read the largest cache that Linux names for the first core; elsewhere 0."""
    sizes = [0]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:  # a virtual machine may name a cache and not let it be read
            continue
        if text[:-1].isdigit() and text[-1:] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)
