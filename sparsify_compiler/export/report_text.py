"""Draw a report for a terminal of 80 columns or more, and as an SVG picture of that terminal.

More than `FOLD_ABOVE` sites are folded: `layers.{0-29}.fc` is thirty rows in one, with the range of what differs.
Nothing is left out silently: a narrow terminal drops columns and says which.
"""

import re
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sparsify_compiler.export.report import Report, SiteReport, Verification
from sparsify_compiler.export.report_rounds import rounds_table
from sparsify_compiler.export.report_rows import (
    Row,
    best_timings,
    duration,
    eligible_kernels,
    error_selected,
    fold,
    fold_names,
    fold_sites,
    number,
    printable,
    quality_change,
    recipe_words,
    refusals,
    shape_words,
    single_rows,
    size,
    spread,
    weights_removed,
)
from sparsify_compiler.export.report_steps import moment, steps_tables
from sparsify_compiler.export.report_table import Column, bullet, small, table

FOLD_ABOVE = 30
VERDICTS = 12
NAMED = 3


def render_report(report: Report, width: int) -> RenderableType:
    """Return the report as a rich renderable for a terminal of `width` columns."""
    parts: list[RenderableType] = [_header(report), *rounds_table(report, width), *steps_tables(report, width)]
    parts += _pruned(report, width)
    parts += _left_dense(report, width)
    parts += [*_speed(report, width), *_verdicts(report), *_refused_kernels(report), *_notes(report)]
    return Group(*parts)


def report_text(report: Report, width: int = 100) -> str:
    """Return the report as plain text without colours, no line longer than `width` columns."""
    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(render_report(report, width))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def save_svg(report: Report, path: Path, width: int = 110) -> None:
    """Write a picture of the report as a terminal of `width` columns shows it."""
    console = Console(file=StringIO(), width=width, record=True, color_system="truecolor", force_terminal=True)
    console.print(render_report(report, width))
    picture = console.export_svg(title="sparsify-compiler report", unique_id="report")
    # rich names a font on a server; a picture in a README should load nothing
    path.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")


def _header(report: Report) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, lines in _facts(report):
        grid.add_row(name, Text("\n").join(lines))
    return Panel(grid, title="sparsify-compiler report", title_align="left", border_style="cyan", padding=(0, 1))


def _facts(report: Report) -> Iterable[tuple[str, Sequence[Text]]]:
    yield "model", [_plain(report.model)]
    yield "recipe", [_plain(words) for words in recipe_words(report.recipe)]
    counts = [f"{sum(s.status == status for s in report.sites)} {status}" for status in ("pruned", "dense", "refused")]
    removed, weights = weights_removed(report)
    share = f"; {removed:,} of {weights:,} weights removed, sparsity {removed / weights:.3f}" if weights else ""
    yield f"{len(report.sites)} sites", [_plain(", ".join(counts) + share)]
    for quality in report.quality:
        yield (
            "quality",
            [_quality(quality.measure, quality.dense, quality.sparse, quality_change(quality), quality.data)],
        )
    if report.seconds:
        stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds.items())
        yield "time", [_plain(f"{duration(sum(report.seconds.values()))} ({stages})")]
    if report.peak_memory_bytes:
        yield "memory", [_plain(f"{size(report.peak_memory_bytes)} at the peak")]
    if report.files:
        yield "files", [_plain(_file(file.name, file.size_bytes, file.dense_bytes)) for file in report.files]
    if report.verification is not None:
        yield "checked", [_verification(report.verification)]
    if report.environment:
        yield "on", [_plain(", ".join(f"{key} {value}" for key, value in report.environment.items()))]
    if report.command:
        yield "command", [_plain(report.command)]
    if report.created:
        yield "created", [_plain(report.created)]


def _quality(measure: str, dense: float | None, sparse: float, change: str, data: str) -> Text:
    before = number(dense) if dense is not None else "not measured"
    detail = f"  ({', '.join(part for part in (change, data) if part)})" if change or data else ""
    return Text.assemble(printable(f"{measure} {before} → "), (number(sparse), "bold"), printable(detail))


def _file(name: str, size_bytes: int, dense_bytes: int | None) -> str:
    if not dense_bytes:
        return f"{name}  {size(size_bytes)}" if size_bytes else name
    return f"{name}  {size(dense_bytes)} dense → {size(size_bytes)}, {size_bytes / dense_bytes:.2f}x"


