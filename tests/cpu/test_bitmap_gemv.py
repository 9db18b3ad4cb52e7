"""The unstructured kernel for few tokens: its order of the weight, its variants, and the kernel on the emulator."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from emulated import EmulatedLauncher
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed
from sparsify_compiler.pattern import NM, Block, Unstructured
from sparsify_compiler.runtime.formats import BitmapFormat, format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.unstructured.bitmap_gemv import BitmapGemv
from sparsify_compiler.runtime.unstructured.bitmap_gemv_packing import (
    MOST_SPAN,
    Strands,
    from_strands,
    span_of,
    to_strands,
)

LAUNCHER = EmulatedLauncher(seed=1)
KERNEL = BitmapGemv(launcher=LAUNCHER)
HALVES = (torch.float16, torch.bfloat16)
needs_compiler = pytest.mark.skipif(LAUNCHER.unavailable() is not None, reason=str(LAUNCHER.unavailable()))
H200 = MatmulSpec(14336, 4096, torch.float16, Unstructured(), 0.1, (1,), torch.device("cuda", 0), (9, 0))


def draw(
    out: int, in_: int, density: float, dtype: torch.dtype = torch.float16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and a keep mask with an empty and a full row where there is room."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_, generator=generator).to(dtype)
    keep = torch.rand(out, in_, generator=generator) < density
    if out > 2:
        keep[1], keep[out - 1] = False, True
    return weight, keep


def pack(out: int, in_: int, density: float, dtype: torch.dtype = torch.float16, seed: int = 0) -> Packed:
    return BitmapFormat().pack(*draw(out, in_, density, dtype, seed), Unstructured())


def check(
    packed: Packed, tokens: int, variant: str = "", act: Activation | None = None, kernel: BitmapGemv = KERNEL
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    dtype = packed.tensors["values"].dtype
    x = torch.randn(tokens, packed.shape[1], generator=generator).to(dtype)
    bias = torch.randn(packed.shape[0], generator=generator).to(dtype) if tokens % 2 else None
    prepared = kernel.prepare(packed, spec_for(packed, (tokens,)))
    y = kernel.run(dataclasses.replace(prepared, variants=f"1={variant}" if variant else ""), x, bias, act)
    assert difference(y, x, unpack(packed), bias, act) is None
    return y


def walked(strands: Strands, out: int, in_: int) -> np.ndarray:
    """Walk every lane entry by entry, as the docstring of bitmap_gemv_packing says; 16-bit patterns (out, in)."""
    weight = np.zeros((out, in_), np.uint16)
    seen = np.zeros((out, in_), bool)
    packets = strands.packets.numpy()
    starts, rows, firsts = strands.starts.tolist(), strands.rows.tolist(), strands.firsts.numpy()
    parts, warps, bits, span = strands.parts, strands.warps, strands.gap_bits, span_of(in_, strands.parts)
    for tile, part, warp, lane in itertools.product(range(len(rows) // 32), range(parts), range(warps), range(32)):
        start, count = starts[tile * parts + part], starts[tile * parts + part + 1] - starts[tile * parts + part]
        column = part * span + int(firsts[tile, part, warp, lane])
        for number, packet in enumerate(range(start + warp * count // warps, start + (warp + 1) * count // warps)):
            values = packets[packet, : 32 * 4].view(np.uint16)[8 * lane : 8 * lane + 8]
            gaps = packets[packet, 32 * 4 :].view(np.uint8)[bits * lane : bits * lane + bits].tolist()
            if bits == 4:
                gaps = [byte & 15 for byte in gaps] + [byte >> 4 for byte in gaps]
            assert number > 0 or gaps[0] == 0
            for value, gap in zip(values.tolist(), gaps, strict=True):
                column += gap
                if value:
                    row = rows[tile * 32 + lane]
                    assert not seen[row, column]
                    assert column // span == part
                    weight[row, column], seen[row, column] = value, True
    return weight


@pytest.mark.parametrize("bits", [4, 8])
def test_a_walk_along_the_lanes_meets_every_kept_value_once(bits: int) -> None:
    for (out, in_, density), parts, warps in itertools.product(
        ((1, 1, 1.0), (35, 130, 0.02), (64, 200, 0.3), (40, 64, 0.0)), (1, 4), (1, 4)
    ):
        weight, keep = draw(out, in_, density, torch.bfloat16)
        strands = to_strands(keep, weight[keep], parts, warps, bits)
        assert strands.gap_bits == bits
        expected = (weight * keep).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(walked(strands, out, in_), np.where(keep.numpy(), expected, 0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_packing_is_exact_at_every_density(dtype: torch.dtype) -> None:
    for density, (out, in_) in itertools.product((0.0, 0.002, 0.1, 0.5, 1.0), ((1, 3), (33, 70), (100, 1500))):
        weight, keep = draw(out, in_, density, dtype)
        for parts, bits in ((1, None), (2, 4), (8, 8)):
            strands = to_strands(keep, weight[keep], parts, 8, bits)
            assert torch.equal(from_strands(strands, (out, in_), dtype), weight * keep)


def test_distances_take_four_bits_while_that_is_smaller() -> None:
    for density, bits, most_bytes in ((0.5, 4, 2.56), (0.3, 4, 2.6), (0.2, 4, 2.7), (0.1, 8, 3.1), (0.02, 8, 3.5)):
        keep = torch.rand(512, 2048, generator=torch.Generator().manual_seed(0)) < density
        strands = to_strands(keep, torch.ones(int(keep.sum())).half(), 1, 8)
        assert strands.gap_bits == bits
        assert strands.packets.numel() * 4 / int(keep.sum()) < most_bytes


def test_rows_of_equal_length_share_a_tile() -> None:
    keep = torch.zeros(64, 400, dtype=torch.bool)
    keep[::2, :200], keep[1::2, :8] = True, True
    strands = to_strands(keep, torch.ones(int(keep.sum())).half(), 1, 4)
    assert strands.rows.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]
    assert strands.starts.tolist() == [0, 25, 26]


@needs_compiler
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_the_kernel_equals_float64_over_tokens(density: float, dtype: torch.dtype) -> None:
    packed = pack(40, 300, density, dtype)
    for tokens in (*range(18), 130):
        check(packed, tokens)


@needs_compiler
def test_every_density_and_odd_shape_gives_the_float64_result() -> None:
    for density, (tokens, (out, in_)) in itertools.product(
        (0.0, 0.004, 0.1, 0.6, 1.0), enumerate(((1, 1), (33, 70), (64, 1100)), 1)
    ):
        check(pack(out, in_, density), tokens)


@needs_compiler
def test_weights_of_other_patterns_are_taken() -> None:
    for pattern in (NM(2, 4), Block(8, 16)):
        weight = torch.randn(48, 100).half()
        check(format_for(pattern).pack(weight, choose(pattern, weight), pattern), 2)


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bias_and_activation_are_fused(activation: Activation) -> None:
    check(pack(40, 64, 0.2), 1, act=activation)
    check(pack(40, 64, 0.2, torch.bfloat16), 2, act=activation)


@needs_compiler
def test_every_variant_is_right_and_gives_equal_bits_each_time() -> None:
    packed = pack(64, 2100, 0.1)
    spec = dataclasses.replace(H200, out=64, in_=2100)
    names = {name for tokens in (1, 8) for name in KERNEL.variants(spec, tokens)}
    assert {name.split(".")[0] for name in names} == {"split1", "split2", "split4"}
    for number, name in enumerate(sorted(names | {"split8.tokens1"})):
        y = check(packed, 1 + number % 3, name)
        other = check(packed, 1 + number % 3, name, kernel=BitmapGemv(launcher=EmulatedLauncher(seed=number)))
        assert torch.equal(y, other)


@needs_compiler
def test_a_row_wider_than_a_cluster_holds_is_done_in_turns() -> None:
    in_ = 8 * MOST_SPAN + 100
    packed = pack(3, in_, 0.01)
    assert KERNEL.prepare(packed, spec_for(packed, (1,))).tensors[1].shape[1] == 16
    check(packed, 1, "split2.tokens1")
    check(packed, 2, "split1.tokens2")


@needs_compiler
def test_views_with_any_strides_are_accepted() -> None:
    packed = pack(33, 72, 0.3)
    prepared = KERNEL.prepare(packed, spec_for(packed, (8,)))
    base = torch.randn(16, 160).half()
    for x in (base[::8, ::2][:, :72], base.T[:2, :].repeat(1, 5)[:, :72], base[0, :72].expand(2, 72), base[1:3, 5:77]):
        bias = torch.randn(66).half()[::2]
        assert difference(KERNEL.run(prepared, x, bias), x, unpack(packed), bias) is None


def test_no_launch_is_made_for_no_tokens() -> None:
    packed = pack(8, 8, 0.5)
    y = BitmapGemv().run(BitmapGemv().prepare(packed, spec_for(packed, (1,))), torch.empty(0, 8, dtype=torch.float16))
    assert y.shape == (0, 8)
    assert y.dtype == torch.float16


def test_a_cluster_needs_compute_capability_9() -> None:
    wide = dataclasses.replace(H200, out=4096, in_=14336)
    assert KERNEL.variants(wide, 1)[:3] == ("split4.tokens1", "split1.tokens1", "split2.tokens1")
    assert KERNEL.variants(dataclasses.replace(wide, capability=(8, 6)), 1) == ("split1.tokens1",)
    assert KERNEL.variants(H200, 16)[0] == "split1.tokens8"


def test_it_says_what_it_cannot_run() -> None:
    assert KERNEL.rejects(H200) is None or "g++" in str(KERNEL.rejects(H200))
    for change, words in (
        ({"dtype": torch.float32}, "found float32"),
        ({"device": torch.device("cpu")}, "found cpu"),
        ({"capability": (7, 5)}, "8.0 or later; found 7.5"),
    ):
        assert words in (KERNEL.rejects(dataclasses.replace(H200, **change)) or "")  # type: ignore[arg-type]
    packed = pack(8, 8, 0.5)
    prepared = dataclasses.replace(KERNEL.prepare(packed, spec_for(packed, (1,))), variants="1=split3.tokens1")
    with pytest.raises(KernelError, match=r"cannot run variant 'split3\.tokens1'"):
        KERNEL.run(prepared, torch.ones(1, 8).half())
