"""Compile and launch the CUDA sources in runtime/cuda: through CuPy's NVRTC on a GPU, through a stand-in in tests.

A source may include "ptx.cuh" and other headers beside it; they are put in place here, so that the compiled cache
(CuPy keeps it on disk, by the text of the source) never outlives a change of a header.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError

Argument = Tensor | int | None
"""A kernel's argument: a tensor (its address), a whole number (int32) or None (a null address)."""

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """One function of one CUDA source, compiled with `defines`.

    `source` is a file in runtime/cuda, `function` an extern "C" __global__ function in it. `features` asks for the
    instructions of one architecture only ("a", as in sm_90a, which wgmma needs).
    """

    source: str
    function: str
    defines: tuple[tuple[str, int], ...] = ()
    features: str = ""


class Launcher(Protocol):
    """What runs a program."""

    def unavailable(self) -> str | None:
        """Return None, or why nothing can be compiled or launched here and what to install."""
        ...

    def launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """Put the function on the current stream of `device`: `grid` blocks of `threads`, dynamic shared memory.

        Raises:
            KernelError: the source does not compile, or the driver refused the launch.
        """
        ...


@dataclass(frozen=True)
class CupyLauncher:
    """Compile with NVRTC through CuPy, launch on PyTorch's current stream. Capturable in a CUDA graph once compiled."""

    def unavailable(self) -> str | None:
        """Name the missing package with its install line, or return None."""
        return _missing()

    def launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """Launch; see `Launcher`."""
        index = torch.cuda.current_device() if device.index is None else device.index
        numpy = importlib.import_module("numpy")
        values = tuple(_value(argument, numpy) for argument in arguments)
        with torch.cuda.device(index):
            function = _load(program, shared_bytes, index)
            stream = _stream(torch.cuda.current_stream(index).cuda_stream)
            function(grid, (threads, 1, 1), values, shared_mem=shared_bytes, stream=stream)


@functools.lru_cache(maxsize=256)
def source_text(name: str) -> str:
    """Return a source of runtime/cuda with the headers it includes put in place."""
    folder = resources.files("sparsify_compiler.runtime") / "cuda"
    text = (folder / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: source_text(match[1]), text)


def compiler_options(program: Program, capability: tuple[int, int]) -> tuple[str, ...]:
    """Return the options for NVRTC: the language, the architecture and the defines."""
    architecture = f"{capability[0]}{capability[1]}{program.features}"
    defines = (f"-D{name}={value}" for name, value in program.defines)
    return ("-std=c++17", f"--gpu-architecture=sm_{architecture}", *defines)


@dataclass(frozen=True)
class _Stream:
    """A stream by its address, in the protocol that CuPy reads foreign streams by."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


@functools.lru_cache(maxsize=1)
def _missing() -> str | None:
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'sparsify-compiler[cuda]' (CUDA 13), or [cuda12]"
    nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    try:
        nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"CuPy finds no NVRTC ({reason}): pip install nvidia-cuda-nvrtc (CUDA 13), or nvidia-cuda-nvrtc-cu12"
    return None


def _value(argument: Argument, numpy: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else numpy.int32(argument)


@functools.lru_cache(maxsize=4096)
def _load(program: Program, shared_bytes: int, device: int) -> Any:
    """Compile for the current device, `device`; a kernel that asks for more shared memory than 48 KiB says so once."""
    cupy = importlib.import_module("cupy")
    options = compiler_options(program, torch.cuda.get_device_capability(device))
    with cupy.cuda.Device(device):
        try:
            module = cupy.RawModule(code=source_text(program.source), options=options, backend="nvrtc")
            kernel = module.get_function(program.function)
            if shared_bytes > 48 * 1024:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            return kernel.kernel
        except (RuntimeError, cupy.cuda.compiler.CompileException) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise KernelError(
                f"{program.source}: {program.function} cannot be built for this GPU "
                f"({' '.join(options)}): {lines[0] if lines else type(error).__name__}"
            ) from error


@functools.lru_cache(maxsize=1024)
def _stream(address: int) -> Any:
    return importlib.import_module("cupy").cuda.Stream.from_external(_Stream(address))
