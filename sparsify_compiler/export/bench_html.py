"""Draw a benchmark as one HTML page that loads nothing from anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sparsify_compiler.export.page import page_template
from sparsify_compiler.export.report_charts import Chart, GridLine, chart_bar, chart_top, chart_y
from sparsify_compiler.runtime.benchmark.layers import LayerBench, LayerRow
from sparsify_compiler.runtime.benchmark.models import BenchRow
from sparsify_compiler.runtime.benchmark.report import BenchReport

WIDTH = 420.0
LEFT = 40.0


@dataclass(frozen=True)
class CaseRows:
    """The rows of one case, in their order."""

    name: str
    rows: tuple[BenchRow, ...]


def bench_html(report: BenchReport) -> str:
    """Return the benchmark as a page that stands alone: every row, plots of the ratios, machine and versions."""
    page = page_template("bench.html.jinja")
    grouped = groupby(report.rows, key=lambda row: row.case)
    found = [CaseRows(name, tuple(rows)) for name, rows in grouped]
    return page.render(
        report=report,
        cases=found,
        case_charts=[_chart(case.name or "all", [(row.label, row.speedup) for row in case.rows]) for case in found],
        layer_charts=[_layer_charts(layer) for layer in report.layers],
    )


def _layer_charts(layer: LayerBench) -> tuple[Chart, ...]:
    """One chart a token count: the speedup of every kernel over dense."""
    charts = []
    for tokens, rows in groupby(layer.rows, key=lambda row: row.tokens):
        found: Sequence[LayerRow] = [row for row in rows if row.kernel != "dense"]
        title = f"{tokens:,} token{'' if tokens == 1 else 's'}"
        charts.append(_chart(title, [(row.kernel, row.speedup) for row in found]))
    return tuple(charts)


def _chart(title: str, ratios: Sequence[tuple[str, float]]) -> Chart:
    """Draw ratios as bars around the line of 1x."""
    top = chart_top(max((ratio for _, ratio in ratios), default=1.0))
    slot = (WIDTH - LEFT) / max(len(ratios), 4)
    bars = tuple(
        chart_bar((index, slot), ratio, top, "win" if ratio > 1 else "lose", f"{name}: {ratio:.2f}x")
        for index, (name, ratio) in enumerate(ratios)
    )
    lines = (GridLine(chart_y(0.0, top), "0"), GridLine(chart_y(1.0, top), "1x", "even"))
    return Chart(title, WIDTH, 120.0, bars, (*lines, GridLine(chart_y(top, top), f"{top:g}x")))
