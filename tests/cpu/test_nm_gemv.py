"""The n:m kernel for few tokens: its order of the weight, its variants, and the kernel on the emulator."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from emulated import EmulatedLauncher
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.runtime.formats import NMFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm_gemv import NmGemv
from sparsify_compiler.runtime.nm.nm_gemv_packing import from_lane_order, kept_of_group, to_lane_order
from sparsify_compiler.runtime.oracle import difference

LAUNCHER = EmulatedLauncher(seed=1)
KERNEL = NmGemv(launcher=LAUNCHER)
HALVES = (torch.float16, torch.bfloat16)
needs_compiler = pytest.mark.skipif(LAUNCHER.unavailable() is not None, reason=str(LAUNCHER.unavailable()))
H200 = MatmulSpec(14336, 4096, torch.float16, NM(16, 32), 0.5, (1,), torch.device("cuda", 0), (9, 0))


def pack(
    pattern: NM, out: int, in_: int, dtype: torch.dtype = torch.float16, seed: int = 0, run: int | None = None
) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed)).to(dtype)
    keep = choose(pattern, weight) if run is None else pattern.select(weight.double().abs(), 0.5, run)
    return NMFormat().pack(weight, keep, pattern, run)


def check(
    packed: Packed, tokens: int, variant: str = "", act: Activation | None = None, kernel: NmGemv = KERNEL
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    dtype = packed.tensors["values"].dtype
    x = torch.randn(tokens, packed.shape[1], generator=generator).to(dtype)
    bias = torch.randn(packed.shape[0], generator=generator).to(dtype) if tokens % 2 else None
    prepared = kernel.prepare(packed, spec_for(packed, (tokens,)))
    y = kernel.run(dataclasses.replace(prepared, variants=f"1={variant}" if variant else ""), x, bias, act)
    assert difference(y, x, unpack(packed), bias, act) is None
    return y


def reference_words(weight: np.ndarray, keep: np.ndarray, kept: int) -> np.ndarray:
    """Build the packed words entry by entry from what the docstring of nm_gemv_packing says, 16-bit patterns in."""
    out, in_ = weight.shape
    tiles, chunks = -(-out // 32), -(-in_ // 128)
    words = np.zeros((tiles, chunks, 1 + kept // 2, 32, 4), np.uint32)
    for row, group in itertools.product(range(tiles * 32), range(chunks * 4)):
        columns = range(32 * group, 32 * group + 32)
        held = {c for c in columns if row < out and c < in_ and keep[row, c]}
        for c in columns:
            if len(held) < kept:
                held.add(c)
        parity, code, values = 0, 0, []
        for c in columns:
            if c in held:
                parity ^= 1
                real = row < out and c < in_ and keep[row, c]
                values.append(int(weight[row, c]) if real else 0)
            code |= parity << (31 - c % 32)
        tile, lane, chunk, g = row // 32, row % 32, group // 4, group % 4
        words[tile, chunk, 0, lane, g] = code
        for i in range(kept // 2):
            flat = g * kept // 2 + i
            words[tile, chunk, 1 + flat // 4, lane, flat % 4] = values[2 * i] | values[2 * i + 1] << 16
    return words


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), NM(1, 32), NM(16, 32)], ids=str)
def test_the_order_of_the_weight_is_the_documented_one(pattern: NM) -> None:
    for out, in_ in ((1, 1), (35, 130), (32, 128)):
        packed = pack(pattern, out, in_, torch.bfloat16)
        weight = unpack(packed)
        keep = choose(pattern, torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).bfloat16())
        words = to_lane_order(keep, weight[keep])
        bits = weight.view(torch.int16).numpy().view(np.uint16)
        expected = reference_words(bits, keep.numpy(), kept_of_group(words))
        np.testing.assert_array_equal(words.numpy().view(np.uint32), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_packing_is_exact_for_every_group_size_and_convolution_taps(dtype: torch.dtype) -> None:
    patterns = [NM(keep, of) for of in (2, 4, 8, 16, 32) for keep in (1, of // 2, of - 1) if keep]
    for pattern, (out, in_, run) in itertools.product(patterns, ((33, 70, None), (64, 256, None), (5, 3 * 36, 36))):
        packed = pack(pattern, out, in_, dtype, run=run)
        words = KERNEL.prepare(packed, spec_for(packed, (1,))).tensors[0]
        assert words.is_contiguous()
        assert torch.equal(
            from_lane_order(words, (out, in_), dtype).view(torch.int16), unpack(packed).view(torch.int16)
        )


def test_the_packed_size_is_the_values_and_four_bytes_a_group() -> None:
    for keep, of, kept in ((2, 4, 16), (16, 32, 16), (8, 32, 8), (1, 8, 4)):
        packed = pack(NM(keep, of), 64, 512)
        words = KERNEL.prepare(packed, spec_for(packed, (1,))).tensors[0]
        assert kept_of_group(words) == kept
        assert words.numel() * 4 == 64 * 512 // 32 * (2 * kept + 4)


@needs_compiler
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("pattern", [NM(16, 32), NM(2, 8)], ids=str)
def test_the_kernel_equals_float64_over_tokens(pattern: NM, dtype: torch.dtype) -> None:
    for tokens in (*range(18), 130):
        check(pack(pattern, 40, 300, dtype), tokens)


@needs_compiler
def test_every_pattern_and_odd_shape_gives_the_float64_result() -> None:
    for pattern in (NM(2, 4), NM(4, 8), NM(3, 8), NM(31, 32), NM(1, 32), NM(8, 32)):
        for tokens, (out, in_) in enumerate(((1, 1), (33, 70), (64, 516)), 1):
            check(pack(pattern, out, in_), tokens)


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bias_and_activation_are_fused(activation: Activation) -> None:
    check(pack(NM(2, 4), 40, 64), 1, act=activation)
    check(pack(NM(2, 4), 40, 64, torch.bfloat16), 2, act=activation)


@needs_compiler
@pytest.mark.parametrize(
    "name",
    ["warps4.split1.tokens1", "warps16.split1.tokens2", "warps4.split2.tokens8", "warps8.split2.tokens4",
     "warps4.split8.tokens1"],
)  # fmt: skip
def test_variants_are_right_and_give_equal_bits_each_time(name: str) -> None:
    packed = pack(NM(8, 32), 64, 4500)
    for tokens in (1, 3):
        y = check(packed, tokens, name)
        assert torch.equal(y, check(packed, tokens, name, kernel=NmGemv(launcher=EmulatedLauncher(seed=7))))


def test_every_variant_offered_is_one_that_is_tested() -> None:
    for tokens in (1, 4, 16):
        names = KERNEL.variants(H200, tokens)
        assert 4 < len(names) == len(set(names))
        assert all(re.fullmatch(r"warps(4|8|16)\.split[124]\.tokens[1248]", name) for name in names)


@needs_compiler
def test_views_with_any_strides_are_accepted() -> None:
    packed = pack(NM(2, 4), 33, 72)
    prepared = KERNEL.prepare(packed, spec_for(packed, (8,)))
    base = torch.randn(16, 160).half()
    for x in (base[::8, ::2][:, :72], base.T[:2, :].repeat(1, 5)[:, :72], base[0, :72].expand(2, 72), base[1:3, 5:77]):
        bias = torch.randn(66).half()[::2]
        assert difference(KERNEL.run(prepared, x, bias), x, unpack(packed), bias) is None


def test_no_launch_is_made_for_no_tokens() -> None:
    packed = pack(NM(2, 4), 8, 8)
    y = NmGemv().run(NmGemv().prepare(packed, spec_for(packed, (1,))), torch.empty(0, 8, dtype=torch.float16))
    assert y.shape == (0, 8)
    assert y.dtype == torch.float16


def test_the_default_fills_a_large_gpu_and_a_cluster_needs_compute_capability_9() -> None:
    for out, in_ in ((14336, 4096), (4096, 14336), (4096, 4096), (28672, 8192), (1024, 4096)):
        spec = dataclasses.replace(H200, out=out, in_=in_)
        warps, split, _ = KERNEL.variants(spec, 1)[0].split(".")
        total = out // 32 * int(warps[5:]) * int(split[5:])
        assert 1024 <= total <= 4096
    old = dataclasses.replace(H200, capability=(8, 0), out=4096)
    assert all(".split1." in name for name in KERNEL.variants(old, 1))
    assert [KERNEL.variants(H200, tokens)[0][-1] for tokens in (1, 2, 3, 4, 5, 8, 100)] == [*"1244888"]


def test_it_says_what_it_cannot_run() -> None:
    assert KERNEL.rejects(H200) is None or "g++" in str(KERNEL.rejects(H200))
    for change, words in (
        ({"pattern": Unstructured()}, "found unstructured"),
        ({"pattern": NM(3, 5)}, "found 3:5"),
        ({"pattern": NM(32, 64)}, "found 32:64"),
        ({"dtype": torch.float32}, "found float32"),
        ({"device": torch.device("cpu")}, "found cpu"),
        ({"capability": (7, 5)}, "8.0 or later; found 7.5"),
        ({"capability": None}, "found an unknown one"),
    ):
        assert words in (KERNEL.rejects(dataclasses.replace(H200, **change)) or "")  # type: ignore[arg-type]
    packed = pack(NM(2, 4), 8, 8)
    prepared = dataclasses.replace(KERNEL.prepare(packed, spec_for(packed, (1,))), variants="1=warps3.split1.tokens1")
    with pytest.raises(KernelError, match=r"cannot run variant 'warps3\.split1\.tokens1'"):
        KERNEL.run(prepared, torch.ones(1, 8).half())
