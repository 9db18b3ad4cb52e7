"""Draw a benchmark as one HTML page that loads nothing from anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sparsify_compiler.export.page import page_template
from sparsify_compiler.export.report_charts import chart_top
from sparsify_compiler.runtime.benchmark.layers import LayerBench
from sparsify_compiler.runtime.benchmark.models import BenchRow
from sparsify_compiler.runtime.benchmark.report import BenchReport
from sparsify_compiler.runtime.tuning.verdicts import by_reason

MOST_NAMES = 4
"""Models that the heading names."""


@dataclass(frozen=True)
class CaseRows:
    """The rows of one case, in their order."""

    name: str
    rows: tuple[BenchRow, ...]


@dataclass(frozen=True)
class RatioBar:
    """A ratio to the base under its name; `width` is the bar's in percent of the track."""

    name: str
    ratio: float
    verdict: str
    width: float


@dataclass(frozen=True)
class Ratios:
    """Bars beside each other on one scale; `even` is where 1x stands, in percent of the track."""

    title: str
    bars: tuple[RatioBar, ...]
    even: float


def bench_html(report: BenchReport) -> str:
    """Return the benchmark as a page that stands alone: every row, plots of the ratios, machine and versions."""
    page = page_template("bench.html.jinja")
    grouped = groupby(report.rows, key=lambda row: row.case)
    found = [CaseRows(name, tuple(rows)) for name, rows in grouped]
    return page.render(
        report=report,
        heading=_heading(report),
        cases=found,
        case_ratios=[
            _ratios(case.name or "all", [(row.label, row.speedup, row.verdict) for row in case.rows]) for case in found
        ],
        layer_ratios=[_layer_ratios(layer) for layer in report.layers],
        refused=by_reason(pair for layer in report.layers for pair in layer.refused),
    )


def _heading(report: BenchReport) -> str:
    """Name what was timed: the models, or single layers."""
    if not report.rows:
        random = all(row.layer == "random" for layer in report.layers for row in layer.rows)
        return f"Benchmark: single layers{', random weights' if random else ''}"
    names = list(dict.fromkeys(row.label.partition(", ")[0] for row in report.rows))
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"Benchmark: {', '.join(names[:MOST_NAMES])}{more}"


def _layer_ratios(layer: LayerBench) -> tuple[Ratios, ...]:
    """One chart a token count: the speedup of every kernel over dense."""
    charts = []
    for tokens, rows in groupby(layer.rows, key=lambda row: row.tokens):
        title = f"{tokens:,} token{'' if tokens == 1 else 's'}: speedup over dense"
        found = [(row.kernel, row.speedup, row.verdict.split(":")[0]) for row in rows if row.kernel != "dense"]
        charts.append(_ratios(title, found))
    return tuple(charts)


def _ratios(title: str, found: Sequence[tuple[str, float, str]]) -> Ratios:
    """Set ratios side by side on a scale that starts at 0 and holds 1x."""
    top = chart_top(max([1.0, *(ratio for _, ratio, _ in found)]))
    bars = tuple(RatioBar(name, ratio, verdict, round(100 * ratio / top, 2)) for name, ratio, verdict in found)
    return Ratios(title, bars, round(100 / top, 2))
