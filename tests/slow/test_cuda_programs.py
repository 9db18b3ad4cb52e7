"""Every program of every CUDA kernel compiles with nvcc, and keeps its registers out of memory."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import CUDA, cluster_size
from recorded import all_programs

from sparsify_compiler.runtime.launch import Program, source_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of the CUDA toolkit 12 or later"),
]


def spilled_bytes(program: Program, architecture: str, folder: Path) -> int:
    defines = [f"-D{name}={value}" for name, value in program.defines]
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", *defines]
    target = ["-o", str(folder / "out.cubin"), str(CUDA / program.source)]
    done = subprocess.run([*command, *target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{program}\n{done.stderr}"
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", done.stderr))


@functools.lru_cache(maxsize=2)
def programs(dtype: torch.dtype) -> tuple[Program, ...]:
    return tuple(all_programs(dtype, "silu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", sorted(path.name for path in CUDA.glob("*.cu")))
def test_all_programs_compile_without_spilling(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    own = [program for program in programs(dtype) if program.source == source]
    assert own
    for program in own:
        plain = cluster_size(program, source_text(program.source)) == (1, 1, 1) and not program.features
        for architecture in ("sm_90a", "sm_80") if plain else ("sm_90a",):
            if spilled := spilled_bytes(program, architecture, tmp_path):
                found.append(f"{spilled} bytes on {architecture}: {program}")
    assert not found, "\n".join(found)
