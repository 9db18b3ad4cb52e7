"""Patterns: exact counts, shapes, ties, text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods import PATTERNS, Case, every_case, obeys
from torch import Tensor

from sparsify_compiler.errors import PatternError
from sparsify_compiler.pattern import (
    MANY_ROWS,
    NM,
    SHORT_ROW,
    Block,
    Pattern,
    Unstructured,
    keep_largest,
    parse_pattern,
)

nm = st.integers(2, 40).flatmap(lambda of: st.builds(NM, st.integers(1, of - 1), st.just(of)))
blocks = st.builds(Block, st.integers(1, 128), st.integers(1, 128))
patterns = st.one_of(st.just(Unstructured()), nm, blocks)
sparsities = st.floats(0, 1, exclude_max=True)
few_values = st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")])  # few, so that ties are the rule


@st.composite
def score_tables(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    values = draw(st.lists(few_values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values).reshape(rows, columns)


def brute_force(scores: Tensor, count: int) -> Tensor:
    """Keep the first `count` of every row in a stable order from high to low."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        order = sorted(range(len(values)), key=lambda i: -values[i])  # Python's sort is stable
        keep[row, order[: max(count, 0)]] = True
    return keep


@given(score_tables(), st.integers(-1, 13))
def test_keep_largest_equals_a_stable_sort(scores: Tensor, count: int) -> None:
    assert torch.equal(keep_largest(scores, count), brute_force(scores, count))


@pytest.mark.parametrize("n", [2, 4, 5, SHORT_ROW])
def test_many_short_rows_are_selected_from_as_few_are(n: int) -> None:
    few = torch.randint(0, 4, (32, n), generator=torch.Generator().manual_seed(n)).float()  # many ties
    for count in range(n + 1):
        whole = keep_largest(few.repeat(MANY_ROWS // 32, 1), count)
        assert torch.equal(whole, brute_force(few, count).repeat(MANY_ROWS // 32, 1))


def test_ties_keep_the_lowest_index() -> None:
    assert keep_largest(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 2).tolist() == [[True, True, False, False]]


def test_the_brute_force_oracle_tells_a_wrong_mask() -> None:
    wrong = torch.tensor([[False, True, True]])
    assert not torch.equal(brute_force(torch.tensor([[1.0, 1.0, 1.0]]), 2), wrong)


@given(patterns)
def test_text_round_trips(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", "2-4", "2:4:8", "64*64", "-2:4", "2:4x", "half", "2.0:4", "64x", "unstructured 0.5"]
)
def test_text_that_is_no_pattern_is_refused_with_the_known_forms(text: str) -> None:
    with pytest.raises(PatternError, match="write unstructured, kept:of"):
        parse_pattern(text)


def test_text_is_read_without_regard_to_case_and_outer_space() -> None:
    assert parse_pattern(" Unstructured ") == Unstructured()
    assert parse_pattern("64X32") == Block(64, 32)


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "0x4", "4x0"])
def test_impossible_numbers_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match=text):
        parse_pattern(text)


@given(st.integers(1, 9), st.integers(1, 30), sparsities, st.sampled_from(["layer", "row"]), st.integers(0, 99))
def test_unstructured_removes_the_rounded_count(out: int, in_: int, sparsity: float, scope: str, seed: int) -> None:
    scores = torch.rand(out, in_, generator=torch.Generator().manual_seed(seed))
    keep = Unstructured().select(scores, sparsity, scope=scope)  # type: ignore[arg-type]
    removed = (~keep).sum(dim=1)
    if scope == "row":
        assert removed.tolist() == [round(in_ * sparsity)] * out
    else:
        assert int(removed.sum()) == round(out * in_ * sparsity)
    assert int(removed.sum()) == Unstructured().removed(out, in_, sparsity, scope=scope)  # type: ignore[arg-type]


@given(nm, st.integers(1, 4), st.integers(1, 3), st.integers(1, 50), st.integers(0, 99))
def test_nm_keeps_the_best_of_every_group_and_never_crosses_a_run(
    pattern: NM, out: int, taps: int, run: int, seed: int
) -> None:
    in_ = taps * run
    scores = torch.rand(out, in_, generator=torch.Generator().manual_seed(seed))
    keep = pattern.select(scores, 0.0, run)
    assert obeys(pattern, keep, run) is None
    assert int((~keep).sum()) == pattern.removed(out, in_, 0.0, run)
    for start, stop in pattern.groups(in_, run):
        assert torch.equal(keep[:, start:stop], brute_force(scores[:, start:stop], pattern.keep))


@given(nm, st.integers(1, 4), st.integers(1, 50))
def test_nm_groups_cover_every_column_once(pattern: NM, taps: int, run: int) -> None:
    groups = pattern.groups(taps * run, run)
    assert [column for start, stop in groups for column in range(start, stop)] == list(range(taps * run))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), sparsities, st.integers(0, 99))
