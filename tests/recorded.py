"""What the CUDA kernels would launch: every program of every variant, for tests that compile them.

A new kernel is one line in `cuda_kernels`.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from kernels import choose

from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.block.few_tokens import BlockDecode
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.launch import Argument, Launcher, Program, compiler_options, source_text
from sparsify_compiler.runtime.nm.nm24 import Nm24Mma
from sparsify_compiler.runtime.nm.nm24_wgmma import Nm24Wgmma
from sparsify_compiler.runtime.nm.nm_gemv import NmGemv
from sparsify_compiler.runtime.nm.nm_mma import NmMma
from sparsify_compiler.runtime.unstructured.bitmap_gemv import BitmapGemv
from sparsify_compiler.runtime.unstructured.expand import ExpandDense

HOPPER = (9, 0)
TOKENS = (1, 8, 16, 32, 64, 700)


def cuda_kernels(launcher: Launcher) -> tuple[tuple[Kernel, Pattern], ...]:
    """Return every kernel that launches CUDA sources, each with the patterns to compile it for."""
    return (
        (Nm24Mma(launcher=launcher, capability=HOPPER), NM(2, 4)),
        (Nm24Wgmma(launcher=launcher), NM(2, 4)),
        (NmGemv(launcher=launcher), NM(16, 32)),
        (NmGemv(launcher=launcher), NM(1, 8)),
        (NmMma(launcher=launcher), NM(4, 8)),
        (NmMma(launcher=launcher), NM(8, 32)),
        (BitmapGemv(launcher=launcher), Unstructured()),
        (BlockDecode(launcher=launcher), Block(128, 128)),
        (BlockDecode(launcher=launcher), Block(16, 16)),
        (ExpandDense(launcher=launcher), Unstructured()),
    )


@dataclass(frozen=True)
class Launch:
    """What a launcher was asked for, but for the arguments."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class RecordingLauncher:
    """A launcher that launches nothing and keeps what it was asked for."""

    launches: list[Launch] = field(default_factory=list)

    def unavailable(self) -> str | None:
        """None: it can always record."""
        return None

    def launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """Keep the request."""
        self.launches.append(Launch(program, grid, threads, shared_bytes))


def programs_of(
    kernel: Kernel, pattern: Pattern, dtype: torch.dtype, activation: Activation | None, launcher: RecordingLauncher
) -> list[Program]:
    """Return what `kernel` launches for `TOKENS`, in every variant it offers on capability 9.0, without repeats."""
    out, in_ = 256, 4096
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = format_for(pattern).pack(weight, choose(pattern, weight), pattern)
    spec = MatmulSpec(out, in_, dtype, pattern, 0.5, TOKENS, torch.device("cpu"), HOPPER)
    prepared = kernel.prepare(packed, spec)
    large = dataclasses.replace(spec, out=14336)  # what a real layer would choose from; any variant runs any weight
    launcher.launches.clear()
    for tokens in TOKENS:
        for name in kernel.variants(large, tokens):
            chosen = dataclasses.replace(prepared, variants=f"{tokens}={name}" if name else "")
            kernel.run(chosen, torch.zeros(tokens, in_, dtype=dtype), None, activation)
    return list(dict.fromkeys(launch.program for launch in launcher.launches))


def all_programs(dtype: torch.dtype, activation: Activation | None = None) -> list[Program]:
    """Return the programs of all kernels."""
    launcher = RecordingLauncher()
    return [
        p
        for kernel, pattern in cuda_kernels(launcher)
        for p in programs_of(kernel, pattern, dtype, activation, launcher)
    ]


def build_log(program: Program, capability: tuple[int, int], *more: str) -> str:
    """Compile a program with NVRTC for a GPU, with `more` options; return what it said, or fail the test."""
    nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    unit = nvrtc.createProgram(source_text(program.source), program.source, [], [])
    try:
        nvrtc.compileProgram(unit, (*compiler_options(program, capability), *more))
        assert nvrtc.getCUBIN(unit)
        log: str = nvrtc.getProgramLog(unit)
    except nvrtc.NVRTCError:
        pytest.fail(f"{program} for {capability}: {nvrtc.getProgramLog(unit)}")
    finally:
        nvrtc.destroyProgram(unit)
    return log
