"""The block kernel for few tokens: its order of the weight, its variants, and the kernel itself on the emulator."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from emulated import EmulatedLauncher
from kernels import choose
from recorded import RecordingLauncher, build_log

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed
from sparsify_compiler.pattern import NM, Block
from sparsify_compiler.runtime.block.bands import cut_bands, grain_mask, merge_bands
from sparsify_compiler.runtime.block.few_tokens import BlockDecode, lane_order
from sparsify_compiler.runtime.formats import BlockFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.launch import CupyLauncher
from sparsify_compiler.runtime.oracle import difference

LAUNCHER = EmulatedLauncher()
KERNEL = BlockDecode(launcher=LAUNCHER)
needs_compiler = pytest.mark.skipif(LAUNCHER.unavailable() is not None, reason=str(LAUNCHER.unavailable()))
TILES = (Block(8, 8), Block(16, 16), Block(32, 32), Block(24, 40), Block(64, 16), Block(128, 128))


def pack(
    pattern: Block, out: int, in_: int, dtype: torch.dtype = torch.float16, sparsity: float = 0.6, seed: int = 0
) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return BlockFormat().pack(weight, choose(pattern, weight, sparsity), pattern)


def check(packed: Packed, tokens: int, variant: str = "", act: Activation | None = None, bias: bool = False) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dtype = packed.tensors["values"].dtype
    x = torch.randn(tokens, packed.shape[1], generator=generator).to(dtype)
    b = torch.randn(packed.shape[0], generator=generator).to(dtype) if bias else None
    prepared = KERNEL.prepare(packed, spec_for(packed, (tokens,)))
    y = KERNEL.run(dataclasses.replace(prepared, variants=f"1={variant}" if variant else ""), x, b, act)
    assert difference(y, x, unpack(packed), b, act) is None


def rebuilt(packed: Packed, height: int, width: int, grains: int) -> np.ndarray:
    """Put the weight together again from its bands, entry by entry, from what the docstring of `Bands` says."""
    bands = cut_bands(packed, grain_mask(packed, height, width), height, width, grains)
    out, in_ = packed.shape
    weight = np.zeros((-(-out // height) * height, -(-in_ // width) * width))
    for start, steps, place, zero in bands.table.tolist():
        assert zero == 0
        for step in range(start, start + steps):
            for grain, column in enumerate(bands.columns[step].tolist()):
                tile = bands.values[step, grain].double().numpy()
                weight[place * height : (place + 1) * height, column * width : (column + 1) * width] += tile
    return weight[:out, :in_]


@pytest.mark.parametrize("pattern", TILES, ids=str)
def test_bands_hold_every_kept_tile_once(pattern: Block) -> None:
    for (out, in_), grains in itertools.product(((130, 200), (1, 1), (256, 128)), (1, 2, 4)):
        packed = pack(pattern, out, in_)
        for height, width in ((pattern.rows, pattern.cols), (8, 8)):
            np.testing.assert_array_equal(rebuilt(packed, height, width, grains), unpack(packed).double().numpy())


def test_bands_are_ordered_by_length_and_ties_keep_their_order() -> None:
    keep = torch.zeros(5, 4, dtype=torch.bool)
    keep[1, :2], keep[2, :4], keep[4, :2] = True, True, True
    pattern = Block(8, 8)
    packed = BlockFormat().pack(torch.randn(40, 32), pattern.expand(keep), pattern)
    bands = cut_bands(packed, grain_mask(packed, 8, 8), 8, 8, 1)
    assert bands.table.tolist() == [[0, 4, 2, 0], [4, 2, 1, 0], [6, 2, 4, 0], [8, 0, 0, 0], [8, 0, 3, 0]]


def test_a_short_last_step_repeats_a_kept_column_with_zeros() -> None:
    keep = torch.zeros(1, 6, dtype=torch.bool)
    keep[0, 2], keep[0, 3], keep[0, 5] = True, True, True
    pattern = Block(8, 8)
    packed = BlockFormat().pack(torch.ones(8, 48), pattern.expand(keep), pattern)
    bands = cut_bands(packed, grain_mask(packed, 8, 8), 8, 8, 2)
    assert bands.columns.tolist() == [[2, 3], [5, 5]]
    assert bands.values.flatten(2).sum(dim=2).tolist() == [[64, 64], [64, 0]]


def test_merged_bands_keep_what_any_of_them_keeps() -> None:
    kept = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) > 0.6
    merged = merge_bands(kept, 3)
    assert merged.tolist() == [kept[i : i + 3].any(dim=0).tolist() for i in (0, 3, 6)]


@pytest.mark.parametrize("grains", [1, 2, 4])
def test_a_lane_holds_eight_columns_of_one_row(grains: int) -> None:
    width = 32 // grains
    values = torch.arange(3 * grains * 24 * width).reshape(3, grains, 24, width)
    order = lane_order(values)
    assert order.shape == (3, 3, 32, 8)
    for step, band, lane in itertools.product(range(3), range(3), range(32)):
        each = width // 4
        expected = [
            int(values[step, grain, band * 8 + lane // 4, lane % 4 * each + i])
            for grain in range(grains)
            for i in range(each)
        ]
        assert order[step, band, lane].tolist() == expected


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", TILES[:3], ids=str)
def test_the_kernel_equals_float64_over_tokens_and_odd_shapes(pattern: Block, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 2, 7, 8, 9, 16, 17, 130):
        check(pack(pattern, 70, 100, dtype), tokens, bias=tokens % 2 == 0)


@needs_compiler
@pytest.mark.parametrize("pattern", TILES, ids=str)
def test_every_tile_and_shape_gives_the_float64_result(pattern: Block) -> None:
    for out, in_ in ((1, 1), (33, 70), (256, 264)):
        check(pack(pattern, out, in_), 5, bias=True)


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bias_and_activation_are_fused(activation: Activation) -> None:
    check(pack(Block(16, 16), 40, 64), 3, act=activation, bias=True)
    check(pack(Block(16, 16), 40, 64, torch.bfloat16), 3, act=activation)


@needs_compiler
def test_empty_and_full_rows_of_tiles_are_computed() -> None:
    pattern = Block(16, 32)
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    keep[0], keep[2] = False, True
    for tiles in (keep, torch.zeros_like(keep), torch.ones_like(keep)):
        check(BlockFormat().pack(torch.randn(64, 192).half(), pattern.expand(tiles), pattern), 4, "", "silu", True)


@needs_compiler
def test_every_variant_gives_the_same_result_for_any_token_count() -> None:
    packed = pack(Block(64, 32), 64, 2816)
    spec = dataclasses.replace(spec_for(packed, (1,)), device=torch.device("cuda", 0), capability=(9, 0))
    names = KERNEL.variants(spec, 1)
    assert len(names) == len(set(names)) > 5
    assert {"split1", "split2", "split4"} == {name.split(".")[2] for name in names}
    for number, name in enumerate(names):
        check(packed, (1, 12, 40)[number % 3], name, bias=True)
    assert not [
        name for name in KERNEL.variants(dataclasses.replace(spec, capability=(8, 0)), 1) if "split1" not in name
    ]


@needs_compiler
def test_the_order_of_blocks_and_threads_does_not_change_a_bit() -> None:
    packed = pack(Block(32, 32), 64, 512)
    x = torch.randn(3, 512).half()
    results = []
    for seed in (0, 1, 2):
        kernel = BlockDecode(launcher=EmulatedLauncher(seed))
        prepared = kernel.prepare(packed, spec_for(packed, (3,)))
        results.append(kernel.run(dataclasses.replace(prepared, variants="1=rows32.warps4.split2.steps2"), x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_compiler
def test_views_and_unaligned_inputs_are_accepted() -> None:
    packed = pack(Block(16, 16), 32, 64)
    prepared = KERNEL.prepare(packed, spec_for(packed, (4,)))
    base = torch.randn(8, 130).half()
    for x in (base[:4, 1:65], base[::2, ::2][:, :64], base[0, 1:65].expand(4, 64)):
        assert difference(KERNEL.run(prepared, x), x, unpack(packed)) is None


@needs_compiler
def test_a_corrupted_value_is_noticed() -> None:
    packed = pack(Block(16, 16), 64, 128)
    prepared = KERNEL.prepare(packed, spec_for(packed, (4,)))
    prepared.tensors[2].view(-1)[77] += 2
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)).half()
    assert "outputs differ from float64" in (difference(KERNEL.run(prepared, x), x, unpack(packed)) or "")


@pytest.mark.skipif(CupyLauncher().unavailable() is not None, reason=str(CupyLauncher().unavailable()))
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize(("pattern", "tokens"), [(Block(128, 128), 16), (Block(16, 16), 1), (Block(8, 8), 32)], ids=str)
def test_the_source_compiles_for_gpus(pattern: Block, tokens: int, capability: tuple[int, int]) -> None:
    recorder = RecordingLauncher()
    kernel = BlockDecode(launcher=recorder)
    packed = pack(pattern, 128, 2048, torch.bfloat16)
    variant = f"1=rows8.warps8.split{4 if capability >= (9, 0) else 1}.steps4"
    prepared = dataclasses.replace(kernel.prepare(packed, spec_for(packed, (tokens,))), variants=variant)
    kernel.run(prepared, torch.zeros(tokens, 2048, dtype=torch.bfloat16), None, "gelu")
    (launch,) = recorder.launches
    assert launch.shared_bytes <= 99 * 1024  # of one block, capabilities 8.6 and 8.9; 8.0 and 9.0 have more
    build_log(launch.program, capability)


def test_what_it_cannot_run_is_refused_in_words() -> None:
    spec = MatmulSpec(64, 64, torch.float16, Block(16, 16), 0.1, (1,), torch.device("cuda", 0), (9, 0))
    assert KERNEL.rejects(spec) == LAUNCHER.unavailable()
    assert "multiples of 8; found 4x16" in (KERNEL.rejects(dataclasses.replace(spec, pattern=Block(4, 16))) or "")
    assert "found 2:4" in (KERNEL.rejects(dataclasses.replace(spec, pattern=NM(2, 4))) or "")
    assert "found float32" in (KERNEL.rejects(dataclasses.replace(spec, dtype=torch.float32)) or "")
    assert "capability 8.0 or later; found 7.5" in (KERNEL.rejects(dataclasses.replace(spec, capability=(7, 5))) or "")
    assert "runs on cuda" in (KERNEL.rejects(dataclasses.replace(spec, device=torch.device("cpu"))) or "")


def test_a_variant_of_another_tile_is_refused() -> None:
    packed = pack(Block(8, 8), 16, 16)
    prepared = KERNEL.prepare(packed, spec_for(packed, (1,)))
    for name in ("rows32.warps4.split1.steps2", "fast"):
        with pytest.raises(KernelError, match="does not fit tiles of 8 rows"):
            KERNEL.run(dataclasses.replace(prepared, variants=f"1={name}"), torch.randn(1, 16).half())