def test_block_removes_whole_tiles_of_lowest_sum(
    rows: int, cols: int, down: int, across: int, sparsity: float, seed: int
) -> None:
    pattern = Block(rows, cols)
    scores = torch.rand(rows * down, cols * across, generator=torch.Generator().manual_seed(seed)).double()
    keep = pattern.select(scores, sparsity)
    assert obeys(pattern, keep, None) is None
    sums = [
        (float(scores[r * rows : (r + 1) * rows, c * cols : (c + 1) * cols].sum()), bool(keep[r * rows, c * cols]))
        for r in range(down)
        for c in range(across)
    ]
    assert sum(not kept for _, kept in sums) == round(down * across * sparsity)
    lost = [value for value, kept in sums if not kept]
    held = [value for value, kept in sums if kept]
    # Sums in another order differ by rounding: 16 terms below 1 in float64.
    assert not lost or not held or max(lost) <= min(held) + 1e-12


@every_case
def test_selection_obeys_the_pattern_with_the_stated_count(case: Case) -> None:
    scores = torch.rand(case.out, case.in_, generator=torch.Generator().manual_seed(0))
    keep = case.pattern.select(scores, case.sparsity, case.run)
    assert obeys(case.pattern, keep, case.run) is None
    assert int((~keep).sum()) == case.pattern.removed(case.out, case.in_, case.sparsity, case.run)
    assert case.pattern.misfit(case.out, case.in_, case.run) is None


def test_obeys_tells_a_mask_that_breaks_its_pattern() -> None:
    keep = torch.tensor([[True, True, False, True]])
    assert obeys(NM(2, 4), keep, None) is not None
    assert obeys(Block(1, 2), keep, None) is not None
    assert obeys(Unstructured(), keep, None) is None


def test_the_list_of_cases_has_every_kind_of_pattern_tails_and_runs() -> None:
    assert {type(case.pattern) for case in PATTERNS} == {Unstructured, NM, Block}
    assert any(isinstance(c.pattern, NM) and c.run and c.run % c.pattern.of for c in PATTERNS)


@pytest.mark.parametrize(
    ("pattern", "shape", "found"),
    [
        (Block(64, 64), (100, 128, None), r"Block\(64, 64\) does not tile weight \(100, 128\)"),
        (Block(4, 4), (8, 27, 9), "9 input channels a tap"),
        (NM(2, 4), (8, 3, None), "needs at least 4 inputs to choose from; found 3 inputs"),
        (NM(2, 4), (8, 27, 3), "3 input channels a tap"),
    ],
)
def test_a_pattern_that_does_not_fit_says_what_it_found(
    pattern: Pattern, shape: tuple[int, int, int | None], found: str
) -> None:
    reason = pattern.misfit(*shape)
    assert reason is not None
    with pytest.raises(PatternError, match=found):
        raise PatternError(reason)


def test_block_selection_refuses_a_weight_it_does_not_tile() -> None:
    with pytest.raises(PatternError, match="does not tile"):
        Block(4, 4).select(torch.ones(6, 8), 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(1, 1)], ids=str)
def test_a_sparsity_outside_zero_to_one_is_refused(pattern: Pattern, sparsity: float) -> None:
    with pytest.raises(PatternError, match=r"must lie in \[0, 1\)"):
        pattern.select(torch.ones(2, 2), sparsity)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(1, 2), Block(1, 1)], ids=str)
def test_scores_with_nan_are_refused(pattern: Pattern) -> None:
    with pytest.raises(PatternError, match="contain NaN"):
        pattern.select(torch.tensor([[float("nan"), 1.0]]), 0.5)


def test_fixed_sparsity_is_the_share_removed() -> None:
    assert NM(1, 4).fixed_sparsity() == 0.75
    assert Unstructured().fixed_sparsity() is None
    assert Block(2, 2).fixed_sparsity() is None
