"""cuSPARSE on a CUDA GPU: what every algorithm, order and dtype gives or refuses, graphs, streams, threads, times.

One run with `-s` prints all of it: which combinations this library and GPU refuse, in the library's own words, and
the times beside dense.
"""

import dataclasses
import importlib.util
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from kernels import choose
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Kernel, Packed, Prepared
from sparsify_compiler.pattern import Block, Pattern, Unstructured
from sparsify_compiler.runtime.cusparse.blocked_ell import BLOCKS, CusparseBlockedEll
from sparsify_compiler.runtime.cusparse.bsr import CusparseBsr
from sparsify_compiler.runtime.cusparse.csr import CusparseCsr
from sparsify_compiler.runtime.cusparse.library import load
from sparsify_compiler.runtime.cusparse.plans import InstalledLibrary
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.tuning.timing import CudaStopwatch

NO_CUDA = "needs a CUDA GPU; torch.cuda.is_available() is False"
MISSING = InstalledLibrary().unavailable() if torch.cuda.is_available() else NO_CUDA
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

DEVICE = "cuda"
CSR, BSR, ELL = CusparseCsr(), CusparseBsr(), CusparseBlockedEll(most_padding=1e9)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WAYS = ("rows", "cols", "mixed")
TOKENS = (1, 2, 3, 8, 17, 64, 130)
SWEEP: tuple[tuple[Kernel, tuple[Pattern, ...], tuple[str, ...]], ...] = (
    (CSR, (Unstructured(),), ("spmv2", "spmv3", *(f"alg{a}.{way}" for a in (4, 6, 12) for way in WAYS))),
    (BSR, tuple(Block(b, b) for b in (1, 2, 3, 4, 8, 12, 16, 32, 64, 128)), ("spmv6", *(f"alg14.{w}" for w in WAYS))),
    (ELL, tuple(Block(b, b) for b in BLOCKS), tuple(f"alg13.{way}" for way in WAYS)),
)


def pack(pattern: Pattern, out: int, in_: int, dtype: torch.dtype, sparsity: float = 0.5) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return format_for(pattern).pack(weight, choose(pattern, weight, sparsity), pattern)


def prepare(kernel: Kernel, packed: Packed) -> Prepared:
    spec = spec_for(packed, (1,))
    if reason := kernel.rejects(spec):
        pytest.skip(reason)
    return kernel.prepare(packed, spec)


def named(prepared: Prepared, name: str) -> Prepared:
    return dataclasses.replace(prepared, variants=f"1={name}" if name else "")


def outcomes(kernel: Kernel, packed: Packed, name: str) -> Iterator[tuple[int, str | None]]:
    """For each token count: None for a right result, else what is wrong or the library's refusal."""
    prepared, weight = named(prepare(kernel, packed), name), unpack(packed)
    bias = torch.randn(packed.shape[0], device=DEVICE).to(weight.dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, packed.shape[1], device=DEVICE).to(weight.dtype)
        try:
            plain, added = kernel.run(prepared, x), kernel.run(prepared, x, bias)
        except KernelError as error:
            yield tokens, f"refused: {error}"
            continue
        yield tokens, difference(plain, x, weight) or difference(added, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "patterns", "names"), SWEEP, ids=lambda value: getattr(value, "name", ""))
def test_every_algorithm_and_order_is_right_or_refused_by_name(
    kernel: Kernel, patterns: Sequence[Pattern], names: Sequence[str], dtype: torch.dtype
) -> None:
    wrong = []
    for pattern in patterns:
        for shape in ((256, 192), (33, 70)):
            packed = pack(pattern, *shape, dtype)
            for name in ("", *names):
                found = dict(outcomes(kernel, packed, name))
                label = f"{kernel.name} {str(dtype)[6:]} {pattern} {shape} {name or 'own choice'}"
                for words in dict.fromkeys(filter(None, found.values())):
                    counts = [tokens for tokens, said in found.items() if said == words]
                    print(f"{label}, tokens {counts}: {words}")
                bad = [said for said in found.values() if said and (not name or not said.startswith("refused"))]
                wrong += [f"{label}: {said}" for said in bad[:1]]
    print(f"{kernel.name} {dtype}: {len(patterns)} patterns x {len(names) + 1} variants x {len(TOKENS)} token counts")
    assert not wrong, "\n".join(wrong)


