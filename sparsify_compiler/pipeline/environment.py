"""Where a run takes place: machine, library versions, command line."""

import platform
import shlex
import sys
from pathlib import Path

import torch

from sparsify_compiler.runtime.machine import versions
from sparsify_compiler.version import __version__

LIBRARIES = (
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "cupy-cuda13x",
    "cupy-cuda12x",
)


def environment(device: torch.device) -> dict[str, str]:
    """Name the machine and the library versions a figure depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    found["sparsify-compiler"] = __version__  # not the metadata's: an editable install leaves those as they were
    found |= versions(LIBRARIES)
    found["device"] = device_name(device)
    found["threads"] = str(torch.get_num_threads())
    return found


def device_name(device: torch.device) -> str:
    """Name the accelerator, or the processor, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.processor() or platform.machine()}"


def command(function: str = "compile") -> str:
    """Return the command line that runs, or the function's name where a program of the user's own does."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    as_module = program.parts[-2:] == ("sparsify_compiler", "__main__.py")
    if program.name == "sparsify-compiler" or as_module:
        return shlex.join(["sparsify-compiler", *sys.argv[1:]])
    return f"sparsify_compiler.{function}(...)"
