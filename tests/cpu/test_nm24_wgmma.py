"""The sparse warpgroup kernels, run on the CPU by the emulator, against float64; and the shapes they come in."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import CUDA, EmulatedLauncher, EmulationError
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed
from sparsify_compiler.pattern import NM, Pattern
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm24_shapes import SHARED_BYTES, Shape, read_shape, shapes_for
from sparsify_compiler.runtime.nm.nm24_wgmma import Nm24Wgmma
from sparsify_compiler.runtime.oracle import difference

HALF, BRAIN = torch.float16, torch.bfloat16
TWO_OF_FOUR = NM(2, 4)
HOPPER = MatmulSpec(64, 64, HALF, NM(2, 4), 0.5, (1,), torch.device("cuda", 0), (9, 0))

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")


def pack(out: int, in_: int, dtype: torch.dtype = HALF, pattern: Pattern = TWO_OF_FOUR) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out + in_)).to(dtype)
    return format_for(pattern).pack(weight, choose(pattern, weight), pattern)


def compute(
    packed: Packed, x: torch.Tensor, variant: str, bias: torch.Tensor | None, act: Activation | None, seed: int = 1
) -> torch.Tensor:
    kernel = Nm24Wgmma(launcher=EmulatedLauncher(seed=seed))
    prepared = kernel.prepare(packed, spec_for(packed, (x.shape[0],)))
    return kernel.run(dataclasses.replace(prepared, variants=f"1={variant}"), x, bias, act)


# Variant, out, in, tokens, dtype, bias, activation: every size odd somewhere, every way, split, cluster and tile.
CASES: tuple[tuple[str, int, int, int, torch.dtype, bool, Activation | None], ...] = (
    ("few.r64.t8.s1", 1, 1, 1, HALF, True, None),
    ("few.r64.t8.s1", 70, 130, 7, HALF, True, "relu"),
    ("few.r128.t16.s2", 200, 333, 33, BRAIN, True, "gelu"),
    ("few.r256.t32.s4", 264, 1000, 33, HALF, False, "silu"),
    ("few.r512.t64.s8", 520, 576, 16, BRAIN, True, None),
    ("few.r128.t256.s1", 130, 70, 257, HALF, False, None),
    ("few.r256.t128.s1", 40, 700, 130, BRAIN, True, None),
    ("few.r64.t16.s8", 64, 64, 16, HALF, True, None),  # blocks of the cluster without a column
    ("many.r64.t32.s1.c1", 100, 200, 7, BRAIN, True, "relu"),
    ("many.r128.t256.s1.c4", 264, 640, 257, HALF, True, None),
    ("many.r256.t64.s1.c2", 600, 333, 130, BRAIN, False, "gelu"),
    ("many.r512.t32.s1.c2", 33, 70, 33, HALF, True, None),
    ("few.r64.t8.s1", 1091, 8, 17, HALF, True, None),  # more row blocks than run together, and token tiles
    ("many.r64.t32.s1.c4", 1288, 8, 70, HALF, True, "relu"),
    ("direct.r64.t32.s1.c2", 100, 70, 37, HALF, True, "silu"),
    ("direct.r128.t256.s1.c4", 264, 700, 130, BRAIN, True, None),
    ("many.r64.t32.s2.c4", 520, 333, 37, HALF, True, "gelu"),
    ("direct.r128.t64.s4.c2", 264, 700, 65, BRAIN, True, None),
    ("direct.r64.t32.s8.c1", 70, 320, 33, HALF, True, None),  # parts without a column
    ("direct.r256.t128.s1.c1", 300, 130, 130, HALF, False, None),
)


@needs_compiler
@pytest.mark.parametrize(("variant", "out", "in_", "tokens", "dtype", "biased", "act"), CASES)
def test_every_shape_equals_float64_on_odd_sizes(
    variant: str, out: int, in_: int, tokens: int, dtype: torch.dtype, biased: bool, act: Activation | None
) -> None:
    packed, generator = pack(out, in_, dtype), torch.Generator().manual_seed(3)
    x = torch.randn(tokens, in_, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype) if biased else None
    assert difference(compute(packed, x, variant, bias, act), x, unpack(packed), bias, act) is None


@needs_compiler
def test_the_shape_chosen_without_tuning_computes_any_count_of_tokens() -> None:
    packed = pack(72, 132)
    kernel = Nm24Wgmma(launcher=EmulatedLauncher())
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    for tokens in (1, 9, 40):
        x = torch.randn(tokens, 132, generator=torch.Generator().manual_seed(tokens)).to(HALF)
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None
    for x in (torch.randn(9, 264).to(HALF)[:, ::2], torch.randn(132, 9).to(HALF).T):
        assert not x.is_contiguous()
        assert difference(kernel.run(prepared, x), x, unpack(packed)) is None
    assert kernel.run(prepared, torch.empty(0, 132, dtype=HALF)).shape == (0, 72)


@needs_compiler
@pytest.mark.parametrize("pattern", [NM(1, 4), NM(1, 2)], ids=str)
def test_sparser_patterns_are_completed_with_zeros(pattern: Pattern) -> None:
    packed, x = pack(40, 100, HALF, pattern), torch.randn(9, 100).to(HALF)
    assert difference(compute(packed, x, "few.r64.t16.s1", None, None), x, unpack(packed)) is None


@needs_compiler
@pytest.mark.parametrize("variant", ["few.r128.t16.s4", "many.r128.t32.s1.c2", "direct.r64.t32.s1.c2"])
def test_results_do_not_depend_on_the_order_of_threads(variant: str) -> None:
    packed, x = pack(140, 640), torch.randn(20, 640).to(HALF)
    first, second, third = (compute(packed, x, variant, None, None, seed=seed) for seed in (2, 3, 4))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@needs_compiler
@pytest.mark.parametrize("variant", ["few.r64.t16.s1", "many.r64.t32.s1.c1"])
def test_a_corrupted_weight_is_noticed(variant: str) -> None:
    packed, x = pack(64, 256), torch.randn(16, 256).to(HALF)
    values = packed.tensors["values"].clone()
    values[33, 7] += 2
    broken = dataclasses.replace(packed, tensors={**packed.tensors, "values": values})
    assert "differ from float64" in (difference(compute(broken, x, variant, None, None), x, unpack(packed)) or "")


# What a hurried author would write: the line, what becomes of it, and a variant that must fail by it.
MISTAKES = (
    ("nm24_wgmma.cu", "    wait_products<1>();\n", "", "few.r128.t64.s1"),  # a slot is filled while it is read
    ("nm24_wgmma.cu", "    __syncthreads();\n    load", "    load", "few.r128.t64.s1"),
    ("nm24_wgmma.cu", "  wait_products<0>();\n", "", "few.r64.t16.s1"),
    ("nm24_wgmma.cu", "    step(odd);\n", "    step(even);\n", "few.r64.t16.s1"),  # fragments are read late
    ("nm24_wgmma.cu", "wait_copies_for_products<STAGES - 3>", "wait_copies_for_products<STAGES - 2>", "few.r64.t16.s1"),
    ("nm24_tiles.cuh", "  begin_products();\n", "", "few.r64.t16.s1"),
    ("nm24_tiles.cuh", "describe(x + 64)", "describe(x + 32)", "few.r64.t16.s1"),
    ("nm24_wgmma_many.cu", "    wait_products<1>();\n", "", "many.r64.t64.s1.c1"),
    ("nm24_wgmma_many.cu", "    wait_products<1>();\n", "", "direct.r64.t64.s1.c2"),
    ("nm24_wgmma_many.cu", "    wait_barrier(ring.full + slot * 8, round);\n", "", "many.r64.t32.s1.c1"),
    ("nm24_wgmma_many.cu", "if (round > 0) wait_barrier", "if (round > 9) wait_barrier", "many.r64.t256.s1.c2"),
    ("nm24_wgmma_many.cu", "  wait_cluster();  // no block ends", "  // no block ends", "many.r64.t32.s1.c4"),
)


@needs_compiler
@pytest.mark.parametrize(("source", "line", "instead", "variant"), MISTAKES)
def test_the_emulator_notices_a_missing_wait(
    source: str, line: str, instead: str, variant: str, tmp_path: Path
) -> None:
    for path in CUDA.iterdir():
        text = path.read_text()
        if path.name == source:
            assert line in text
            text = text.replace(line, instead)
        (tmp_path / path.name).write_text(text)
    packed, x = pack(256, 1280), torch.randn(48, 1280).to(HALF)
    wrong = False
    for seed in range(1, 7):
        kernel = Nm24Wgmma(launcher=EmulatedLauncher(seed=seed, folder=tmp_path))
        prepared = dataclasses.replace(kernel.prepare(packed, spec_for(packed, (48,))), variants=f"1={variant}")
        try:
            wrong = wrong or difference(kernel.run(prepared, x), x, unpack(packed)) is not None
        except EmulationError:
            wrong = True
        if wrong:
            break
    assert wrong


def test_it_says_what_it_cannot_run() -> None:
    kernel = Nm24Wgmma(launcher=EmulatedLauncher())

    def reason(**changes: object) -> str:
        return kernel.rejects(dataclasses.replace(HOPPER, **changes)) or ""

    if shutil.which("g++"):
        assert reason() == ""
        assert reason(run=8, pattern=NM(1, 4)) == ""
    assert reason(pattern=NM(4, 8)) == "runs 2:4, 1:4 and 1:2; found 4:8"
    assert "start again after 3 columns" in reason(run=3)
    assert "found float32" in reason(dtype=torch.float32)
    assert "runs on cuda; found cpu" in reason(device=torch.device("cpu"))
    assert "9.0 exactly (Hopper's warpgroup products); found 10.0" in reason(capability=(10, 0))
    assert "found an unknown one" in reason(capability=None)


def test_shapes_fit_the_gpu_and_their_names_read_back() -> None:
    for out, in_, tokens in ((14336, 4096, 1), (14336, 4096, 64), (4096, 14336, 512), (7, 5, 3), (4096, 4096, 8192)):
        shapes = shapes_for(out, in_, tokens)
        assert shapes
        for shape in shapes:
            assert read_shape(shape.name) == shape
            assert shape.shared_bytes <= SHARED_BYTES
            assert 3 <= shape.stages <= 8
            assert shape.slot_bytes * shape.stages <= shape.shared_bytes
            assert shape.tiles * shape.tokens <= 256
    assert Nm24Wgmma().variants(HOPPER, 0)
    names = (
        "",
        "few.r64.t8.s3",
        "direct.r512.t64.s1.c1",
        "few.r512.t256.s1",
        "many.r64.t8.s1.c1",
        "few.r064.t8.s1",
        "many.r64.t32.s1",
    )
    for name in names:
        with pytest.raises(KernelError, match="no variant"):
            read_shape(name)


def test_predicted_times_follow_the_limits() -> None:
    # 14336 x 4096 at 1 token: 66 MB of weights at 4 TB/s, and a launch.
    least = 14336 // 16 * 64 * 1152 / 4.0e6
    assert least < shapes_for(14336, 4096, 1)[0].predicted_us(14336, 4096, 1) < least + 3
    # 8192 tokens: 3584 blocks in 28 rounds, 64 chunks of 96 KiB through shared memory each, and the sums.
    shape = Shape("direct", 128, 256, 1, 4)
    clocks = 28 * (64 * 3 * 32768 / 128 + 2 * 128 * 256 * 4 / 128)
    assert shape.predicted_us(14336, 4096, 8192) == pytest.approx(clocks / 1750 + 5.0 + 2 * 8192 * 4096 * 2 / 4e6)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile for sm_90a")
@pytest.mark.parametrize("name", ["few.r128.t64.s2", "direct.r128.t256.s1.c4"])
def test_the_sources_compile_for_hopper_without_spills_or_serialised_products(name: str, tmp_path: Path) -> None:
    shape = read_shape(name)
    source = "nm24_wgmma_many" if shape.many else "nm24_wgmma"
    defines = [f"-D{key}={value}" for key, value in (("BF16", 1), *shape.defines())]
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", *defines]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.cubin"), str(CUDA / f"{source}.cu")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
