"""The tuner's decisions, with a stopwatch that follows a script instead of a clock."""

from dataclasses import dataclass

import pytest
import torch
from scripted import Fake, Script, decide, packed

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Prepared
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.tuning.timing import Comparison, CpuStopwatch, compare_pairs, spread
from sparsify_compiler.runtime.tuning.tune import Budget, Verdict, tune


def test_a_sparse_kernel_that_is_faster_beyond_the_spread_wins() -> None:
    verdict, _ = decide({("dense", 1): [10, 11, 10, 9], ("sparse", 1): [5, 5.5, 5, 4.5]}, Fake("sparse"))
    assert verdict.kernel == "sparse"
    (row,) = verdict.timings
    assert (row.kernel, row.tokens, row.time_us, row.dense_us) == ("sparse", 1, 5, 10)
    assert row.speedup == 2
    assert row.spread == 0  # the ratio is the same in every round, however much both vary
    assert row.verdict.startswith("faster: 2.00x")
    assert verdict.rounds == 8


def test_a_gain_within_the_spread_keeps_dense() -> None:
    verdict, _ = decide({("dense", 1): [10, 10, 10, 10], ("sparse", 1): [9, 7, 12, 10.5]}, Fake("sparse"))
    assert verdict.kernel == "dense"
    assert "against sparse 1.03x ±0.26 (within the spread)" in verdict.reason
    assert verdict.timings[0].verdict.startswith("no difference beyond the spread")


def test_a_slower_kernel_keeps_dense_and_says_so() -> None:
    verdict, _ = decide({("dense", 1): [10], ("sparse", 1): [12.5]}, Fake("sparse"))
    assert verdict.kernel == "dense"
    assert verdict.reason.startswith("dense: kept over 1 tokens against sparse 0.80x ±0.00")


def test_the_greatest_mean_gain_wins_and_the_counts_that_lose_a_little_are_named() -> None:
    times = {("dense", 1): [10], ("dense", 64): [100], ("sparse", 1): [10.5], ("sparse", 64): [40]}
    verdict, _ = decide(times, Fake("sparse"), tokens=(1, 64))
    assert verdict.kernel == "sparse"
    # the root of 10 / 10.5 * 100 / 40
    assert verdict.reason.startswith("sparse: 1.54x ±0.00 over 1, 64 tokens, slower at 1 (0.95x); not taken unless")
    assert [row.verdict.split(":")[0] for row in verdict.timings] == ["slower", "faster"]


def test_a_kernel_that_loses_more_than_a_tenth_anywhere_is_not_taken() -> None:
    times = {("dense", 1): [10], ("dense", 64): [100], ("sparse", 1): [11.2], ("sparse", 64): [10]}
    verdict, _ = decide(times, Fake("sparse"), tokens=(1, 64))
    assert verdict.kernel == "dense"
    assert "(slower at 1 (0.89x), 0.9x is the least that is taken)" in verdict.reason
    times["sparse", 1] = [11.1]
    assert decide(times, Fake("sparse"), tokens=(1, 64))[0].kernel == "sparse"


def test_of_two_that_win_the_faster_is_chosen_and_a_tie_goes_to_the_first() -> None:
    times = {("dense", 1): [10], ("a", 1): [8], ("b", 1): [5], ("c", 1): [5]}
    assert decide(times, Fake("a"), Fake("b"), Fake("c"))[0].kernel == "b"
    assert decide(times, Fake("a"), Fake("c"), Fake("b"))[0].kernel == "c"


def test_kernels_that_are_wrong_fail_or_refuse_are_named_and_never_timed() -> None:
    times = {("dense", 1): [10], ("wrong", 1): [1], ("good", 1): [9]}
    verdict, script = decide(
        times,
        Fake("wrong", offset=0.01),
        Fake("refusing", refusal="needs a GPU"),
        Fake("full", error=torch.OutOfMemoryError("out of memory: tried 9 GiB\ndetails")),
        Fake("failing", error=NotImplementedError("no such product")),
        Fake("good"),
    )
    assert verdict.kernel == "good"
    assert verdict.refused["wrong"].startswith("wrong result for 1 tokens: 12 of 12 outputs differ")
    assert verdict.refused["refusing"] == "needs a GPU"
    assert verdict.refused["full"] == "out of memory: out of memory: tried 9 GiB"
    assert verdict.refused["failing"] == "failed: no such product"
    assert {label.split()[0] for label in script.order} == {"dense", "good"}


def test_a_wrong_result_in_the_last_rows_is_found() -> None:
    @dataclass(frozen=True)
    class TailWrong(Fake):
        def run(self, prepared: Prepared, x: torch.Tensor, *rest: object) -> torch.Tensor:  # type: ignore[override]
            y = x @ prepared.tensors[0].T
            y[128:] = 0
            return y

    verdict, _ = decide({("dense", 130): [10], ("tail", 130): [1]}, TailWrong("tail"), tokens=(130,))
    assert "wrong result for 130 tokens" in verdict.refused["tail"]


def test_without_a_candidate_dense_stays_with_every_reason() -> None:
    verdict, script = decide({("dense", 1): [10]}, Fake("sparse", refusal="needs a GPU"))
    assert verdict == Verdict("dense", verdict.reason, refused={"sparse": "needs a GPU"})
    assert "no sparse kernel can run this weight" in verdict.reason
    assert script.order == []


