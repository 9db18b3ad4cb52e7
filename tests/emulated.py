"""Run the CUDA sources of runtime/cuda on the CPU, strictly: tests/emulator says what a GPU would do, g++ compiles it.

What it catches, with the block, the thread and the reason: addresses outside of every tensor and of shared memory,
misaligned ones, missing barriers and missing waits for background copies (memory not yet valid reads as NaN), lanes
that do not meet in a collective, deadlocks, local arrays indexed past their end, overflowing int indices, arguments of
the wrong kind. Tensors that a kernel takes as non-const pointers are filled with 0xFF first, so what it does not write
shows.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.launch import Argument, Program

EMULATOR = Path(__file__).resolve().parent / "emulator"
CUDA = Path(__file__).resolve().parents[1] / "runtime" / "cuda"
MOST_SHARED_BYTES = 227 * 1024  # of one block, capability 9.0
MOST_CLUSTER = 8

_INCLUDE = re.compile(r'#include "([\w.]+)"')
_CLUSTER = re.compile(r"__cluster_dims__\(\s*(\w+)\s*,\s*(\w+)\s*,\s*(\w+)\s*\)")
_SANITIZE = "alignment,null,bounds,shift-exponent,signed-integer-overflow,integer-divide-by-zero"
_FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-stack-protector", "-fcf-protection=none")
# Libraries of many kernels live in one process: nothing of one may be taken for the same name of another. All use the
# one library of the machine, and so its stacks.
_ALONE = ("-fvisibility=hidden", "-fno-gnu-unique")
_KERNEL_FLAGS = (
    *_FLAGS,
    *_ALONE,
    *("-fno-strict-aliasing", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern", f"-fsanitize={_SANITIZE}"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused", "-Werror=uninitialized", "-Werror=return-type"),
)


class EmulationError(Exception):
    """A kernel did what a GPU would not survive, or would answer with a wrong result."""


@dataclass(frozen=True)
class EmulatedLauncher:
    """A `Launcher` for CPU tensors. `seed` draws the order of blocks (0: ascending) and of threads.

    `folder` holds the sources; headers that tests/emulator has too are taken from there. A kernel's cluster is what its
    `__cluster_dims__(a, b, c)` says, each a number or the name of one of the program's defines.
    """

    seed: int = 0
    folder: Path = CUDA

    def unavailable(self) -> str | None:
        """Return None, or that there is no compiler."""
        return None if shutil.which("g++") else "no g++ here: install one to run CUDA sources on the CPU"

    def launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """Run all blocks and return when they are done.

        Raises:
            KernelError: the source does not compile, or no GPU would take the launch.
            EmulationError: the kernel went wrong; says where and why.
        """
        text = emulated_text(program, self.folder)
        cluster = cluster_size(program, text)
        if reason := _misfit(grid, threads, shared_bytes, cluster, arguments, device):
            raise KernelError(f"{program.source}: {program.function} cannot be launched: {reason}")
        function = _load(program, text)
        error = ctypes.create_string_buffer(1024)
        launch = _Launch(grid, cluster, threads, shared_bytes, self.seed, arguments, error)
        if function(ctypes.byref(launch)):
            defines = " ".join(f"{name}={value}" for name, value in program.defines)
            raise EmulationError(f"{program.source}: {program.function} ({defines}): {error.value.decode()}")


def emulated_text(program: Program, folder: Path = CUDA) -> str:
    """Return what g++ compiles: the emulator, the defines, the source with its headers, and the way in."""
    defines = "".join(f"#define {name} {value}\n" for name, value in program.defines)
    source = _source(program.source, folder)
    return (
        f'#include "cuda.h"\n{defines}{source}\n'
        f'extern "C" __attribute__((visibility("default"))) int emulate_kernel(const emulator::Launch* launch) {{\n'
        f"  typedef emulator::Entry<{program.function}> Entry;\n"
        f"  return emulator::run(*launch, Entry::invoke, Entry::kinds, Entry::count);\n}}\n"
    )


def _source(name: str, folder: Path) -> str:
    """Put included headers in place, with the line numbers of each file."""
    own = EMULATOR / name
    path = own if own.exists() else folder / name if (folder / name).exists() else CUDA / name
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if match := _INCLUDE.fullmatch(line):
            lines += [_source(match[1], folder), f'#line {number + 1} "{name}"']
        elif line.strip() == "#pragma once":
            lines += [f"// {line}"]
        else:
            lines += [line]
    return "\n".join(lines)


def cluster_size(program: Program, text: str) -> tuple[int, int, int]:
    """Read the blocks of a cluster along each side of the grid from the source; (1, 1, 1) where it names none."""
    found = set(_CLUSTER.findall(text))
    if not found:
        return 1, 1, 1
    defines = dict(program.defines)
    words = found.pop()
    unknown = [word for word in words if not word.isdigit() and word not in defines]
    if found or unknown:
        raise KernelError(f"{program.source}: __cluster_dims__ must be written once, of numbers and defines; {unknown}")
    x, y, z = (int(word) if word.isdigit() else defines[word] for word in words)
    return x, y, z


def _misfit(
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    cluster: tuple[int, int, int],
    arguments: Sequence[Argument],
    device: torch.device,
) -> str | None:
    most = (2**31 - 1, 65535, 65535)
    if any(not 1 <= size <= limit for size, limit in zip(grid, most, strict=True)):
        return f"grid {grid} must be within 1 and {most}"
    if any(size % part for size, part in zip(grid, cluster, strict=True)):
        return f"grid {grid} is not made of whole clusters {cluster}"
    if cluster[0] * cluster[1] * cluster[2] > MOST_CLUSTER:
        return f"a cluster has at most {MOST_CLUSTER} blocks; found {cluster}"
    if not 1 <= threads <= 1024:
        return f"1 to 1024 threads a block; found {threads}"
    if not 0 <= shared_bytes <= MOST_SHARED_BYTES:
        return f"at most {MOST_SHARED_BYTES} bytes of shared memory; found {shared_bytes}"
    if device.type != "cpu":
        return f"the emulator runs on the CPU; found {device}"
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.device.type != "cpu":
            return f"argument {place} is on {argument.device}"
        if isinstance(argument, int) and not -(2**31) <= argument < 2**31:
            return f"argument {place} is {argument}, which no int32 holds"
    return None


class _Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))


class _Memory(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    """`emulator::Launch` of tests/emulator/machine.h."""

    _fields_ = (
        ("grid", _Index),
        ("cluster", _Index),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("values", ctypes.POINTER(ctypes.c_uint64)),
        ("tensor", ctypes.POINTER(ctypes.c_int)),
        ("extents", ctypes.POINTER(ctypes.c_uint64)),
        ("memory_count", ctypes.c_uint32),
        ("memories", ctypes.POINTER(_Memory)),
        ("error", ctypes.c_void_p),
    )

    def __init__(
        self,
        grid: tuple[int, int, int],
        cluster: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        seed: int,
        arguments: Sequence[Argument],
        error: "ctypes.Array[ctypes.c_char]",
    ) -> None:
        count = len(arguments)
        values = (ctypes.c_uint64 * count)()
        tensor = (ctypes.c_int * count)()
        extents = (ctypes.c_uint64 * count)()
        ranges = []
        for place, argument in enumerate(arguments):
            tensor[place] = int(not isinstance(argument, int))
            if isinstance(argument, int):
                values[place] = argument % 2**64
            elif isinstance(argument, Tensor):
                values[place], extents[place] = argument.data_ptr(), _extent(argument)
                tensor[place] = 2 if argument.is_contiguous() else 1
                ranges.append((argument.data_ptr(), extents[place]))
        merged = _merge(ranges)
        memories = (_Memory * max(len(merged), 1))(*(_Memory(start, stop - start) for start, stop in merged))
        super().__init__(
            _Index(*grid), _Index(*cluster), threads, shared_bytes, seed, count, values, tensor, extents,
            len(merged), memories, ctypes.addressof(error),
        )  # fmt: skip


def _extent(tensor: Tensor) -> int:
    """Count the bytes from a tensor's address to the end of its last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges (address, bytes) that overlap, as (start, stop): two views of one tensor stay views of one memory."""
    merged: list[tuple[int, int]] = []
    for start, size in sorted(pair for pair in ranges if pair[1]):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], start + size))
        else:
            merged.append((start, start + size))
    return merged


