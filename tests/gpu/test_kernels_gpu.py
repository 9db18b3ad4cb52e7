"""Every kernel on a CUDA GPU against float64, captured in a graph, and the tuner with CUDA's own clock."""

import dataclasses

import pytest
import torch
from kernels import LAYOUT_PATTERNS, accepted, choose

from sparsify_compiler.kernel import Kernel, MatmulSpec
from sparsify_compiler.pattern import Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import capability, kernels, spec_for
from sparsify_compiler.runtime.layers.modules import SparseLinear
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.tuning.tune import Budget, tune
from sparsify_compiler.runtime.variants import write_variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]


def draw(pattern: Pattern, out: int, in_: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    return weight, choose(pattern, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", LAYOUT_PATTERNS, ids=str)
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_every_kernel_equals_float64_on_the_gpu(kernel: Kernel, pattern: Pattern, dtype: torch.dtype) -> None:
    for out, in_ in ((7, 5), (33, 70), (256, 192)):
        weight, keep = draw(pattern, out, in_, dtype)
        packed = format_for(pattern).pack(weight, keep, pattern)
        assert torch.equal(unpack(packed), weight * keep)
        for tokens in (0, 1, 3, 17, 130):
            spec = spec_for(packed, (tokens,))
            if reason := kernel.rejects(spec):
                pytest.skip(reason)
            x, bias = torch.randn(tokens, in_, device="cuda").to(dtype), torch.randn(out, device="cuda").to(dtype)
            prepared = kernel.prepare(packed, spec)
            for variant in kernel.variants(spec, tokens) if tokens == 17 and out == 33 else ("",):
                chosen = dataclasses.replace(prepared, variants=write_variants({tokens: variant}))
                y = kernel.run(chosen, x, bias)
                assert difference(y, x, unpack(packed), bias) is None, variant
            y = kernel.run(prepared, x, bias, "gelu")
            assert difference(y, x, unpack(packed), bias, "gelu") is None


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_a_captured_layer_gives_the_eager_result(kernel: Kernel) -> None:
    found = accepted(kernel, torch.device("cuda", 0))
    if not found:
        pytest.skip("runs nothing on this GPU; `sparsify-compiler kernels` says why")
    dtype = next(dtype for dtype in (torch.float16, torch.float32) if _runs(kernel, found[0], dtype))
    weight, keep = draw(found[0], 64, 64, dtype)
    module = SparseLinear.from_dense(weight, keep, found[0], None, kernel.name)
    x = torch.randn(8, 64, device="cuda").to(dtype)
    eager = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    assert difference(eager, x, module.weight) is None
    torch.testing.assert_close(y, eager, rtol=0, atol=0)  # the same launches on the same numbers


def _runs(kernel: Kernel, pattern: Pattern, dtype: torch.dtype) -> bool:
    device = torch.device("cuda", 0)
    return kernel.rejects(MatmulSpec(64, 64, dtype, pattern, 0.5, (8,), device, capability(device))) is None


def test_a_layer_moves_between_cpu_and_gpu() -> None:
    weight, keep = draw(Unstructured(), 64, 48, torch.float32)
    module = SparseLinear.from_dense(weight.cpu(), keep.cpu(), Unstructured(), None, "torch_csr")
    x = torch.randn(5, 48)
    on_gpu = module.cuda()(x.cuda())
    assert on_gpu.is_cuda
    assert difference(on_gpu, x.cuda(), weight * keep) is None
    assert difference(module.cpu()(x), x, (weight * keep).cpu()) is None


def test_the_tuner_measures_on_the_gpu() -> None:
    weight, keep = draw(Unstructured(), 1024, 1024, torch.float32)
    packed = format_for(Unstructured()).pack(weight, keep, Unstructured())
    verdict = tune(packed, spec_for(packed, (1, 64)), kernels(), budget=Budget(seconds=0.2))
    assert verdict.kernel in {kernel.name for kernel in kernels()} or "@" in verdict.kernel
    assert verdict.timings or verdict.refused
    assert all(row.time_us > 0 and row.dense_us > 0 for row in verdict.timings)
