"""The n:m tensor-core kernel, run by the emulator, against float64."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import CUDA, EmulatedLauncher
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.runtime.formats import NMFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm_mma import NmMma
from sparsify_compiler.runtime.oracle import difference

needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ for the emulator")
KERNEL = NmMma(launcher=EmulatedLauncher())
PATTERNS = tuple(NM(keep, of) for keep, of in ((4, 8), (2, 8), (8, 16), (4, 16), (16, 32), (8, 32)))
SPEC = MatmulSpec(14336, 4096, torch.float16, NM(4, 8), 0.5, (1, 8), torch.device("cuda", 0), (9, 0))


def packed_weight(pattern: NM, out: int, in_: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_, generator=generator).to(dtype)
    return NMFormat().pack(weight, pattern.select(weight.abs().double(), 0.5), pattern)


def prepare(packed: Packed, variant: str = "") -> Prepared:
    prepared = KERNEL.prepare(packed, spec_for(packed, (1,)))
    return dataclasses.replace(prepared, variants=f"1={variant}" if variant else "")


def inputs(tokens: int, packed: Packed) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, packed.shape[1], generator=generator).to(packed.tensors["values"].dtype)


def check(packed: Packed, tokens: int, variant: str = "", activation: Activation | None = None) -> None:
    x = inputs(tokens, packed)
    bias = inputs(1, dataclasses.replace(packed, shape=(1, packed.shape[0])))[0] if tokens % 2 else None
    y = KERNEL.run(prepare(packed, variant), x, bias, activation)
    assert difference(y, x, unpack(packed), bias, activation) is None, (packed.pattern, packed.shape, tokens, variant)


@needs_gcc
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_products_of_odd_shapes_are_right(pattern: NM, dtype: torch.dtype) -> None:
    for out, in_, tokens in ((1, 32, 1), (37, 297, 5), (130, 520, 8)):
        check(packed_weight(pattern, out, in_, dtype), tokens)


@needs_gcc
def test_all_token_counts_up_to_17_and_some_beyond_are_right() -> None:
    packed = packed_weight(NM(8, 16), 40, 136)
    for tokens in (*range(18), 31, 33, 64, 65, 130):
        check(packed, tokens)


@needs_gcc
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8), NM(5, 8), NM(2, 32), NM(30, 32)], ids=str)
def test_other_patterns_of_these_groups_run_too(pattern: NM) -> None:
    check(packed_weight(pattern, 20, 150), 3)


@needs_gcc
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_at_either_end_of_their_group_and_alternating_are_found(pattern: NM) -> None:
    places = torch.arange(pattern.of)
    masks = torch.stack(
        (places < pattern.keep, places >= pattern.of - pattern.keep, places * pattern.keep % pattern.of < pattern.keep)
    )
    keep = masks.repeat(7, 256 // pattern.of)
    weight = torch.randn(keep.shape, generator=torch.Generator().manual_seed(3)).half()
    check(NMFormat().pack(weight, keep, pattern), 3)


@needs_gcc
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bias_and_activation_are_fused(activation: Activation) -> None:
    packed = packed_weight(NM(4, 8), 24, 128)
    check(packed, 9, activation=activation)
    check(packed, 8, activation=activation)


@needs_gcc
@pytest.mark.parametrize(
    "variant",
    [
        "tiles1.warps4.chunks1.split1.stages2",
        "tiles1.warps7.chunks1.split2.stages3",
        "tiles2.warps2.chunks2.split4.stages4",
        "tiles4.warps1.chunks4.split8.stages3",
        "tiles2.warps2.chunks8.split1.stages3",
    ],
)
def test_every_way_to_share_rows_and_columns_is_right(variant: str) -> None:
    for pattern, out, in_ in ((NM(16, 32), 150, 1300), (NM(4, 8), 33, 72)):
        for tokens in (1, 20):
            check(packed_weight(pattern, out, in_), tokens, variant)


@needs_gcc
def test_results_repeat_to_the_bit_in_any_order_of_blocks_and_threads() -> None:
    packed = packed_weight(NM(8, 32), 50, 600)
    prepared, x = prepare(packed, "tiles1.warps2.chunks2.split2.stages3"), inputs(7, packed)
    results = [NmMma(launcher=EmulatedLauncher(seed=seed)).run(prepared, x) for seed in (0, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_gcc
def test_infinite_and_missing_inputs_reach_only_their_own_token() -> None:
    packed = packed_weight(NM(4, 8), 20, 256)
    prepared, x = prepare(packed), inputs(10, packed)
    clean = KERNEL.run(prepared, x)
    x[3, 5], x[9, 200] = float("nan"), float("inf")
    y = KERNEL.run(prepared, x)
    others = [token for token in range(10) if token not in (3, 9)]
    assert torch.equal(y[others], clean[others])
    assert y[3].isnan().all()


@needs_gcc
def test_weights_cut_by_the_taps_of_a_convolution_run() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(18, 180, generator=generator).half()
    pattern = NM(4, 8)
    packed = NMFormat().pack(weight, pattern.select(weight.abs().double(), 0.5, 20), pattern, 20)
    check(packed, 5)


@needs_gcc
def test_inputs_of_any_strides_give_the_same_result() -> None:
    packed = packed_weight(NM(4, 8), 16, 64)
    prepared, base = prepare(packed), inputs(70, packed)
    for x in (base[::2], base.T[:64, :64], base[:1].expand(5, 64), torch.randn(4, 130).half()[:, 1:65]):
        assert difference(KERNEL.run(prepared, x), x, unpack(packed)) is None


@needs_gcc
def test_one_corrupted_value_is_found_by_the_comparison() -> None:
    packed = packed_weight(NM(8, 16), 16, 128)
    values = packed.tensors["values"].clone()
    values.view(-1)[values.numel() // 2] += 2
    broken = dataclasses.replace(packed, tensors={**packed.tensors, "values": values})
    x = inputs(4, packed)
    assert "differ from float64" in (difference(KERNEL.run(prepare(broken), x), x, unpack(packed)) or "")


def test_it_says_what_it_cannot_run() -> None:
    assert KERNEL.rejects(SPEC) is None
    for change, words in (
        ({"pattern": NM(2, 3)}, "found 2:3"),
        ({"pattern": NM(32, 64)}, "found 32:64"),
        ({"pattern": Unstructured()}, "found unstructured"),
        ({"dtype": torch.float32}, "found float32"),
        ({"device": torch.device("cpu")}, "found cpu"),
        ({"capability": (7, 5)}, "found 7.5"),
    ):
        assert words in (KERNEL.rejects(dataclasses.replace(SPEC, **change)) or "")


def test_variants_of_other_kernels_and_of_larger_gpus_are_refused() -> None:
    packed = packed_weight(NM(4, 8), 16, 128)
    for name in ("rows1.split2", "tiles1.warps8.chunks1.split3.stages4", "tiles4.warps16.chunks2.split1.stages8"):
        with pytest.raises(KernelError, match="cannot run variant"):
            KERNEL.run(prepare(packed, name), inputs(2, packed))


def test_variants_start_with_the_kernels_own_choice_and_fit_the_gpu() -> None:
    for capability in ((8, 0), (8, 9), (9, 0)):
        for tokens in (1, 8, 16, 32, 64, 4096):
            for pattern in PATTERNS:
                spec = dataclasses.replace(SPEC, capability=capability, pattern=pattern)
                names = KERNEL.variants(spec, tokens)
                assert 1 <= len(names) <= 40
                assert len(set(names)) == len(names)
                assert all(re.fullmatch(r"[\w.\-]+", name) for name in names)
                if capability < (9, 0):
                    assert all("split1" in name for name in names)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_source_compiles_for_ampere_and_hopper(architecture: str, tmp_path: Path) -> None:
    split = 2 if architecture == "sm_90a" else 1
    defines = {"GROUP": 32, "COUNT": 16, "TILES": 1, "WARPS": 8, "CHUNK_WARPS": 1, "SPLIT": split, "STAGES": 4}
    options = [f"-D{name}={value}" for name, value in {**defines, "EIGHTS": 1, "BF16": 1}.items()]
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", *options]
    command += ["-o", str(tmp_path / "k.cubin"), str(CUDA / "nm_mma.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr
