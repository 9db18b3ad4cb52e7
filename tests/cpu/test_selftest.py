"""A kernel that crashes, hangs or lies is refused in words by a child process, and the next one is still tried."""

import dataclasses
import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from sparsify_compiler.kernel import MatmulSpec
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.tuning import selftest as selftest_module
from sparsify_compiler.runtime.tuning.selftest import KERNELS, Case, Outcome, SelfTest, case_for
from sparsify_compiler.runtime.tuning.selftest_child import answer, random_packed

pytestmark = pytest.mark.usefixtures("child_processes")

FIND = "faulty_kernels:faulty"
TWO_FOUR = NM(2, 4)


def spec(pattern: Pattern = TWO_FOUR, in_: int = 64, density: float = 0.5, out: int = 48) -> MatmulSpec:
    return MatmulSpec(out, in_, torch.float32, pattern, density, (1, 20), torch.device("cpu"))


@pytest.fixture(scope="module")
def child() -> Iterator[SelfTest]:
    with SelfTest(FIND, step_seconds=60) as found:
        yield found


def refusal(child: SelfTest, kernel: str) -> str:
    outcome = child.test(kernel, spec(), True, "relu")
    assert outcome.refused is not None
    return outcome.refused


def test_a_kernel_that_crashes_is_refused_and_the_next_one_is_tried_in_a_new_child(child: SelfTest) -> None:
    reason = refusal(child, "crashes")
    assert reason.startswith("its self-test crashed (SIGSEGV) at variant 'only' of 77x")
    assert child.test("fine", spec(), True, "relu") == Outcome()


def test_a_kernel_that_raises_what_nobody_expects_is_refused_with_its_last_words(child: SelfTest) -> None:
    assert "ended with code 1 (ZeroDivisionError: this is nobody's error to catch)" in refusal(child, "unknown_error")
    assert child.test("fine", spec(), False, None) == Outcome()


def test_a_kernel_that_hangs_is_given_up_after_the_limit() -> None:
    with SelfTest(FIND, step_seconds=3) as child:
        outcome = child.test("hangs", spec(), False, None)
        assert outcome.refused is not None
        assert "hung for 3 s at variant 'only' of 77x" in outcome.refused
        assert not outcome.lasting
        assert child._child is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_child_killed_from_outside_may_be_luckier_next_time(child: SelfTest) -> None:
    outcome = child.test("is_killed", spec(), False, None)
    assert "crashed (SIGKILL)" in (outcome.refused or "")
    assert not outcome.lasting


def test_a_device_that_the_child_cannot_use_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    case = dataclasses.replace(case_for("dense", spec(), False, None), device="cuda:0")
    outcome, usable = answer(case, set(), lambda step: None)
    assert (outcome.refused or "").startswith("its self-test cannot use cuda:0: ")
    assert not outcome.lasting
    assert not usable


def test_wrong_and_unwritten_results_are_refused(child: SelfTest) -> None:
    assert "wrong result in its self-test for 1 tokens of 77x" in refusal(child, "garbage")
    assert "outputs differ from float64" in refusal(child, "skips_the_last_column")


def test_every_variant_is_tried_at_the_counts_that_name_it(child: SelfTest) -> None:
    assert "for 17 tokens of 77x397 by variant bad" in refusal(child, "wrong_in_one_variant")


def test_inputs_with_strides_are_tried(child: SelfTest) -> None:
    assert refusal(child, "refuses_strides") == "failed in its self-test: x must be contiguous"


def test_errors_and_lack_of_memory_are_told_apart(child: SelfTest) -> None:
    assert refusal(child, "raises") == "failed in its self-test: no such product"
    outcome = child.test("full", spec(), False, None)
    assert outcome == Outcome("out of memory in its self-test: tried to allocate 9 GiB", lasting=False)


def test_a_kernel_that_prints_without_end_is_heard_all_the_same(child: SelfTest) -> None:
    assert child.test("prints", spec(), False, None) == Outcome()


def test_a_kernel_that_refuses_odd_sides_is_tried_at_the_true_shape_only(child: SelfTest) -> None:
    assert child.test("picky_about_sides", spec(), False, None) == Outcome()
    assert "refuses the weight of its self-test" in (
        child.test("picky_about_sides", spec(in_=60), False, None).refused or ""
    )


def test_one_child_answers_many_questions(child: SelfTest) -> None:
    child.test("fine", spec(), False, None)
    process = child._child.process if child._child else None
    assert process is not None
    for pattern in (Unstructured(), NM(1, 4), NM(16, 32), Block(16, 8), Block(1, 1)):
        for density in (0.1, 0.5, 1.0):
            assert child.test("fine", spec(pattern, density=density), True, "gelu") == Outcome()
    assert child._child is not None
    assert child._child.process is process


def test_a_child_that_nobody_holds_any_more_is_ended() -> None:
    child = SelfTest(FIND)
    child.test("fine", spec(), False, None)
    assert child._child is not None
    process = child._child.process
    del child
    gc.collect()
    assert process.returncode is not None


def test_a_child_that_cannot_start_refuses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_module.sys, "executable", "no-such-python")
    with SelfTest(FIND) as child:
        outcome = child.test("fine", spec(), False, None)
    assert "could not start a process" in (outcome.refused or "")
    assert not outcome.lasting


@pytest.mark.parametrize(
    ("pattern", "density"),
    [(Unstructured(), 0.3), (NM(2, 4), 0.5), (NM(8, 32), 0.25), (Block(16, 16), 0.2), (Block(4, 3), 0.5)],
    ids=str,
)
def test_the_drawn_weight_has_the_pattern_and_about_the_density(pattern: Pattern, density: float) -> None:
    case = case_for("fine", spec(pattern, 640, density, 515), False, None)
    weight = unpack(random_packed(case, pattern, torch.float32))  # packing checks the pattern
    assert weight.shape == (515, 640)
    found = float((weight != 0).float().mean())
    assert abs(found - density) < 0.06  # 5 sigma of 1320 tiles kept with 0.2; an empty row of tiles of 33
    if not isinstance(pattern, NM):
        assert bool((weight == 0).all(dim=1).any())


def test_the_answer_is_the_same_without_a_process() -> None:
    steps: list[str] = []
    passed: set[Case] = set()
    case = case_for("garbage", spec(), False, None, FIND)
    outcome, usable = answer(case, passed, steps.append)
    assert "wrong result" in (outcome.refused or "")
    assert usable
    assert steps[0].startswith("the packing of 77x")
    unknown, _ = answer(case_for("no_such", spec(), False, None), passed, steps.append)
    assert "kernel 'no_such'" in (unknown.refused or "")
    assert answer(case_for("dense", spec(), False, None, KERNELS), passed, steps.append) == (Outcome(), True)
    steps.clear()
    assert answer(case_for("dense", spec(in_=80), False, None, KERNELS), passed, steps.append) == (Outcome(), True)
    assert not any("77x" in step for step in steps)  # the small weight is tried once
    assert answer(case_for("dense", spec(NM(1, 4)), False, None, KERNELS), passed, steps.append) == (Outcome(), True)
    assert any("77x" in step for step in steps)