def verification_words(checked: Verification) -> str:
    """Say how the exported file did in ONNX Runtime: "passed in ...", "FAILED in ..." or "not run: ..."."""
    if not checked.ran or checked.difference is None:
        return f"not run: {checked.reason}"
    return (
        f"{'passed' if checked.difference <= checked.tolerance else 'FAILED'} in {checked.provider}"
        f"{f' on {checked.inputs}' if checked.inputs else ''}: largest "
        f"difference {checked.difference:.2g} of the largest output, allowed {checked.tolerance:.2g}"
        f"{f' ({checked.reason})' if checked.reason else ''}"
    )


def _verification(checked: Verification) -> Text:
    words = _plain(verification_words(checked))
    styles = {"passed": "bold green", "FAILED": "bold red", "not": "bold yellow"}
    first = words.plain.partition(" ")[0]
    words.stylize(styles[first], 0, len(first))
    return words


def _pruned(report: Report, width: int) -> Iterable[RenderableType]:
    sites = [site for site in report.sites if site.status == "pruned"]
    if not sites:
        return
    rows = _rows(sites)
    first = [row.sites[0] for row in rows]
    before = [spread((error_selected(site) for site in row.sites), _share, missing="–") for row in rows]
    after = [spread((site.relative_error for site in row.sites), _share, missing="no data") for row in rows]
    columns = [
        Column("site", [_plain(row.name) for row in rows]),
        Column("kind", [_plain(site.kind) for site in first], rank=2, lift=True),
        Column("weight", [_plain(shape_words(site)) for site in first], rank=4),
        Column("pattern", [_plain(_pattern(site)) for site in first], rank=7, lift=True),
        Column("method", [_plain(site.method) for site in first], rank=6, lift=True),
        Column("tokens", [_tokens(row) for row in rows], rank=3, lift=True, right=True),
        Column("before re-solve", [_plain(text) for text in before], rank=5, lift=True, right=True),
        Column("error", [_plain(text) for text in after], lift=False, right=True),
        Column("packed", [_packed(row) for row in rows], rank=1, right=True),
        Column("runs on", [_kernel(site) for site in first]),
    ]
    yield from table(f"Pruned sites: {len(sites)}{_folded(rows, len(sites))}", columns, width)
    yield small(_plain(f"error = ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² over the calibration tokens, {moment(report)}."))
    measured = [site for site in sites if site.relative_error is not None]
    if len(rows) < len(sites) and measured:
        worst = max(measured, key=lambda site: site.relative_error or 0.0)
        yield small(_plain(f"largest error: {worst.name}, {_share(worst.relative_error or 0.0)}"))


def _left_dense(report: Report, width: int) -> Iterable[RenderableType]:
    sites = [site for site in report.sites if site.status != "pruned"]
    if not sites:
        return
    rows = _rows(sites)
    first = [row.sites[0] for row in rows]
    columns = [
        Column("site", [_plain(row.name) for row in rows]),
        Column("kind", [_plain(site.kind) for site in first], rank=1),
        Column("status", [_plain(site.status, "yellow" if site.status == "refused" else "") for site in first]),
        Column("reason", [_plain(site.reason) for site in first], lift=True, wrap=True),
    ]
    yield from table(f"Sites left dense: {len(sites)}{_folded(rows, len(sites))}", columns, width)


def _speed(report: Report, width: int) -> Iterable[RenderableType]:
    sites = [site for site in report.sites if site.timings]
    if not sites:
        return
    rows = _rows(sites)
    first = [row.sites[0] for row in rows]
    tokens = sorted({timing.tokens for site in sites for timing in site.timings})
    noise = [max(t.spread for site in row.sites for t in site.timings) for row in rows]
    columns = [
        Column("site", [_plain(row.name) for row in rows]),
        Column("eligible", [_plain(", ".join(eligible_kernels(site))) for site in first], rank=2, lift=True),
        Column("picked", [_kernel(site) for site in first], lift=True),
        *(Column(f"{count} tok", [_speedup(row, count) for row in rows], right=True) for count in tokens),
        Column("spread", [_plain(f"±{value:.2f}") for value in noise], rank=1, right=True),
    ]
    yield from table(f"Speed: {len(sites)} sites measured{_folded(rows, len(sites))}", columns, width)
    meaning = "speedup = dense time / sparse time in the same run, of the picked kernel; where dense was kept, of the"
    yield small(Text(f"{meaning} fastest other. spread = interquartile range / median."))


