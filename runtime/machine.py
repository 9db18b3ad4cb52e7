"""What a figure was measured on: the processor, the GPU and its driver, and the versions of every library in use."""

import functools
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

LIBRARIES = ("torch", "cupy-cuda13x", "cupy-cuda12x", "triton", "numba", "numpy", "onnxruntime", "onnxruntime-gpu")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CPU_FILE = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> tuple[tuple[str, str], ...]:
    """Return (fact, value) pairs: the device first, then the processor, Python and the versions that are installed."""
    facts = [("device", str(device))]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts += [
            ("GPU", properties.name),
            ("compute capability", f"{properties.major}.{properties.minor}"),
            ("GPU memory", f"{properties.total_memory / 2**30:.0f} GiB"),
            ("driver", driver()),
            ("CUDA of torch", str(torch.version.cuda)),
        ]
    facts += [
        ("processor", processor()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("python", platform.python_version()),
    ]
    return (*facts, *versions(LIBRARIES).items())


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, by name, in the order given."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.lru_cache(maxsize=1)
def driver() -> str:
    """Return the version of NVIDIA's driver where Linux shows it, else the CUDA version it offers, as PyTorch asks."""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", _text(DRIVER_FILE))
    if found:
        return found[1]
    if torch.version.cuda is None:
        return "unknown"
    return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]  # only in CUDA builds


@functools.lru_cache(maxsize=1)
def processor() -> str:
    """Return the processor's own name where Linux shows it, else what Python knows of it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(CPU_FILE), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _text(path: Path) -> str:
    """Return a file's text, "" where it cannot be read: another system, or a container without it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
