"""Every CUDA source compiles, as the GPUs will be given it: a few programs of each function here, all in tests/slow.

The programs are those that tests/recorded.py finds by running every kernel with a launcher that only writes down what
it should launch. A program is compiled for capability 9.0 and, if it uses neither clusters nor the instructions of one
architecture only, for 8.0.
"""

import functools

import pytest
import torch
from emulated import CUDA, cluster_size
from recorded import all_programs, build_log

from sparsify_compiler.runtime.launch import CupyLauncher, Program, source_text

MISSING = CupyLauncher().unavailable()
needs_nvrtc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
FUNCTIONS = (
    "nm24_direct",
    "nm24_staged",
    "nm24_wgmma",
    "nm24_wgmma_many",
    "tile_tokens",
    "nm_gemv",
    "nm_mma",
    "bitmap_gemv",
    "block_decode",
    "expand",
)


@functools.lru_cache(maxsize=4)
def programs(dtype: torch.dtype) -> tuple[Program, ...]:
    return tuple(all_programs(dtype, "gelu"))


def capabilities(program: Program) -> list[tuple[int, int]]:
    plain = cluster_size(program, source_text(program.source)) == (1, 1, 1) and not program.features
    return [(9, 0), (8, 0)] if plain else [(9, 0)]


def test_every_source_and_function_is_launched_by_some_kernel() -> None:
    found = programs(torch.float16)
    assert {program.source for program in found} == {path.name for path in CUDA.glob("*.cu")}
    assert {program.function for program in found} == set(FUNCTIONS)


@needs_nvrtc
@pytest.mark.parametrize("function", FUNCTIONS)
def test_sources_compile_for_the_gpus_they_are_launched_on(function: str) -> None:
    own = [program for program in programs(torch.float16) if program.function == function]
    brain = [program for program in programs(torch.bfloat16) if program.function == function]
    plain = [program for program in own if len(capabilities(program)) == 2]
    for program in dict.fromkeys((own[0], own[-1], brain[len(brain) // 2], *plain[:1])):
        for capability in capabilities(program):
            build_log(program, capability)


@needs_nvrtc
def test_a_source_that_does_not_compile_is_noticed() -> None:
    program = Program("nm24.cu", "nm24_direct")  # without its defines
    with pytest.raises(pytest.fail.Exception, match="TILES"):
        build_log(program, (9, 0))
