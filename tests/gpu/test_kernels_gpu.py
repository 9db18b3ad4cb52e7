"""Every kernel on a CUDA GPU against float64, captured in a graph, and the tuner with CUDA's own clock."""

import pytest
import torch
from kernels import KERNELS, LAYOUT_PATTERNS, choose

from sparsify_compiler.kernel import Kernel
from sparsify_compiler.pattern import NM, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.modules import SparseLinear
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.tune import Budget, tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]


def draw(pattern: Pattern, out: int, in_: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    return weight, choose(pattern, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", LAYOUT_PATTERNS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
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
            y = kernel.run(kernel.prepare(packed, spec), x, bias, "gelu")
            assert difference(y, x, unpack(packed), bias, "gelu") is None


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_captured_layer_gives_the_eager_result(kernel: Kernel) -> None:
    weight, keep = draw(NM(2, 4), 64, 64, torch.float32)
    module = SparseLinear.from_dense(weight, keep, NM(2, 4), None, kernel.name)
    x = torch.randn(8, 64, device="cuda")
    eager = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    torch.testing.assert_close(y, eager, rtol=0, atol=1e-5)  # 32 float32 terms of size 1, in any order


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
    assert verdict.kernel in {"dense", "torch_csr"}
    assert verdict.timings or verdict.refused
    assert all(row.time_us > 0 and row.dense_us > 0 for row in verdict.timings)
