"""The n:m tensor-core kernel and the expanding kernel on a GPU, at real sizes and captured in a graph."""

import pytest
import torch

from sparsify_compiler.kernel import Kernel
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import NMFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm_mma import NmMma
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.unstructured.expand import ExpandDense
from sparsify_compiler.runtime.variants import write_variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
PATTERNS = tuple(NM(keep, of) for keep, of in ((4, 8), (2, 8), (8, 16), (4, 16), (16, 32), (8, 32)))
KERNELS: tuple[Kernel, ...] = (NmMma(), ExpandDense())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_variant_of_a_real_layer_is_right_and_repeats_in_a_graph(pattern: NM, kernel: Kernel) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(1)
    for out, in_, dtype in ((4096, 14336, torch.float16), (1000, 777, torch.bfloat16)):
        weight = torch.randn(out, in_, generator=generator, device=device).to(dtype)
        packed = NMFormat().pack(weight, pattern.select(weight.abs().double(), 0.5), pattern)
        bias = torch.randn(out, generator=generator, device=device).to(dtype)
        dense = unpack(packed)
        # One pattern of each order of values in all variants, the others in every third: programs take 0.1 s each.
        whole = dtype == torch.float16 and (pattern.keep, pattern.of) in ((4, 8), (2, 8), (16, 32))
        for tokens in (1, 17, 64, 130):
            spec = spec_for(packed, (tokens,))
            if reason := kernel.rejects(spec):
                pytest.skip(reason)
            x = torch.randn(tokens, in_, generator=generator, device=device).to(dtype)
            prepared = kernel.prepare(packed, spec)
            for variant in kernel.variants(spec, tokens)[:: 1 if whole and tokens < 130 else 3]:
                chosen = type(prepared)(
                    prepared.kernel, prepared.shape, prepared.tensors, write_variants({tokens: variant})
                )
                y = kernel.run(chosen, x, bias, "silu")
                assert difference(y, x, dense, bias, "silu") is None, (variant, tokens)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = kernel.run(chosen, x, bias, "silu")
            replayed.fill_(float("nan"))
            graph.replay()
            assert torch.equal(replayed, y)
