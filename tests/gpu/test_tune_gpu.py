"""The tuner on a CUDA GPU: its stopwatch against known work, its self-tests in a child that may die, cold weights."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from faulty_gpu_kernels import FIND

from sparsify_compiler.kernel import Kernel, MatmulSpec
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.tuning.candidates import Budget
from sparsify_compiler.runtime.tuning.cold import cold_copies, last_level_cache, prepared_bytes
from sparsify_compiler.runtime.tuning.selftest import Outcome, SelfTest
from sparsify_compiler.runtime.tuning.timing import CudaStopwatch
from sparsify_compiler.runtime.tuning.tune import tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]

CUDA = torch.device("cuda", 0)


def spec(out: int = 256, in_: int = 512, tokens: tuple[int, ...] = (1, 20)) -> MatmulSpec:
    capability = torch.cuda.get_device_capability(0)
    return MatmulSpec(out, in_, torch.float16, NM(2, 4), 0.5, tokens, CUDA, capability)


def test_a_replay_takes_as_long_as_the_eager_calls_of_long_work() -> None:
    weight, x = torch.randn(8192, 8192, device=CUDA), torch.randn(2048, 8192, device=CUDA)
    watch = CudaStopwatch(CUDA)
    graph = watch.load("dense 2048", [lambda: x @ weight.T])
    eager = watch.load("dense 2048", [lambda: x @ weight.T], capture=False)
    assert graph.note == ""
    assert eager.note
    ratio = sorted(graph() for _ in range(5))[2] / sorted(eager() for _ in range(5))[2]
    assert 0.8 < ratio < 1.25  # milliseconds of work each: launches do not show, clocks may differ a little


def test_short_work_in_a_graph_is_timed_without_its_launches() -> None:
    x = torch.zeros(16, device=CUDA)
    watch = CudaStopwatch(CUDA)
    assert watch.load("add 1", [lambda: x + 1])() < watch.load("add 1", [lambda: x + 1], capture=False)()


def test_a_call_that_asks_the_host_is_timed_eagerly_and_captures_go_on_after_it() -> None:
    x = torch.ones(1024, device=CUDA)
    watch = CudaStopwatch(CUDA)
    before = torch.cuda.current_stream()
    measure = watch.load("sync 1", [lambda: float(x.sum())])
    assert "cannot hold it" in measure.note
    assert measure() > 0
    assert torch.cuda.current_stream() == before
    assert watch.load("sum 1", [lambda: x.sum()]).note == ""


def test_copies_outgrow_the_cache_and_a_cold_weight_reads_slower_than_a_warm_one() -> None:
    assert last_level_cache(CUDA) >= 2**20
    side = 2048  # 8 MiB in float16: fits the L2 cache of anything recent
    packed = format_for(NM(2, 4)).pack(*_weight(side, side), NM(2, 4))
    kernel = Dense()
    prepared = kernel.prepare(packed, spec_for(packed, (1,)))
    copies, note = cold_copies(prepared, CUDA)
    assert not note
    assert len(copies) * prepared_bytes(prepared) >= 2 * last_level_cache(CUDA)
    x = torch.randn(1, side, device=CUDA, dtype=torch.float16)
    watch = CudaStopwatch(CUDA)
    cold = watch.load("cold 1", [_call(kernel, copy, x) for copy in copies])
    warm = watch.load("warm 1", [_call(kernel, copies[0], x)])
    assert sorted(cold() for _ in range(9))[4] > sorted(warm() for _ in range(9))[4]


@pytest.fixture(scope="module")
def child() -> Iterator[SelfTest]:
    with SelfTest(FIND, step_seconds=60) as found:
        yield found


def test_an_illegal_access_poisons_the_child_only(child: SelfTest) -> None:
    outcome = child.test("illegal_access", spec(), False, None)
    assert outcome.refused is not None
    assert child.test("fine", spec(), True, None) == Outcome()
    assert float(torch.ones(3, device=CUDA).sum()) == 3.0


def test_an_endless_kernel_is_killed_with_its_process() -> None:
    with SelfTest(FIND, step_seconds=5) as impatient:
        outcome = impatient.test("endless", spec(), False, None)
        assert "hung for 5 s" in (outcome.refused or "")
        assert impatient.test("fine", spec(), False, None) == Outcome()


def test_host_work_is_found_to_be_uncapturable_without_a_refusal(child: SelfTest) -> None:
    outcome = child.test("asks_the_host", spec(), False, None)
    assert outcome.refused is None
    assert outcome.uncapturable
    assert child.test("fine", spec(), False, None) == Outcome()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_release_is_tuned_and_the_winner_is_right(dtype: torch.dtype) -> None:
    weight, keep = _weight(2048, 2048)
    packed = format_for(NM(2, 4)).pack(weight.to(dtype), keep, NM(2, 4))
    asked = spec_for(packed, (1, 16, 256))
    with SelfTest() as tester:
        verdict = tune(packed, asked, kernels(), budget=Budget(seconds=0.2), tester=tester)
    assert all(row.time_us > 0 and row.dense_us > 0 for row in verdict.timings)
    named = {kernel.name: kernel for kernel in kernels()}
    if verdict.kernel in named:
        kernel: Kernel = named[verdict.kernel]
        prepared = dataclasses.replace(kernel.prepare(packed, asked), variants=verdict.variants)
        for tokens in (0, 1, 17, 300):
            x = torch.randn(tokens, 2048, device=CUDA).to(dtype)
            assert difference(kernel.run(prepared, x), x, unpack(packed)) is None


def test_memory_that_runs_out_drops_the_candidate_and_comes_back() -> None:
    @dataclass(frozen=True)
    class Greedy(Dense):
        name: str = "greedy"

        def run(self, prepared: object, x: torch.Tensor, *rest: object) -> torch.Tensor:  # type: ignore[override]
            free, _ = torch.cuda.mem_get_info(CUDA)
            return torch.empty(2 * free, dtype=torch.uint8, device=CUDA)

    packed = format_for(NM(2, 4)).pack(*_weight(512, 512), NM(2, 4))
    before = torch.cuda.memory_allocated(CUDA)
    verdict = tune(packed, spec_for(packed, (1,)), (Dense(), Greedy()), budget=Budget(seconds=0.05))
    assert verdict.refused["greedy"].startswith("out of memory")
    assert torch.cuda.memory_allocated(CUDA) <= before + 64 * 2**20  # cuBLAS workspaces of the stream


def _weight(out: int, in_: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(out, in_, device=CUDA, dtype=torch.float16)
    return weight, NM(2, 4).select(weight.float().abs(), 0.5)


def _call(kernel: Kernel, prepared: object, x: torch.Tensor) -> object:
    return lambda: kernel.run(prepared, x)  # type: ignore[arg-type]
