"""The 2:4 kernel for few tokens, run on the CPU, against float64; its variants and what it refuses."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from emulated import CUDA, EmulatedLauncher, EmulationError
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM, Block, Pattern
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.launch import CupyLauncher
from sparsify_compiler.runtime.nm.nm24 import Nm24Mma, program_for
from sparsify_compiler.runtime.nm.nm24_variants import (
    MOST_VARIANTS,
    Variant,
    first_variant,
    variant_named,
    variants_for,
)
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.variants import write_variants

AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (12, 0)
SPEC = MatmulSpec(64, 128, torch.float16, NM(2, 4), 0.5, (1, 8, 64), torch.device("cuda", 0), HOPPER)
TWO_OF_FOUR = NM(2, 4)
MISSING = EmulatedLauncher().unavailable()
emulated = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def kernel(seed: int = 0, capability: tuple[int, int] = HOPPER) -> Nm24Mma:
    return Nm24Mma(launcher=EmulatedLauncher(seed), capability=capability)


def weight(out: int, in_: int, dtype: torch.dtype = torch.float16, pattern: Pattern = TWO_OF_FOUR) -> Packed:
    dense = torch.randn(out, in_, generator=torch.Generator().manual_seed(out * in_)).to(dtype)
    return format_for(pattern).pack(dense, choose(pattern, dense), pattern)


def check(
    own: Nm24Mma,
    packed: Packed,
    tokens: int,
    variant: Variant | None = None,
    bias: bool = False,
    activation: Activation | None = None,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    dtype = packed.tensors["values"].dtype
    x = torch.randn(tokens, packed.shape[1], generator=generator).to(dtype)
    b = torch.randn(packed.shape[0], generator=generator).to(dtype) if bias else None
    prepared = own.prepare(packed, spec_for(packed, (tokens,)))
    if variant is not None:
        prepared = dataclasses.replace(prepared, variants=write_variants({max(tokens, 1): variant.name}))
    y = own.run(prepared, x, b, activation)
    assert difference(y, x, unpack(packed), b, activation) is None
    return y


@emulated
@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=str)
def test_every_token_count_is_right_on_odd_shapes(capability: tuple[int, int]) -> None:
    for (out, in_), counts in {
        (33, 70): (*range(18), 31, 33, 64, 65, 130),
        (1, 1): (0, 1, 9),
        (7, 5): (1, 17),
        (16, 64): (3, 8),
        (130, 200): (1, 16, 40),
    }.items():
        packed = weight(out, in_)
        for tokens in counts:
            check(kernel(tokens, capability), packed, tokens)


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_bias_and_activation_are_fused(activation: Activation | None, dtype: torch.dtype) -> None:
    for tokens, bias in ((3, True), (24, True), (3, False)):
        check(kernel(), weight(48, 136, dtype), tokens, None, bias, activation)


@emulated
@pytest.mark.parametrize("pattern", [NM(1, 4), NM(1, 2)], ids=str)
def test_sparser_patterns_run_as_two_of_four(pattern: NM) -> None:
    check(kernel(), weight(20, 72, pattern=pattern), 5)


def corners() -> list[Variant]:
    """Every value of every field with the least and the largest of the others, few enough to compile here."""
    direct = [
        Variant("direct", tiles, warps, stages, 1, tokens, cluster)
        for tiles, warps, stages, tokens, cluster in (
            *((1, 4, 2, 8, 1), (1, 16, 4, 8, 4), (2, 8, 3, 8, 2), (4, 4, 2, 16, 8), (4, 8, 3, 16, 1)),
        )
    ]
    staged = [
        Variant("staged", tiles, warps, stages, steps, tokens, cluster)
        for tiles, warps, stages, steps, tokens, cluster in (
            *((1, 4, 3, 1, 8, 1), (1, 8, 6, 2, 16, 8), (2, 4, 4, 2, 64, 2), (4, 8, 3, 1, 32, 4), (4, 4, 3, 2, 64, 1)),
        )
    ]
    return direct + staged


@emulated
@pytest.mark.parametrize("variant", corners(), ids=lambda v: v.name)
def test_variants_are_right_for_any_token_count_and_repeat_bit_for_bit(variant: Variant) -> None:
    packed = weight(90, 330)  # 6 row tiles, 6 steps: blocks with nothing to do, and idle warps
    for tokens in (1, variant.tokens, variant.tokens + 3):
        results = [check(kernel(seed), packed, tokens, variant, bias=True) for seed in (0, 1, 2)]
        assert torch.equal(results[0], results[1])  # whatever the order of blocks and threads
        assert torch.equal(results[0], results[2])


@emulated
def test_views_of_any_strides_and_addresses_are_read() -> None:
    packed, own = weight(24, 40), kernel()
    prepared = own.prepare(packed, spec_for(packed, (8,)))
    base = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)).half()
    for x in (base[::2, ::2][:, :40], base.T[:8, :].repeat(1, 3)[:, 3:43], base[0, :40].expand(8, 40), base[8:, 5:45]):
        assert difference(own.run(prepared, x, base[0, 1:25]), x, unpack(packed), base[0, 1:25]) is None


@emulated
def test_infinite_inputs_reach_only_the_outputs_that_use_them() -> None:
    packed, own = weight(16, 72), kernel()
    x = torch.ones(2, 72, dtype=torch.float16)
    x[1] = float("nan")
    x[0, 70] = float("inf")
    y = own.run(own.prepare(packed, spec_for(packed, (2,))), x)
    used = unpack(packed)[:, 70] != 0
    assert torch.equal(y[0].isinf(), used)
    assert y[1].isnan().all()


@emulated
@pytest.mark.parametrize(
    ("kind", "line", "instead"),
    [
        ("direct", "      wait_copies<STAGES - 2>();", ""),
        ("staged", "    wait_copies<STAGES - 2>();", ""),
        ("staged", "    __syncthreads();  // all copies", "    //"),
        ("staged", "  __syncthreads();  // the sums take the place of all stages", ""),
        ("direct", "  __syncthreads();  // the sums take the place of all rings", ""),
        ("direct", "  store_sums(sums + warp * TOKENS * PITCH(ROWS), PITCH(ROWS), d, lane);\n  __syncthreads();", None),
        ("staged", "#if CLUSTER > 1\n  wait_cluster();\n#endif", ""),
        ("staged", "  wait_cluster();  // no block may end", "  //"),
    ],
)
def test_a_missing_wait_is_noticed(tmp_path: Path, kind: str, line: str, instead: str | None) -> None:
    text = (CUDA / "nm24.cu").read_text(encoding="utf-8")
    assert line in text
    changed = line.replace("__syncthreads();", "") if instead is None else instead
    (tmp_path / "nm24.cu").write_text(text.replace(line, changed), encoding="utf-8")
    shape = ("direct", 1, 4, 2, 1, 8, 2) if kind == "direct" else ("staged", 1, 4, 3, 1, 8, 2)
    variant, packed = Variant(*shape), weight(64, 640)
    noticed = 0
    for seed in range(8):
        try:
            check(Nm24Mma(launcher=EmulatedLauncher(seed, tmp_path)), packed, 8, variant)
        except (AssertionError, EmulationError, KernelError):
            noticed += 1
    # A block that ends too early is only seen by the orders in which another still reads from it.
    assert noticed >= (3 if "no block may end" in line else 6)


@emulated
def test_a_corrupted_weight_gives_a_wrong_result() -> None:
    packed, own = weight(64, 128), kernel()
    prepared = own.prepare(packed, spec_for(packed, (8,)))
    records = prepared.tensors[0].clone()
    records.view(-1)[300] += 2
    x = torch.randn(8, 128).half()
    assert difference(own.run(dataclasses.replace(prepared, tensors=(records,)), x), x, unpack(packed)) is not None


def test_names_of_variants_round_trip_and_nonsense_is_refused() -> None:
    for variant in corners():
        assert variant_named(variant.name) == variant
    for name in ("fast", "direct.rows0.warps4.stages2.k64.tokens8.cluster1", corners()[0].name + "1.x"):
        with pytest.raises(KernelError, match="cannot be built by this version"):
            variant_named(name)


@pytest.mark.parametrize("capability", [AMPERE, ADA, HOPPER, BLACKWELL], ids=str)
def test_every_offered_variant_fits_its_gpu(capability: tuple[int, int]) -> None:
    limit = {AMPERE: 163, ADA: 99, HOPPER: 227, BLACKWELL: 99}[capability] * 1024
    for (out, in_), tokens in itertools.product(((4096, 4096), (14336, 4096), (64, 64)), (1, 2, 8, 16, 33, 64, 1000)):
        found = variants_for(out, in_, tokens, capability)
        assert 1 <= len(found) <= MOST_VARIANTS
        assert len(set(found)) == len(found)
        for variant in found:
            assert variant.shared_bytes <= limit
            assert variant.registers * variant.threads <= 65536
            assert variant.cluster == 1 or capability >= HOPPER
        assert first_variant(out, in_, tokens, capability).tokens <= 64


def test_few_tokens_start_directly_and_many_staged() -> None:
    assert first_variant(14336, 4096, 1, HOPPER).kind == "direct"
    assert first_variant(14336, 4096, 64, HOPPER).kind == "staged"
    names = Nm24Mma().variants(SPEC, 8)
    assert names[0] == variants_for(64, 128, 8, HOPPER)[0].name
    assert {name.split(".")[0] for name in names} == {"direct", "staged"}


def test_what_it_cannot_run_is_said() -> None:
    own = Nm24Mma(launcher=CupyLauncher())
    assert "found 4:8" in (own.rejects(dataclasses.replace(SPEC, pattern=NM(4, 8))) or "")
    assert "found 4x4" in (own.rejects(dataclasses.replace(SPEC, pattern=Block(4, 4))) or "")
    assert "start again after 6 columns" in (own.rejects(dataclasses.replace(SPEC, in_=54, run=6)) or "")
    assert "found float32" in (own.rejects(dataclasses.replace(SPEC, dtype=torch.float32)) or "")
    assert "runs on cuda; found cpu" in (own.rejects(dataclasses.replace(SPEC, device=torch.device("cpu"))) or "")
    assert "found 7.5" in (own.rejects(dataclasses.replace(SPEC, capability=(7, 5))) or "")
    emulator = Nm24Mma(launcher=EmulatedLauncher())
    for accepted in (SPEC, dataclasses.replace(SPEC, run=64), dataclasses.replace(SPEC, in_=70, run=70)):
        assert emulator.rejects(accepted) == MISSING


def test_wrong_inputs_and_a_variant_of_another_gpu_are_refused() -> None:
    packed, own = weight(16, 64), kernel(capability=AMPERE)
    prepared = own.prepare(packed, spec_for(packed, (1,)))
    for x in (torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(2, 63).half(), torch.ones(64).half()):
        with pytest.raises(KernelError, match=r"holds a torch.float16 weight \(16, 64\)"):
            own.run(prepared, x)
    name = Variant("direct", 1, 4, 2, 1, 8, 2).name
    with pytest.raises(KernelError, match=r"clusters need compute capability 9\.0; this GPU has 8\.0"):
        own.run(Prepared(prepared.kernel, prepared.shape, prepared.tensors, f"1={name}"), torch.ones(1, 64).half())


def test_equal_variants_share_one_program() -> None:
    variant = corners()[0]
    assert program_for(variant, torch.float16, None) is program_for(variant, torch.float16, None)
    assert dict(program_for(variant, torch.bfloat16, "silu").defines)["ACTIVATION"] == 3
