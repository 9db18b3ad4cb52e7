"""Compile and launch the CUDA sources in runtime/cuda: through CuPy's NVRTC on a GPU, through a stand-in in tests.

A source may include "ptx.cuh" and other headers beside it; they are put in place here, so that the compiled cache
(CuPy keeps it on disk, by the text of the source) never outlives a change of a header.
"""

import array
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
from sparsify_compiler.runtime.on_device import device_index

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
        index = device_index(device)
        with torch.cuda.device(index):
            function = _load(program, index)
            driver = importlib.import_module("cupy_backends.cuda.api.driver")
            try:
                if not driver.ctxGetCurrent():
                    torch.cuda.mem_get_info(index)  # a thread that never used CUDA: any call of the runtime binds it
                stream = torch.cuda.current_stream(index).cuda_stream
                enqueue(driver, function.ptr, (*grid, threads, 1, 1, shared_bytes, stream), arguments)
            except RuntimeError as error:
                raise KernelError(
                    f"{program.source}: {program.function} cannot be launched with grid {grid}, {threads} threads and "
                    f"{shared_bytes} bytes of shared memory ({_first_error(error)}); choose another kernel"
                ) from error


def enqueue(driver: Any, function: int, shape: tuple[int, ...], arguments: Sequence[Argument]) -> None:
    """Call the driver's launch as `cupy_backends.cuda.api.driver` offers it.

    `shape` is grid, block, bytes of shared memory and stream. CuPy's own `Function` would ask the runtime for the free
    memory at a thread's first launch, which may be within a capture, and takes a Python object an argument.

    Raises:
        KernelError: a number does not fit int32.
    """
    values = array.array("q", [_value(argument) for argument in arguments])
    start, count = values.buffer_info()
    places = array.array("Q", range(start, start + 8 * count, 8))  # where the driver reads each argument from
    driver.launchKernel(function, *shape, places.buffer_info()[0], 0)


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


def _value(argument: Argument) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if argument is None:
        return 0
    if not -(2**31) <= argument < 2**31:
        raise KernelError(f"a kernel was given {argument}, which does not fit int32; split the product")
    return argument


@functools.lru_cache(maxsize=4096)
def _load(program: Program, device: int) -> Any:
    """Compile for the current device, `device`, and let the function take all shared memory that a block may have.

    The limit belongs to the function, not to a launch: one that followed the launches would have to grow with them.
    """
    options = compiler_options(program, torch.cuda.get_device_capability(device))
    try:
        cupy = importlib.import_module("cupy")
        runtime = cupy.cuda.runtime
        most_shared = runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device)
        with cupy.cuda.Device(device):
            module = cupy.RawModule(code=source_text(program.source), options=options, backend="nvrtc")
            kernel = module.get_function(program.function)
            kernel.max_dynamic_shared_size_bytes = most_shared
            return kernel.kernel
    except (RuntimeError, ImportError, OSError) as error:  # OSError: CuPy's cache folder cannot be written
        raise KernelError(_cannot_build(program, options, error)) from error
    except cupy.cuda.compiler.CompileException as error:
        raise KernelError(_cannot_build(program, options, error)) from error


def _cannot_build(program: Program, options: Sequence[str], error: Exception) -> str:
    return (
        f"{program.source}: {program.function} cannot be built for this GPU ({' '.join(options)}): "
        f"{_first_error(error)}; choose another kernel, or update CuPy and NVRTC"
    )


def _first_error(error: Exception) -> str:
    """Return the line that matters: a compiler's log may begin with warnings."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
