"""What a figure was measured on: the processor, the GPU and its driver, and the versions of every library in use."""

import importlib.metadata
import os
import platform
import re
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
            ("driver", _driver()),
            ("CUDA of torch", str(torch.version.cuda)),
        ]
    facts += [
        ("processor", _processor()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("python", platform.python_version()),
    ]
    return (*facts, *((name, found) for name in LIBRARIES if (found := _version(name))))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else "unknown"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_FILE.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