@functools.lru_cache(maxsize=512)
def _load(program: Program, text: str) -> "ctypes._CFuncPtr":
    """Compile once for each text, on disk as well. PyDLL keeps the interpreter's lock: one launch at a time."""
    library = ctypes.PyDLL(str(_build(text, f"{program.source}: {program.function}")))
    function = library.emulate_kernel
    function.restype = ctypes.c_int
    return function


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sparsify-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.lru_cache(maxsize=1)
def _machine() -> tuple[Path, str]:
    """Build the machine itself once; return its library and a hash of all it is made of."""
    sources = sorted(EMULATOR.glob("*.cpp"))
    texts = [path.read_bytes() for path in (*sources, *sorted(EMULATOR.glob("*.h")))]
    digest = hashlib.sha256(b"".join([*texts, repr(_KERNEL_FLAGS).encode()])).hexdigest()[:24]
    target = _cache() / f"machine-{digest}.so"
    if not target.exists():
        _compile(["g++", *_FLAGS, "-shared", *map(str, sources)], target, "the emulator's machine")
    return target, digest


def _build(text: str, what: str) -> Path:
    machine, digest = _machine()
    name = hashlib.sha256((text + digest).encode()).hexdigest()[:32]
    target = _cache() / f"{name}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.cpp"
            source.write_text(text, encoding="utf-8")
            compiled = Path(folder) / "kernel.o"
            _compile(["g++", *_KERNEL_FLAGS, f"-I{EMULATOR}", "-c", str(source)], compiled, what)
            # Without -fsanitize here: the machine has the functions that the checks call.
            _compile(["g++", "-shared", "-Wl,-Bsymbolic", str(compiled), str(machine)], target, what)
    return target


def _compile(command: list[str], target: Path, what: str) -> None:
    """Write `target` whole or not at all, as other processes may be building it too."""
    handle, name = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    done = subprocess.run([*command, "-o", name], capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(name)
        lines = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise KernelError(f"{what} does not compile for the emulator: {chr(10).join(lines[:8]) or done.stderr[-800:]}")
    os.replace(name, target)
