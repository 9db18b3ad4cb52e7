"""How the tuner finds the best variant of each kernel, what it says of memory, and who may start at all."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from scripted import Fake, Script, decide, packed

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.tuning import cold
from sparsify_compiler.runtime.tuning.cold import MOST_COPIES, copies
from sparsify_compiler.runtime.tuning.selftest import Outcome
from sparsify_compiler.runtime.tuning.tune import Budget, tune
from sparsify_compiler.runtime.variants import read_variants, variant_for, write_variants


def choices(*names: str, tokens: int = 1) -> dict[int, tuple[str, ...]]:
    return {tokens: names}


@dataclass
class Judge:
    """A tester that knows its outcomes by kernel and remembers what it was asked."""

    outcomes: dict[str, Outcome]
    asked: list[str] = field(default_factory=list)

    def test(self, kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None) -> Outcome:
        self.asked.append(kernel)
        return self.outcomes.get(kernel, Outcome())


def test_the_fastest_variant_is_found_by_halving_and_measured_against_dense() -> None:
    names = ("own", "b", "c", "d", "e")
    times = {("dense", 1): [10.0]} | {
        (f"sparse {name}", 1): [t] for name, t in zip(names, (9, 8, 4, 7, 5), strict=True)
    }
    verdict, script = decide(times, Fake("sparse", choices=choices(*names)))
    assert (verdict.kernel, verdict.variants) == ("sparse", "1=c")
    assert verdict.timings[0].variant == "c"
    assert verdict.timings[0].speedup == 2.5
    # One look at the own choice beside dense; five for 3 rounds, three for 3, two for 3, then 8 rounds of the winner.
    counts = [script.order.count(f"sparse {name} 1") for name in names]
    assert counts == [4, 3, 9 + 8, 6, 9]


def test_each_token_count_gets_its_own_variant_and_one_without_a_name_stays_so() -> None:
    times = {
        **{("dense", n): [10.0] for n in (1, 16, 64)},
        ("sparse", 1): [5.0],
        ("sparse own", 16): [5.0],
        ("sparse other", 16): [4.0],
        ("sparse own", 64): [5.0],
        ("sparse other", 64): [6.0],
    }
    fake = Fake("sparse", choices={16: ("own", "other"), 64: ("own", "other")})
    verdict, _ = decide(times, fake, tokens=(1, 16, 64))
    assert verdict.variants == "1=;16=other;64=own"
    assert [variant_for(verdict.variants, n) for n in (0, 1, 2, 16, 64, 9999)] == [
        "",
        "",
        "other",
        "other",
        "own",
        "own",
    ]
    assert read_variants(write_variants({1: "", 64: ""})) == ()


def test_a_tie_goes_to_the_kernels_own_choice() -> None:
    times = {("dense", 1): [10.0], ("sparse own", 1): [5.0], ("sparse b", 1): [5.0]}
    assert decide(times, Fake("sparse", choices=choices("own", "b")))[0].variants == "1=own"


def test_the_variants_of_a_hopeless_kernel_are_not_tried() -> None:
    times = {("dense", 1): [10.0], ("slow own", 1): [41.0]}  # a second variant would not be found in the script
    verdict, _ = decide(times, Fake("slow", choices=choices("own", "b")))
    assert verdict.kernel == "dense"


def test_variants_stop_being_loaded_when_their_time_is_spent_and_the_reason_says_so() -> None:
    second = 1e6
    times = {("dense", 1): [10 * second], ("sparse own", 1): [6 * second], ("sparse b", 1): [5 * second]}
    fake = Fake("sparse", choices=choices("own", "b", "c"))
    verdict, _ = decide(times, fake, variant_seconds=1.0)
    assert verdict.variants == "1=own"
    assert "2 variants not tried at 1 tokens for lack of time" in verdict.reason
    times[("sparse c", 1)] = [4 * second]
    assert decide(times, fake, variant_seconds=1000.0)[0].variants == "1=c"


def test_a_variant_that_is_wrong_on_the_real_weight_refuses_the_kernel() -> None:
    times = {("dense", 1): [10.0], ("sparse own", 1): [5.0], ("sparse wrong", 1): [1.0]}
    verdict, _ = decide(times, Fake("sparse", choices=choices("own", "wrong")))
    assert verdict.kernel == "dense"
    assert verdict.refused["sparse"].startswith("wrong result for 1 tokens by variant wrong: 12 of 12 outputs")


def test_what_the_stopwatch_notes_stands_in_the_reason() -> None:
    script = Script({("dense", 1): [10.0], ("sparse", 1): [5.0]}, {"sparse": "timed without a CUDA graph"})
    verdict = tune(packed(), spec_for(packed(), (1,)), (Fake("dense"), Fake("sparse")), stopwatch=script)
    assert verdict.reason.endswith("; timed without a CUDA graph")


def test_a_kernel_starts_only_after_its_self_test_and_dense_needs_none() -> None:
    judge = Judge({"bad": Outcome("its self-test crashed (SIGSEGV)"), "eager": Outcome(uncapturable="host work")})
    script = Script({("dense", 1): [10.0], ("good", 1): [5.0], ("eager", 1): [6.0]})
    kernels = (Fake("dense"), Fake("no", refusal="needs a GPU"), Fake("bad"), Fake("good"), Fake("eager"))
    verdict = tune(packed(), spec_for(packed(), (1,)), kernels, stopwatch=script, tester=judge)
    assert judge.asked == ["bad", "good", "eager"]
    assert verdict.kernel == "good"
    assert verdict.refused == {"no": "needs a GPU", "bad": "its self-test crashed (SIGSEGV)"}
    assert script.captured == {"dense": True, "good": True, "eager": False}


def test_the_bytes_of_every_candidate_are_reported() -> None:
    @dataclass(frozen=True)
    class Large(Fake):
        def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
            dense = super().prepare(packed, spec)
            return dataclasses.replace(dense, tensors=(*dense.tensors, torch.zeros(1000)))

    verdict, _ = decide({("dense", 1): [10.0], ("large", 1): [5.0]}, Large("large"))
    assert verdict.size_bytes == {"dense": 12 * 16 * 4, "large": 12 * 16 * 4 + 4000}


@pytest.mark.parametrize(
    "error", [MemoryError("none left"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_drops_that_candidate_alone(error: Exception) -> None:
    verdict, _ = decide({("dense", 1): [10.0], ("good", 1): [5.0]}, Fake("full", error=error), Fake("good"))
    assert verdict.refused["full"].startswith("out of memory: ")
    assert verdict.kernel == "good"


def test_inputs_that_do_not_fit_into_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: int, generator: torch.Generator) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 TB")

    spec_one = spec_for(packed(), (1,))
    given = packed()
    monkeypatch.setattr(torch, "randn", full)
    spec = dataclasses.replace(spec_one, tokens=(2**40,))
    with pytest.raises(
        KernelError, match=r"at 1099511627776 tokens: inputs of 17592186044416 torch.float32 do not fit"
    ):
        tune(given, spec, (Fake("dense"),), stopwatch=Script({}))


def test_no_rows_at_all_are_refused_in_words() -> None:
    with pytest.raises(KernelError, match=r"token counts of at least 1; found kernels dense and tokens \(1, 0\)"):
        tune(packed(), spec_for(packed(), (1, 0)), (Fake("dense"),))


def test_copies_outgrow_the_cache_twice_within_a_share_of_the_memory() -> None:
    free = 10**12
    assert copies(10, 100, free) == (20, "")
    assert copies(30, 100, free) == (7, "")  # 210 >= 200
    assert copies(500, 100, free) == (1, "")
    assert copies(0, 100, free) == (MOST_COPIES - 56, "")
    assert copies(1, 10_000, free) == (MOST_COPIES, f"weights partly in the cache: {MOST_COPIES} copies are the most")
    assert copies(10, 100, 1000) == (6, "weights partly in the cache: too little free memory for copies")
    assert copies(10, 100, 0) == (1, "weights partly in the cache: too little free memory for copies")
    assert copies(10, 0, 0) == (1, "")


def test_calls_take_turns_over_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "last_level_cache", lambda device: 12 * 16 * 4 * 5)
    seen: list[int] = []

    @dataclass(frozen=True)
    class Watching(Fake):
        def run(self, prepared: Prepared, *rest: object) -> torch.Tensor:  # type: ignore[override]
            seen.append(prepared.tensors[0].data_ptr())
            return super().run(prepared, *rest)  # type: ignore[arg-type]

    _, script = decide({("dense", 1): [10.0], ("sparse", 1): [5.0]}, Watching("sparse"))
    assert script.calls["sparse 1"] == 10
    assert len(set(seen)) == 2  # the script calls the last copy; the check ran on the first


def test_the_default_budget_is_bounded() -> None:
    budget = Budget()
    assert budget.seconds <= 1
    assert budget.variant_seconds <= 60


def test_what_the_caller_has_switched_on_does_not_reach_the_kernels() -> None:
    seen: list[tuple[bool, bool]] = []

    @dataclass(frozen=True)
    class Watching(Fake):
        def run(self, *arguments: object) -> torch.Tensor:  # type: ignore[override]
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return super().run(*arguments)  # type: ignore[arg-type]

    bias = torch.zeros(12, requires_grad=True)
    script = Script({("dense", 1): [10.0], ("sparse", 1): [5.0]})
    kernels = (Fake("dense"), Watching("sparse"))
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert tune(packed(), spec_for(packed(), (1,)), kernels, bias, stopwatch=script).kernel == "sparse"
    assert set(seen) == {(False, False)}
