"""What `bench` prints: one table a case, one a layer, what could not be measured, and on what machine."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from sparsify_compiler.export.report_rows import printable, size
from sparsify_compiler.export.report_table import Column, bullet, small, table
from sparsify_compiler.runtime.benchmark.layers import LayerBench
from sparsify_compiler.runtime.benchmark.models import BenchRow
from sparsify_compiler.runtime.benchmark.report import BenchReport
from sparsify_compiler.runtime.tuning.verdicts import by_reason

STYLES = {"faster": "bold green", "slower": "yellow"}
VERDICT = 16
"""Characters that a verdict asks for: the longest takes two lines of them."""
MEANING = (
    "speedup = time of the base / time of this one, round by round; the base is the fastest way of running the first "
    "model. spread, also behind a ±, = interquartile range / median."
)
LAYER_MEANING = (
    "of limit = the least time that this machine's measured memory and arithmetic rates allow / the time measured; "
    "above 100% the weight stayed in a cache. Each token count is tuned by itself. ± = the speedup's interquartile "
    "range / median."
)


def draw_bench(report: BenchReport, width: int) -> RenderableType:
    """Draw everything a benchmark found."""
    parts: list[RenderableType] = []
    for case in dict.fromkeys(row.case for row in report.rows):
        parts += _rows([row for row in report.rows if row.case == case], case, width)
    if report.rows:
        parts.append(small(Text(MEANING)))
    for layer in report.layers:
        parts += _layer(layer, width)
    if report.layers:
        parts += [small(Text(LAYER_MEANING)), *_refused(report.layers)]
    parts += _surroundings(report)
    return Group(*parts)


def _rows(rows: Sequence[BenchRow], case: str, width: int) -> Iterable[RenderableType]:
    peaks = [_plain(_size(row.peak_memory_bytes)) for row in rows]
    rates = [_plain("–" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}") for row in rows]
    columns = [
        Column("model", [_plain(row.label) for row in rows]),
        Column("median ±spread", [_plain(f"{row.median_ms:.4g} ms ±{row.spread:.2f}") for row in rows], right=True),
        Column("speedup", [_plain(f"{row.speedup:.2f}x ±{row.speedup_spread:.2f}") for row in rows], right=True),
        Column("verdict", [_plain(row.verdict, STYLES.get(row.verdict, "")) for row in rows], wrap=True, most=VERDICT),
        *([Column("tokens/s", rates, rank=4, right=True)] if any(row.tokens for row in rows) else []),
        *([Column("peak memory", peaks, rank=2, right=True)] if any(row.peak_memory_bytes for row in rows) else []),
        Column("size", [_plain(_size(row.size_bytes)) for row in rows], rank=1, right=True),
        Column("repeats", [_plain(str(row.repeats)) for row in rows], rank=3, lift=True, right=True),
    ]
    title = "Measured in one run, rounds interleaved" + (f": {printable(case)}" if case else "")
    return table(title, columns, width, "--json")


def _layer(layer: LayerBench, width: int) -> Iterable[RenderableType]:
    rows = layer.rows
    if rows:
        words = [row.verdict.split(":")[0] for row in rows]
        columns = [
            Column("tokens", [_plain(f"{row.tokens:,}") for row in rows], right=True),
            Column("kernel", [_plain(row.kernel) for row in rows]),
            Column("time", [_plain(f"{row.time_us:.4g} us") for row in rows], right=True),
            Column("speedup", [_plain(f"{row.speedup:.2f}x ±{row.spread:.2f}") for row in rows], right=True),
            Column("verdict", [_plain(word, STYLES.get(word, "")) for word in words], wrap=True, most=VERDICT),
            Column("limit", [_plain(f"{row.limit_us:.4g} us") for row in rows], rank=1, right=True),
            Column("of limit", [_plain(f"{row.of_limit:.0%}") for row in rows], right=True),
            Column("weight", [_plain(size(row.weight_bytes)) for row in rows], rank=3, right=True),
        ]
        first = rows[0]
        what = f"{first.shape[0]}x{first.shape[1]} {first.pattern}, density {first.density:.3g}, {first.dtype}"
        yield from table(f"{printable(first.layer)}: {what}", columns, width, "--json")
    yield bullet(_plain(f"would run: {layer.chosen}"))


def _refused(layers: Sequence[LayerBench]) -> Iterable[RenderableType]:
    """Say each reason against kernels once; the tables show where each ran, and --json has them layer by layer."""
    for reason, kernels in by_reason(pair for layer in layers for pair in layer.refused).items():
        yield bullet(_plain(f"could not run: {', '.join(kernels)}: {reason}"))


def _surroundings(report: BenchReport) -> Iterable[RenderableType]:
    for note in report.notes:
        yield bullet(_plain(note))
    if report.inputs:
        yield small(_plain(f"inputs: {report.inputs}"))
    if report.ceilings is not None:
        found = report.ceilings
        rates = f"{found.bytes_per_s / 1e9:,.0f} GB/s copied, {found.flops_per_s / 1e12:,.3g} TFLOP/s in {found.dtype}"
        yield small(_plain(f"measured ceilings: {rates}"))
    if report.machine:
        yield small(_plain("; ".join(f"{name} {value}" for name, value in report.machine)))


def _size(count: int | None) -> str:
    return "–" if count is None else size(count)


def _plain(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)