def _verdicts(report: Report) -> Iterable[RenderableType]:
    found: dict[str, list[str]] = {}
    for site in report.sites:
        if site.status == "pruned" and site.reason:
            found.setdefault(site.reason, []).append(site.name)
    if not found:
        return
    pruned = [site.name for site in report.sites if site.status == "pruned"]
    yield Text("\nWhy these kernels", style="bold")
    shown = sorted(found.items(), key=lambda item: -len(item[1]))
    for reason, names in shown[:VERDICTS]:
        yield bullet(_plain(f"{_names(names, pruned)}: {reason}"))
    if len(shown) > VERDICTS:
        yield small(Text(f"{len(shown) - VERDICTS} more reasons, each of fewer sites: see report.html."))


def _speedup(row: Row, tokens: int) -> Text:
    timings = [found[tokens] for site in row.sites if tokens in (found := best_timings(site))]
    if not timings:
        return Text("–", style="dim")
    speed = spread((timing.speedup for timing in timings), lambda value: f"{value:.2f}")
    return Text(f"{speed}x", style="green" if min(timing.speedup for timing in timings) > 1 else "")


def _refused_kernels(report: Report) -> Iterable[RenderableType]:
    asked = [site for site in report.sites if site.refused_kernels]
    if not asked:
        return
    yield Text(f"\nKernels not eligible at {len(asked)} site{'s' if len(asked) > 1 else ''}", style="bold")
    for reason, kernels, names in refusals((site.name, site.refused_kernels) for site in asked):
        where = f" (only at {_names(names, [])})" if len(names) < len(asked) else ""
        yield bullet(_plain(f"{', '.join(kernels)}: {reason}{where}"))


def _notes(report: Report) -> Iterable[RenderableType]:
    of_sites: dict[str, list[str]] = {}
    for site in report.sites:
        for note in site.notes:
            of_sites.setdefault(note, []).append(site.name)
    if not report.notes and not of_sites:
        return
    yield Text("\nNotes", style="bold")
    for note in report.notes:
        yield bullet(_plain(note))
    for note, names in of_sites.items():
        yield bullet(_plain(f"{fold_names(names)}: {note}"))


def _rows(sites: Sequence[SiteReport]) -> tuple[Row, ...]:
    return fold_sites(sites) if len(sites) > FOLD_ABOVE else single_rows(sites)


def _names(names: Sequence[str], every: Sequence[str]) -> str:
    """Name sites in a short phrase; where it must stop short it counts the rest."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) > 1 and set(distinct) == set(every):
        return f"all {len(distinct)} sites"
    folded = fold(distinct, str, lambda item: 0)
    phrase = ", ".join(name for name, _ in folded[:NAMED])
    rest = sum(len(members) for _, members in folded[NAMED:])
    return f"{phrase} and {rest} more sites" if rest else phrase


def _folded(rows: Sequence[Row], sites: int) -> str:
    return f" in {len(rows)} rows ({{a-b}} = every number from a to b)" if len(rows) < sites else ""


def _pattern(site: SiteReport) -> str:
    asked = f" ({site.asked_sparsity:g} asked)" if site.asked_sparsity is not None else ""
    return site.pattern if ":" in site.pattern else f"{site.pattern} {site.sparsity:.3g}{asked}"


def _tokens(row: Row) -> Text:
    return _plain(spread((site.tokens for site in row.sites), lambda value: f"{value:,.0f}"))


def _packed(row: Row) -> Text:
    dense_bytes, packed_bytes = (
        sum(getattr(site, key) for site in row.sites) for key in ("dense_bytes", "packed_bytes")
    )
    packed = packed_bytes and packed_bytes != dense_bytes
    return _plain(f"{size(dense_bytes)} → {size(packed_bytes)}" if packed else size(dense_bytes))


def _kernel(site: SiteReport) -> Text:
    return _plain(site.kernel, "bold green" if site.kernel != "dense" else "")


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def _plain(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)
