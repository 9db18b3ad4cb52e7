"""The compiled CPU kernels: right for every shape, width and thread, and refused in words where they cannot run."""

import dataclasses
import importlib.util
import threading
from collections.abc import Iterator

import pytest
import torch
from kernels import LAYOUT_PATTERNS, choose
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Kernel, MatmulSpec, Packed
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.cpu import cpu_compiled
from sparsify_compiler.runtime.cpu.block_gather import BlockGather
from sparsify_compiler.runtime.cpu.numba_block import NumbaBlock
from sparsify_compiler.runtime.cpu.numba_csr import WIDTHS, NumbaCsr, chosen_width, width_variants
from sparsify_compiler.runtime.formats import BitmapFormat, format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import difference

COMPILED: tuple[Kernel, ...] = (NumbaCsr(), NumbaBlock())
KERNELS: tuple[Kernel, ...] = (*COMPILED, BlockGather())
CPU = torch.device("cpu")
missing = pytest.mark.skipif(cpu_compiled.unavailable() is not None, reason=str(cpu_compiled.unavailable()))
compiled = [pytest.param(kernel, marks=missing, id=kernel.name) for kernel in COMPILED]
every = pytest.mark.parametrize("kernel", [*compiled, pytest.param(BlockGather(), id="block_gather")])


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was found missing before and after."""
    cpu_compiled.unavailable.cache_clear()
    yield
    cpu_compiled.unavailable.cache_clear()


def pack(pattern: Pattern, out: int, in_: int, sparsity: float = 0.5) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out + in_))
    return format_for(pattern).pack(weight, choose(pattern, weight, sparsity), pattern)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@every
@pytest.mark.parametrize("pattern", LAYOUT_PATTERNS, ids=str)
def test_a_compiled_kernel_equals_float64_at_every_shape_and_token_count(kernel: Kernel, pattern: Pattern) -> None:
    for out, in_ in ((1, 1), (7, 5), (33, 70), (64, 48)):
        packed = pack(pattern, out, in_)
        spec = spec_for(packed, (1,))
        if reason := kernel.rejects(spec):
            assert not isinstance(kernel, NumbaCsr)
            assert "block patterns" in reason or "multiples of 4" in reason
            return
        prepared = kernel.prepare(packed, spec)
        for tokens in (0, 1, 2, 3, 15, 16, 17, 63, 65, 130):
            x, bias = draw(tokens, in_), draw(out) if tokens % 2 else None
            activation = "silu" if tokens % 3 == 0 else None
            assert difference(kernel.run(prepared, x, bias, activation), x, unpack(packed), bias, activation) is None


@every
def test_every_variant_is_right_at_any_token_count_and_writes_every_output(kernel: Kernel) -> None:
    packed = pack(Block(8, 4), 43, 37, 0.8)
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for variant in ("", *(f"t{width}" for width in WIDTHS), "t7"):
            chosen = dataclasses.replace(prepared, variants=f"1={variant}" if variant else "")
            for tokens in (1, 2, 40, 129):
                x = draw(tokens, 37)
                assert difference(kernel.run(chosen, x), x, unpack(packed)) is None
    finally:
        torch.use_deterministic_algorithms(False)


@every
def test_empty_and_full_rows_and_an_empty_weight_are_computed(kernel: Kernel) -> None:
    weight, x = draw(12, 8), draw(5, 8)
    keep = torch.zeros(12, 8, dtype=torch.bool)
    keep[4:8] = True
    for mask in (keep, torch.zeros_like(keep), torch.ones_like(keep)):
        packed = format_for(Block(4, 4)).pack(weight, mask, Block(4, 4))
        prepared = kernel.prepare(packed, spec_for(packed, (1,)))
        for rows in (x, x[:1]):
            assert difference(kernel.run(prepared, rows, draw(12)), rows, weight * mask, draw(12)) is None


@every
def test_a_weight_without_columns_gives_the_bias(kernel: Kernel) -> None:
    packed = format_for(Block(4, 4)).pack(draw(8, 0), torch.zeros(8, 0, dtype=torch.bool), Block(4, 4))
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    for tokens in (0, 1, 40):
        assert torch.equal(kernel.run(prepared, draw(tokens, 0), draw(8)), draw(8).expand(tokens, 8))


@every
def test_inputs_and_biases_of_any_strides_give_the_same_result(kernel: Kernel) -> None:
    packed = pack(Block(4, 4), 12, 8)
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    base, bias = draw(64, 64), draw(24)[::2]
    for x in (base[:8, :16:2], base.T[:20, 3:11], base[0, :8].expand(3, 8), base[1:2, :16:2]):
        assert difference(kernel.run(prepared, x, bias), x, unpack(packed), bias) is None


@missing
@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("kernel", COMPILED, ids=lambda kernel: kernel.name)
def test_the_bits_do_not_depend_on_the_number_of_threads(kernel: Kernel, tokens: int) -> None:
    packed = pack(Block(4, 8), 100, 96, 0.9)
    prepared, x = kernel.prepare(packed, spec_for(packed, (1,))), draw(tokens, 96)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernel.run(prepared, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every
def test_many_python_threads_run_one_kernel_at_once(kernel: Kernel) -> None:
    packed = pack(Block(4, 4), 64, 64, 0.8)
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    inputs = [draw(1 + 9 * n, 64) for n in range(4)]
    expected = [kernel.run(prepared, x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not torch.equal(kernel.run(prepared, inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@missing
def test_infinity_and_nan_pass_as_in_a_dense_product_of_the_kept_weights() -> None:
    packed = pack(Block(4, 4), 8, 8, 0.5)
    keep = unpack(packed) != 0
    for kernel in COMPILED:
        prepared = kernel.prepare(packed, spec_for(packed, (1,)))
        for tokens in (1, 3):
            x = torch.ones(tokens, 8)
            x[0, 0] = float("nan")
            assert torch.equal(kernel.run(prepared, x)[0].isnan(), keep[:, 0])


def test_what_cannot_run_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    spec = MatmulSpec(64, 64, torch.bfloat16, Block(16, 16), 0.1, (1,), CPU)
    for kernel in COMPILED:
        assert "runs float32 alone" in (kernel.rejects(spec) or "")
        moved = dataclasses.replace(spec, device=torch.device("cuda", 0))
        assert "runs on cpu; found cuda" in (kernel.rejects(moved) or "")
    single = dataclasses.replace(spec, dtype=torch.float32)
    block, gather = KERNELS[1:]
    assert "runs block patterns; found 2:4" in (gather.rejects(dataclasses.replace(single, pattern=NM(2, 4))) or "")
    assert "runs float32 and float64" in (gather.rejects(spec) or "")
    assert "runs on cpu" in (gather.rejects(dataclasses.replace(single, device=torch.device("cuda", 0))) or "")
    assert "2048 tile rows" in (gather.rejects(dataclasses.replace(single, out=2**15)) or "")
    assert "runs block patterns; found 2:4" in (block.rejects(dataclasses.replace(single, pattern=NM(2, 4))) or "")
    odd = dataclasses.replace(single, pattern=Block(6, 4))
    assert "multiples of 4; found 6x4" in (block.rejects(odd) or "")
    huge = dataclasses.replace(single, out=2**20, in_=2**20)
    assert "do not fit int32" in (KERNELS[0].rejects(huge) or "")
    cpu_compiled.unavailable.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Numba is not installed: pip install 'sparsify-compiler[cpu]'" in (KERNELS[0].rejects(single) or "")
    monkeypatch.undo()
    cpu_compiled.unavailable.cache_clear()
    monkeypatch.setattr(cpu_compiled, "_openmp", lambda: None)
    if importlib.util.find_spec("numba") is not None:
        assert "does not run on GNU OpenMP" in (block.rejects(single) or "")


def test_blocks_packed_as_a_bitmap_are_refused() -> None:
    weight = draw(8, 8)
    packed = BitmapFormat().pack(weight, torch.ones(8, 8, dtype=torch.bool), Unstructured())
    for kernel in KERNELS[1:]:
        with pytest.raises(KernelError, match=f"{kernel.name} reads the layout 'block'; found 'bitmap'"):
            kernel.prepare(packed, spec_for(packed, (1,)))


def test_the_widths_worth_timing_fit_the_tokens() -> None:
    assert width_variants(1, WIDTHS) == ("",)
    assert width_variants(16, WIDTHS) == ("t16",)
    assert width_variants(40, WIDTHS) == ("t64", "t16")
    assert width_variants(512, WIDTHS) == ("t128", "t16", "t64")
    assert [chosen_width("", n, WIDTHS) for n in (2, 16, 17, 64, 65, 9999)] == [16, 16, 64, 64, 128, 128]
    assert chosen_width("t16", 9999, WIDTHS) == 16
