"""2:4 for many tokens on a GPU: sparse warpgroup products and cuSPARSELt, every variant, in graphs and in threads."""

import dataclasses
import threading

import pytest
import torch
from kernels import choose

from sparsify_compiler.kernel import Kernel, Packed, Prepared
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.cusparselt import CuSparseLt, TorchProducts
from sparsify_compiler.runtime.nm.nm24_wgmma import Nm24Wgmma
from sparsify_compiler.runtime.oracle import difference

KERNELS: tuple[Kernel, ...] = (Nm24Wgmma(), CuSparseLt(), CuSparseLt(TorchProducts()))
IDS = ("nm24_wgmma", "cusparselt", "cusparselt_torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]


def load(kernel: Kernel, out: int, in_: int, dtype: torch.dtype = torch.float16) -> tuple[Packed, Prepared]:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    packed = format_for(NM(2, 4)).pack(weight, choose(NM(2, 4), weight), NM(2, 4))
    spec = spec_for(packed, (64,))
    if reason := kernel.rejects(spec):
        pytest.skip(reason)
    return packed, kernel.prepare(packed, spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (33, 70), (264, 1000)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_all_token_counts_are_right(kernel: Kernel, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, prepared = load(kernel, *shape, dtype)
    bias, weight = torch.randn(shape[0], device="cuda").to(dtype), unpack(packed)
    for tokens in (*range(34), 63, 64, 65, 127, 128, 130, 257, 700):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        poisoned = torch.full((tokens, shape[0]), float("nan"), device="cuda", dtype=dtype)
        del poisoned  # the result is likely to get this memory
        y = kernel.run(prepared, x, bias, "relu")
        assert difference(y, x, weight, bias, "relu") is None, tokens


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_all_variants_are_right_and_ours_repeat_bit_for_bit(kernel: Kernel, shape: tuple[int, int]) -> None:
    packed, prepared = load(kernel, *shape)
    spec, weight = spec_for(packed, (64,)), unpack(packed)
    for tokens in (16, 64, 256, 1024):
        x = torch.randn(tokens, shape[1], device="cuda").half()
        for name in kernel.variants(spec, tokens):
            chosen = dataclasses.replace(prepared, variants=f"{tokens}={name}")
            y = kernel.run(chosen, x)
            assert difference(y, x, weight) is None, (tokens, name)
            if kernel.name == "nm24_wgmma":
                assert torch.equal(kernel.run(chosen, x), y), (tokens, name)


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_a_captured_call_reads_its_inputs_again(kernel: Kernel) -> None:
    packed, prepared = load(kernel, 256, 512)
    for tokens in (3, 200):
        x, bias = torch.randn(tokens, 512, device="cuda").half(), torch.randn(256, device="cuda").half()
        kernel.run(prepared, x, bias)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernel.run(prepared, x, bias)
        x.normal_()
        bias.normal_()
        graph.replay()
        assert difference(y, x, unpack(packed), bias) is None


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_threads_and_streams_get_the_same_result(kernel: Kernel) -> None:
    packed, prepared = load(kernel, 256, 512)
    x = torch.randn(100, 512, device="cuda").half()
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.extend(kernel.run(prepared, x) for _ in range(20))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    weight = unpack(packed)
    assert all(difference(y, x, weight) is None for y in results)
