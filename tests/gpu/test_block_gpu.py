"""The two block kernels on a CUDA GPU: every variant, odd shapes, capture, another thread, the same bits again."""

import dataclasses
import threading

import pytest
import torch
from kernels import choose

from sparsify_compiler.kernel import Activation, Kernel, Packed
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.block.few_tokens import BlockDecode
from sparsify_compiler.runtime.block.many_tokens import BlockTriton
from sparsify_compiler.runtime.formats import BlockFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]
KERNELS: tuple[Kernel, ...] = (BlockDecode(), BlockTriton())
TILES = (Block(16, 16), Block(32, 32), Block(64, 64), Block(128, 128), Block(48, 80))
# Triton takes a second or two a program, and another one for each activation: fewer tiles and variants of it.
TILES_OF_VARIANTS = {"block_decode": TILES, "block_triton": (Block(16, 16), Block(128, 128))}
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def pack(pattern: Block, out: int, in_: int, dtype: torch.dtype = torch.float16, sparsity: float = 0.8) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out)).to("cuda", dtype)
    return BlockFormat().pack(weight, choose(pattern, weight, sparsity), pattern)


def check(
    kernel: Kernel, packed: Packed, tokens: int, variant: str = "", act: Activation | None = None, bias: bool = True
) -> None:
    spec = spec_for(packed, (tokens,))
    if reason := kernel.rejects(spec):
        pytest.skip(reason)
    dtype = packed.tensors["values"].dtype
    x = torch.randn(tokens, packed.shape[1], device="cuda").to(dtype)
    b = torch.randn(packed.shape[0], device="cuda").to(dtype) if bias else None
    prepared = dataclasses.replace(kernel.prepare(packed, spec), variants=f"1={variant}" if variant else "")
    spare = torch.full((tokens, packed.shape[0]), torch.nan, dtype=dtype, device="cuda")
    del spare  # the memory that the result is likely to be given
    y = kernel.run(prepared, x, b, act)
    assert difference(y, x, unpack(packed), b, act) is None, f"variant {variant!r}, {tokens} tokens"


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", TILES, ids=str)
def test_shapes_and_tokens_give_the_float64_result(kernel: Kernel, pattern: Block, dtype: torch.dtype) -> None:
    fewer = kernel.name == "block_triton"
    if fewer and dtype == torch.bfloat16 and pattern not in TILES_OF_VARIANTS[kernel.name]:
        pytest.skip("the dtype changes nothing that tiles do; two kinds of tile are enough")
    for out, in_ in ((33, 70), (1024, 1000)) if fewer else ((1, 1), (33, 70), (1024, 1000)):
        packed = pack(pattern, out, in_, dtype, 0.5)
        for tokens in (0, 1, 17, 130, 1000) if fewer else (0, 1, 8, 9, 17, 33, 130, 1000):
            act: tuple[Activation | None, ...] = ("silu", "gelu", "relu", None)
            if fewer:
                act = ("silu", None, None, None)
            check(kernel, packed, tokens, act=act[tokens % 4], bias=fewer or tokens % 2 == 0)


@each_kernel
@pytest.mark.parametrize("pattern", TILES, ids=str)
def test_every_variant_gives_the_float64_result(kernel: Kernel, pattern: Block) -> None:
    if pattern not in TILES_OF_VARIANTS[kernel.name]:
        pytest.skip("two kinds of tile have all of this kernel's variants")
    packed = pack(pattern, 1000, 2048)
    spec = spec_for(packed, (1,))
    names = {name for tokens in (1, 16, 64, 200, 1024, 8192) for name in kernel.variants(spec, tokens)}
    for number, name in enumerate(sorted(names)):
        check(kernel, packed, (5, 77, 1000)[number % 3], name)


@each_kernel
def test_a_captured_call_in_another_thread_repeats_the_eager_bits(kernel: Kernel) -> None:
    packed = pack(Block(64, 64), 512, 2048)
    prepared = kernel.prepare(packed, spec_for(packed, (16,)))
    x = torch.randn(16, 2048, device="cuda").half()
    results = [kernel.run(prepared, x)]

    def captured() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernel.run(prepared, x)
        for _ in range(3):
            graph.replay()
            results.append(y.clone())
        torch.cuda.synchronize()

    thread = threading.Thread(target=captured)
    thread.start()
    thread.join()
    assert len(results) == 4
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_kernel
def test_more_than_two_to_the_31_outputs_are_computed(kernel: Kernel) -> None:
    tokens, out = 2**17 + 3, 2**14 + 128
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    packed = pack(Block(128, 64), out, 64, sparsity=0.5)
    x = torch.randn(tokens, 64, device="cuda").half()
    y = kernel.run(kernel.prepare(packed, spec_for(packed, (tokens,))), x)
    for rows in (slice(0, 64), slice(tokens - 64, tokens)):
        assert difference(y[rows], x[rows], unpack(packed)) is None


@each_kernel
def test_rows_are_read_past_two_to_the_31_inputs(kernel: Kernel) -> None:
    tokens, in_ = 2**16 + 5, 2**15 + 64
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    packed = pack(Block(64, 64), 64, in_, sparsity=0.9)
    x = torch.randn(tokens, in_, device="cuda", dtype=torch.float16)
    y = kernel.run(kernel.prepare(packed, spec_for(packed, (tokens,))), x)
    for rows in (slice(0, 64), slice(tokens - 64, tokens)):
        assert difference(y[rows], x[rows], unpack(packed)) is None
