"""The 2:4 kernel for few tokens on a GPU: variants, token counts, poisoned outputs, capture, devices."""

import dataclasses

import pytest
import torch
from kernels import choose

from sparsify_compiler.kernel import Packed, Prepared
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm24 import Nm24Mma
from sparsify_compiler.runtime.oracle import difference

KERNEL = Nm24Mma()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]


def load(out: int, in_: int, dtype: torch.dtype = torch.float16, device: str = "cuda") -> tuple[Packed, Prepared]:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    packed = format_for(NM(2, 4)).pack(weight, choose(NM(2, 4), weight), NM(2, 4))
    spec = spec_for(packed, (1, 64))
    if reason := KERNEL.rejects(spec):
        pytest.skip(reason)
    return packed, KERNEL.prepare(packed, spec)


def poison(count: int) -> None:
    """Fill the memory that the next small tensors will get with NaN."""
    poisoned = [torch.full((count,), float("nan"), device="cuda", dtype=torch.float16) for _ in range(4)]
    del poisoned


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (33, 70), (256, 192), (1000, 4096)], ids=str)
def test_all_token_counts_are_right(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, prepared = load(*shape, dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for tokens in range(131):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        poison(tokens * shape[0])
        y = KERNEL.run(prepared, x, bias, "gelu")
        assert difference(y, x, unpack(packed), bias, "gelu") is None, tokens


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)], ids=str)
def test_all_variants_are_right_and_repeat_bit_for_bit(shape: tuple[int, int]) -> None:
    packed, prepared = load(*shape)
    spec, weight = spec_for(packed, (1, 64)), unpack(packed)
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        x = torch.randn(tokens, shape[1], device="cuda").half()
        for name in KERNEL.variants(spec, tokens):
            chosen = dataclasses.replace(prepared, variants=f"{tokens}={name}")
            y = KERNEL.run(chosen, x)
            assert difference(y, x, weight) is None, name
            assert torch.equal(KERNEL.run(chosen, x), y), name


def test_a_captured_call_reads_its_inputs_again() -> None:
    packed, prepared = load(256, 512)
    x = torch.randn(3, 512, device="cuda").half()
    KERNEL.run(prepared, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = KERNEL.run(prepared, x)
    x.copy_(torch.randn(3, 512).half())
    graph.replay()
    assert difference(y, x, unpack(packed)) is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_used_while_the_first_is_current() -> None:
    packed, prepared = load(64, 128, device="cuda:1")
    x = torch.randn(3, 128, device="cuda:1").half()
    assert difference(KERNEL.run(prepared, x), x, unpack(packed)) is None
