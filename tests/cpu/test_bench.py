"""The whole-model timing: order, medians and words, with a clock that follows a script."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify_compiler.errors import DataError
from sparsify_compiler.runtime.benchmark.models import BenchRow, Measured, compare, plot


class Bench:
    """Candidates that take the seconds of a script, and the clock that sees them pass."""

    def __init__(self, **seconds: list[float]) -> None:
        self.now, self.order, self.scripts = 0.0, "", {label: iter(times) for label, times in seconds.items()}

    def clock(self) -> float:
        return self.now

    def call(self, label: str) -> Callable[[], None]:
        def run() -> None:
            self.order += label
            self.now += next(self.scripts[label])

        return run

    def compare(self, **options: int) -> tuple[BenchRow, ...]:
        candidates = [(label, self.call(label)) for label in self.scripts]
        return compare(candidates, clock=self.clock, **options)


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    bench = Bench(a=[9.0, 9.0, 0.25, 0.25], b=[9.0, 9.0, 0.125, 0.125])
    first, second = bench.compare(repeats=2, warmup=2)
    assert bench.order == "abababab"
    assert (first.median_ms, first.speedup, first.verdict) == (250, 1, "base")
    assert (second.median_ms, second.speedup, second.speedup_spread, second.verdict) == (125, 2, 0, "faster")


def test_what_slows_a_round_down_does_not_change_the_ratio() -> None:
    bench = Bench(a=[1.0, 4.0, 2.0, 8.0, 1.0], b=[2.0, 8.0, 4.0, 16.0, 2.0])
    row = bench.compare(repeats=5, warmup=0)[1]
    assert (row.speedup, row.speedup_spread, row.verdict) == (0.5, 0, "slower")
    assert row.spread == pytest.approx((8 - 2) / 4, rel=1e-12)  # quartiles of 2, 2, 4, 8, 16 seconds


def test_a_difference_within_the_spread_is_none() -> None:
    bench = Bench(a=[1.0] * 5, b=[0.8, 1.0, 0.9, 1.2, 0.7])
    assert bench.compare(repeats=5, warmup=0)[1].verdict == "no difference beyond the spread"


def test_sizes_are_passed_through() -> None:
    rows = compare(
        [("dense", lambda: None), ("sparse", lambda: None)],
        repeats=3,
        warmup=1,
        measured=Measured({"dense": 9}, {"sparse": 7}),
    )
    assert [(row.size_bytes, row.peak_memory_bytes) for row in rows] == [(None, 9), (7, None)]


def test_the_fastest_of_the_bases_is_the_measure_and_tokens_become_a_rate() -> None:
    bench = Bench(eager=[4.0] * 3, graph=[2.0] * 3, sparse=[1.0] * 3)
    candidates = [(label, bench.call(label)) for label in bench.scripts]
    measured = Measured(case="decode", tokens=8)
    rows = compare(candidates, 2, 1, measured=measured, bases=("eager", "graph"), clock=bench.clock)
    assert [(row.speedup, row.verdict) for row in rows] == [(0.5, "slower"), (1, "base"), (2, "faster")]
    assert [row.tokens_per_s for row in rows] == [2, 4, 8]
    assert {row.case for row in rows} == {"decode"}


def test_comparisons_that_make_no_sense_are_refused() -> None:
    same = ("a", lambda: None)
    for candidates, repeats in (([], 3), ([same, same], 3), ([same], 1)):
        with pytest.raises(DataError, match="cannot compare"):
            compare(candidates, repeats=repeats)
    with pytest.raises(DataError, match="bases among them"):
        compare([same], bases=("b",))


ROWS = (
    BenchRow("dense", 10.0, 0.02, 1.0, 0.0, "base", 20),
    BenchRow("sparse 2:4", 6.0, 0.05, 1.67, 0.04, "faster", 20),
)


def test_the_plot_is_a_png_or_svg_that_shows_labels_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(ROWS, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    plot(ROWS, tmp_path / "rows.svg")
    text = (tmp_path / "rows.svg").read_text()  # glyphs are paths; the texts stand in comments
    assert "sparse 2:4" in text
    assert "6 ms, 1.67x" in text
    assert "faster" in text


def test_no_whisker_of_the_plot_reaches_below_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    found: list[tuple[list[float], list[float]]] = []
    draw = axes.barh

    def barh(self: object, names: object, width: list[float], **more: object) -> object:
        found.append(more["xerr"])  # type: ignore[arg-type]
        return draw(self, names, width, **more)

    monkeypatch.setattr(axes, "barh", barh)
    plot([dataclasses.replace(ROWS[0], median_ms=2.0, spread=3.0)], tmp_path / "rows.svg")
    assert found == [([2.0], [3.0])]


def test_the_plot_refuses_other_files_no_rows_and_a_missing_folder(tmp_path: Path) -> None:
    for rows, name in ((ROWS, "rows.txt"), ((), "rows.png")):
        with pytest.raises(DataError, match=r"at least one row and a \.png or \.svg"):
            plot(rows, tmp_path / name)
    with pytest.raises(DataError, match="cannot write the plot"):
        plot(ROWS, tmp_path / "absent" / "rows.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"sparsify-compiler\[plot\]"):
        plot(ROWS, tmp_path / "rows.png")


def test_importing_the_benchmark_does_not_import_matplotlib() -> None:
    source = Path(importlib.import_module("sparsify_compiler.runtime.benchmark.models").__file__ or "").read_text()
    assert "\nimport matplotlib" not in source
    assert "\nfrom matplotlib" not in source