CASES: tuple[tuple[Kernel, Pattern], ...] = ((CSR, Unstructured()), (BSR, Block(32, 32)), (ELL, Block(32, 32)))


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize(("kernel", "pattern"), CASES, ids=str)
def test_a_captured_graph_gives_the_eager_result_beside_eager_calls(
    kernel: Kernel, pattern: Pattern, tokens: int
) -> None:
    packed = pack(pattern, 256, 192, torch.float16)
    prepared = prepare(kernel, packed)
    x, bias = torch.randn(tokens, 192, device=DEVICE).half(), torch.randn(256, device=DEVICE).half()
    eager = kernel.run(prepared, x, bias, "relu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = kernel.run(prepared, x, bias, "relu")
        second = kernel.run(prepared, first.new_ones(tokens, 192) * x, bias, "relu")
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        eager = kernel.run(prepared, x, bias, "relu")  # the plan went with the graph: this makes another
        torch.cuda.synchronize()
        assert difference(first, x, unpack(packed), bias, "relu") is None
        assert torch.equal(first, eager)
        assert torch.equal(second, eager)


@pytest.mark.parametrize(("kernel", "pattern"), CASES, ids=str)
def test_a_warmed_call_makes_no_plan_and_allocates_its_result_only(kernel: Kernel, pattern: Pattern) -> None:
    prepared = prepare(kernel, pack(pattern, 256, 192, torch.float16))
    plans = InstalledLibrary().plans()
    x = torch.randn(64, 192, device=DEVICE).half()
    kernel.run(prepared, x)
    known, memory = len(plans), torch.cuda.memory_allocated()
    for _ in range(10):
        kernel.run(prepared, x)
    torch.cuda.synchronize()
    assert len(plans) == known
    assert torch.cuda.memory_allocated() == memory
    del prepared
    assert len(plans) < known


@pytest.mark.parametrize(("kernel", "pattern"), CASES, ids=str)
def test_the_kernels_own_choice_gives_the_same_bits_in_every_run(kernel: Kernel, pattern: Pattern) -> None:
    for dtype in (torch.float16, torch.float32):
        packed = pack(pattern, 1024, 2048, dtype)
        prepared = prepare(kernel, packed)
        for tokens in (1, 64):
            x = torch.randn(tokens, 2048, device=DEVICE).to(dtype)
            first = kernel.run(prepared, x)
            assert all(torch.equal(kernel.run(prepared, x), first) for _ in range(20)), (dtype, tokens)


def test_threads_and_streams_do_not_mix() -> None:
    packed = pack(Unstructured(), 512, 512, torch.float32)
    prepared, weight = prepare(CSR, packed), unpack(packed)
    said: list[str | None] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        generator = torch.Generator(DEVICE).manual_seed(seed)
        with torch.cuda.stream(stream):
            for tokens in (1, 7, 64) * 10:
                x = torch.randn(tokens, 512, device=DEVICE, generator=generator)
                said.append(difference(CSR.run(prepared, x), x, weight))
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [None] * 120


def test_every_gpu_is_served() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    for index in range(torch.cuda.device_count()):
        weight = torch.randn(64, 48, device=f"cuda:{index}")
        keep = Unstructured().select(weight.double().abs(), 0.5)
        packed = format_for(Unstructured()).pack(weight, keep, Unstructured())
        x = torch.randn(9, 48, device=f"cuda:{index}")
        assert difference(CSR.run(prepare(CSR, packed), x), x, weight * keep) is None


@pytest.mark.filterwarnings("default")  # what CuPy and its parts warn of is their own affair
def test_cupys_own_product_agrees() -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy to compare with")
    import cupy
    import cupyx.cusparse
    import cupyx.scipy.sparse

    packed = pack(Unstructured(), 256, 192, torch.float32)
    prepared, x = prepare(CSR, packed), torch.randn(64, 192, device=DEVICE)
    starts, columns, values = (cupy.from_dlpack(tensor) for tensor in prepared.tensors)
    try:
        weight = cupyx.scipy.sparse.csr_matrix((values, columns, starts), shape=packed.shape)
        theirs = torch.from_dlpack(cupyx.cusparse.spmm(weight, cupy.from_dlpack(x).T).T)
    except (RuntimeError, cupy.cuda.compiler.CompileException) as error:  # its own kernels need CUDA's headers
        pytest.skip(f"CuPy's product does not run here: {str(error).splitlines()[0]}")
    assert difference(theirs, x, unpack(packed)) is None
    torch.testing.assert_close(CSR.run(prepared, x), theirs, rtol=1e-4, atol=1e-4)  # sums of 96 terms in any order


def cold(prepared: Prepared) -> list[Prepared]:
    """Copy a weight until one round over the copies is twice the L2 cache."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    size = sum(tensor.numel() * tensor.element_size() for tensor in prepared.tensors)
    count = min(64, -(-2 * cache // size))
    others = (tuple(tensor.clone() for tensor in prepared.tensors) for _ in range(count - 1))
    return [prepared, *(dataclasses.replace(prepared, tensors=tensors) for tensors in others)]


def measured(watch: CudaStopwatch, calls: Sequence[Callable[[], object]]) -> float:
    measure = watch.load("", calls)
    return statistics.median(measure() for _ in range(7))


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize(
    ("kernel", "pattern", "dtype"),
    [
        (CSR, Unstructured(), torch.float16),
        (CSR, Unstructured(), torch.float32),
        (BSR, Block(32, 32), torch.float16),
        (BSR, Block(64, 64), torch.float16),
        (ELL, Block(32, 32), torch.float16),
        (ELL, Block(64, 64), torch.float16),
        (ELL, Block(128, 128), torch.float16),
    ],
    ids=str,
)
def test_times_beside_dense_are_printed(kernel: Kernel, pattern: Pattern, dtype: torch.dtype, sparsity: float) -> None:
    packed = pack(pattern, 14336, 4096, dtype, sparsity)
    copies, watch = cold(prepare(kernel, packed)), CudaStopwatch(torch.device(DEVICE))
    spec, weights = spec_for(packed, (1,)), [unpack(packed) for _ in range(2)]  # 117 MB each: two defeat any L2
    calls = load()
    assert not isinstance(calls, str)
    print(f"{kernel.name} {pattern} {dtype} 14336x4096 {sparsity:.0%}, cuSPARSE {calls.version}, {len(copies)} copies")
    # With more tokens CSR takes a third of a second a call and more (predicted): nobody would use it.
    for tokens in (1, 4, 16, 128) if kernel is CSR else (1, 16, 128, 1024, 8192):
        x = torch.randn(tokens, 4096, device=DEVICE).to(dtype)
        dense = measured(watch, [lambda w=w, x=x: functional.linear(x, w) for w in weights])  # type: ignore[misc]
        assert dense > 0
        for name in kernel.variants(spec, tokens):
            tuned = [named(copy, name) for copy in copies]
            try:
                kernel.run(tuned[0], x)
                sparse = measured(watch, [lambda c=c, x=x: kernel.run(c, x) for c in tuned])  # type: ignore[misc]
            except KernelError as error:
                print(f"  {tokens:5} {name:12} {error}")
                continue
            print(f"  {tokens:5} {name:12} {sparse:9.1f} us, dense {dense:9.1f} us: {dense / sparse:.2f}x")
