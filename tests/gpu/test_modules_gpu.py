"""Sparse layers on CUDA: graphs, streams, threads, several GPUs, moves, autocast, torch.compile, convolutions."""

import threading
from collections.abc import Iterator

import pytest
import torch
from kernels import choose
from torch import Tensor, nn

from sparsify_compiler.errors import FallbackWarning
from sparsify_compiler.kernel import Kernel, MatmulSpec
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.layers.conv import SparseConv2d
from sparsify_compiler.runtime.layers.conv_windows import geometry_of
from sparsify_compiler.runtime.layers.modules import SparseLinear
from sparsify_compiler.runtime.oracle import difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]

PATTERNS: tuple[Pattern, ...] = (NM(2, 4), NM(8, 16), Unstructured(), Block(64, 64))
OUT, IN = 256, 512


def layers(device: str = "cuda", dtype: torch.dtype = torch.float16) -> Iterator[tuple[Kernel, SparseLinear, Tensor]]:
    """Every kernel of the release on every pattern that it takes, with the dense weight."""
    for pattern in PATTERNS:
        weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        keep = choose(pattern, weight, 0.75)
        packed = format_for(pattern).pack(weight, keep, pattern)
        spec = spec_for(packed, (1, 16))
        for kernel in kernels():
            if kernel.rejects(spec) is None:
                bias = torch.randn(OUT, device=device).to(dtype)
                yield kernel, SparseLinear(packed, bias, kernel.name, (1, 16)), weight * keep


def right(layer: SparseLinear, x: Tensor, weight: Tensor, y: Tensor) -> bool:
    assert layer.bias is not None
    return difference(y, x, weight, layer.bias.detach()) is None


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_a_captured_layer_replays_on_new_inputs(tokens: int) -> None:
    for kernel, layer, weight in layers():
        static = torch.randn(tokens, IN, device="cuda", dtype=torch.float16)
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                layer(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(static)
        static.copy_(torch.randn_like(static))
        graph.replay()
        assert right(layer, static, weight, y), kernel.name


def test_streams_do_not_wait_for_each_other_and_give_their_own_results() -> None:
    for kernel, layer, weight in layers():
        streams = [torch.cuda.Stream() for _ in range(3)]
        inputs = [torch.randn(4 + n, IN, device="cuda", dtype=torch.float16) for n in range(3)]
        torch.cuda.synchronize()
        found = []
        with torch.no_grad():
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(layer(x))
        torch.cuda.synchronize()
        assert all(right(layer, x, weight, y) for x, y in zip(inputs, found, strict=True)), kernel.name


def test_threads_that_did_not_load_the_layer_run_it_together() -> None:
    for kernel, layer, weight in layers():
        inputs = [torch.randn(1 + 7 * n, IN, device="cuda", dtype=torch.float16) for n in range(4)]
        found: dict[int, Tensor] = {}

        def work(number: int, layer: SparseLinear = layer, inputs: list[Tensor] = inputs, found=found) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    y = layer(inputs[number])
                torch.cuda.current_stream().synchronize()
                found[number] = y

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4, kernel.name
        assert all(right(layer, inputs[n], weight, found[n]) for n in range(4)), kernel.name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_layer_runs_on_the_gpu_that_holds_it_whichever_is_current() -> None:
    for kernel, layer, weight in layers("cuda:1"):
        x = torch.randn(5, IN, device="cuda:1", dtype=torch.float16)
        with torch.cuda.device(0), torch.no_grad():
            y = layer(x)
        assert y.device == x.device
        assert right(layer, x, weight, y), kernel.name


def test_a_layer_moved_to_the_cpu_and_back_says_so_once_and_runs_there() -> None:
    for kernel, layer, weight in layers():
        spec = MatmulSpec(OUT, IN, torch.float16, layer.pattern, 0.25, (1, 16), torch.device("cpu"))
        x = torch.randn(3, IN, device="cuda", dtype=torch.float16)
        if kernel.rejects(spec) is None:
            layer.cpu()
        else:
            with pytest.warns(FallbackWarning, match=f"kernel '{kernel.name}' cannot run"):
                layer.cpu()
            assert layer.running.kernel == "dense"
        assert right(layer, x.cpu(), weight.cpu(), layer(x.cpu()))
        layer.cuda()
        assert layer.running.kernel == kernel.name
        assert right(layer, x, weight, layer(x))


@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of its own affairs
def test_autocast_and_compiling_give_the_layers_own_result() -> None:
    torch._dynamo.reset()
    for kernel, layer, weight in layers():
        x = torch.randn(16, IN, device="cuda", dtype=torch.float16)
        with torch.no_grad():
            plain = layer(x)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                assert layer(x.float()).dtype == torch.bfloat16
            compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):
                y = compiled(x).clone()
        assert right(layer, x, weight, plain), kernel.name
        assert right(layer, x, weight, y), kernel.name
        torch._dynamo.reset()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 2)])
def test_a_sparse_convolution_equals_the_dense_one(size: int, stride: int, groups: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(128, 64, size, stride, size // 2, groups=groups, device="cuda", dtype=torch.float16)
    geometry = geometry_of(dense)
    rows = dense.weight.detach().permute(0, 2, 3, 1).reshape(groups, -1, geometry.columns)
    keep = torch.stack([NM(2, 4).select(row.float().abs(), 0.5, geometry.run) for row in rows])
    x = torch.randn(2, 128, 15, 13, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    kept = keep.reshape(64, size, size, -1).permute(0, 3, 1, 2)
    exact = nn.functional.conv2d(
        x.double(), (dense.weight * kept).double(), dense.bias.double(), stride, size // 2, 1, groups
    )
    for kernel in kernels():
        packed = format_for(NM(2, 4)).pack(rows[0], keep[0], NM(2, 4), geometry.run)
        spec = spec_for(packed, (10,), run=geometry.run)
        if kernel.rejects(spec) is None:
            layer = SparseConv2d.from_dense(dense.weight, keep, NM(2, 4), geometry, dense.bias, kernel.name)
            with torch.no_grad():
                y = layer(x)
            # One rounding to float16 of sums of at most 576 terms of size 0.03: 2^-11 of about 2.
            torch.testing.assert_close(y.double(), exact, rtol=2**-10, atol=2e-3)
