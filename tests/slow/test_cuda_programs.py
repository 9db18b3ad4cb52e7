"""Every program of every CUDA kernel compiles as CuPy compiles it, and keeps its registers out of memory."""

import functools
import re

import pytest
import torch
from emulated import CUDA, cluster_size
from recorded import all_programs, build_log

from sparsify_compiler.runtime.launch import CupyLauncher, Program, source_text

MISSING = CupyLauncher().unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
ALLOWED_SPILL = 8
"""Bytes: ptxas gives up a register or two around the main loop where that lets one more block run beside."""


def cupys_log(program: Program, capability: tuple[int, int]) -> str:
    """Compile with the options that CuPy 14 adds to ours (cupy/cuda/compiler.py); ptxas tells what it used."""
    added = ("-ftz=true", f"-arch=sm_{capability[0]}{capability[1]}", "--device-as-default-execution-space")
    return build_log(program, capability, *added, "--ptxas-options=-v")


@functools.lru_cache(maxsize=2)
def programs(dtype: torch.dtype) -> tuple[Program, ...]:
    return tuple(all_programs(dtype, "silu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", sorted(path.name for path in CUDA.glob("*.cu")))
def test_all_programs_compile_without_spilling_or_losing_speed(source: str, dtype: torch.dtype) -> None:
    found = []
    own = [program for program in programs(dtype) if program.source == source]
    assert own
    for program in own:
        plain = cluster_size(program, source_text(program.source)) == (1, 1, 1) and not program.features
        for capability in ((9, 0), (8, 0)) if plain else ((9, 0),):
            log = cupys_log(program, capability)
            spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", log))
            # ptxas numbers its remarks: C7508 and C7510 say that setmaxnreg or overlapping products were given up.
            remarks = re.findall(r"\(C\d+\).*", log)
            if spilled > ALLOWED_SPILL or remarks:
                found.append(f"{spilled} bytes, {remarks} on {capability}: {program}")
    assert not found, "\n".join(found)