def test_candidates_are_measured_in_turn_and_the_same_script_gives_the_same_verdict() -> None:
    times = {("dense", n): [10.0, 11] for n in (1, 4)} | {("sparse", n): [9.0, 9.5] for n in (1, 4)}
    first, script = decide(times, Fake("sparse"), tokens=(1, 4), most_rounds=2)
    assert script.order == ["dense 1", "sparse 1", "dense 4", "sparse 4"] * 2
    assert decide(times, Fake("sparse"), tokens=(1, 4), most_rounds=2)[0] == first


def test_rounds_stop_when_the_time_is_spent_but_not_before_the_least() -> None:
    times = {("dense", 1): [100_000.0], ("sparse", 1): [90_000.0]}
    assert decide(times, Fake("sparse"), seconds=0.5, least_rounds=3)[0].rounds == 3  # 0.19 s a round: 2 would do
    assert decide(times, Fake("sparse"), seconds=0.9, least_rounds=3)[0].rounds == 5
    assert decide(times, Fake("sparse"), seconds=9.0, least_rounds=3)[0].rounds == 8


def test_a_hopeless_candidate_is_given_up_after_the_look() -> None:
    times = {("dense", 1): [10], ("slow", 1): [30], ("sparse", 1): [9]}
    verdict, script = decide(times, Fake("slow"), Fake("sparse"))
    assert script.order.count("slow 1") == 3
    assert script.order.count("sparse 1") == script.order.count("dense 1") == 8
    assert verdict.kernel == "sparse"
    alone, script = decide(times, Fake("slow"))
    assert len(script.order) == 6  # with nobody left to compare, dense is not measured on
    assert "against slow 0.33x ±0.00" in alone.reason
    assert "given up" not in alone.reason  # measured as often as dense
    lost, _ = decide(times | {("sparse", 1): [11]}, Fake("slow"), Fake("sparse"))
    assert "sparse 0.91x ±0.00, slow 0.33x ±0.00 (given up after 3 rounds)" in lost.reason  # the best first


def test_asking_for_nothing_is_refused() -> None:
    spec = spec_for(packed(), ())
    with pytest.raises(KernelError, match="needs a kernel named dense and token counts"):
        tune(packed(), spec, (Fake("dense"),))
    with pytest.raises(KernelError, match="needs a kernel named dense"):
        tune(packed(), spec_for(packed(), (1,)), (Fake("sparse"),))
    with pytest.raises(KernelError, match="dense cannot run"):
        tune(packed(), spec_for(packed(), (1,)), (Fake("dense", offset=1),), stopwatch=Script({}))


def test_medians_and_spreads_are_those_of_the_definition() -> None:
    # Ratios 1, 2, 3, 4, 5: median 3, quartiles 2 and 4.
    assert compare_pairs([2, 4, 6, 8, 10], [2] * 5) == Comparison(3, 2 / 3, (2, 4))
    assert spread([7.0]) == 0
    assert Comparison(1.1, 0.2, (1.05, 1.27)).words() == "too noisy to tell"
    assert Comparison(1.3, 0.2, (1.1, 1.36)).words() == "faster"
    assert Comparison(3.0, 1.5, (0.5, 5.0)).words() == "no difference beyond the spread"  # a third of it lost
    assert Comparison(0.03, 1.29, (0.02, 0.06)).words() == "too noisy to tell"
    assert Comparison(0.7, 0.2, (0.66, 0.8)).words() == "slower"


def test_times_that_scatter_say_that_the_machine_was_busy() -> None:
    verdict, _ = decide({("dense", 1): [10, 30, 12, 40], ("sparse", 1): [5, 15, 6, 20]}, Fake("sparse"))
    assert verdict.kernel == "sparse"  # both were slowed down alike
    assert verdict.busy
    assert verdict.reason.endswith("; measured on a busy machine (spread 100%): measure again")
    calm, _ = decide({("dense", 1): [10, 12, 11, 13], ("sparse", 1): [5, 6, 5.5, 6.5]}, Fake("sparse"))
    assert not calm.busy
    assert "busy" not in calm.reason


def test_a_gain_smaller_than_its_own_spread_in_rounds_that_agree_is_too_noisy_to_tell() -> None:
    verdict, _ = decide({("dense", 1): [10], ("sparse", 1): [9, 7, 9, 4]}, Fake("sparse"))
    assert verdict.timings[0].verdict.startswith("too noisy to tell: 1.27x")
    assert "(too noisy to tell)" in verdict.reason


def test_the_cpu_stopwatch_repeats_short_calls() -> None:
    called = []
    measure = CpuStopwatch(shortest_us=500).load("short", [lambda: called.append(1)])
    warm = len(called)
    assert warm == 2
    assert measure() > 0
    assert len(called) - warm > 10


def test_the_real_kernels_are_tuned_on_this_machine() -> None:
    spec = spec_for(packed(), (1, 3))
    verdict = tune(packed(), spec, kernels(), bias=torch.randn(12), budget=Budget(seconds=0.05))
    assert all(row.time_us > 0 and row.dense_us > 0 for row in verdict.timings)
    assert {row.tokens for row in verdict.timings} == {1, 3} or "torch_csr" in verdict.refused
    assert {row.kernel for row in verdict.timings}.isdisjoint(verdict.refused)
