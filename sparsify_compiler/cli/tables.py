"""What inspect and evaluate print: tables for a terminal, and JSON."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from rich.console import Group, RenderableType
from rich.text import Text

from sparsify_compiler.api import Inspection, SiteInspection
from sparsify_compiler.export.report import Quality
from sparsify_compiler.export.report_rows import (
    duration,
    fold,
    fold_names,
    number,
    printable,
    quality_change,
    refusals,
    size,
)
from sparsify_compiler.export.report_table import Column, bullet, table
from sparsify_compiler.export.report_text import FOLD_ABOVE

Folded = Sequence[tuple[str, tuple[SiteInspection, ...]]]


def draw_inspection(model: str, inspection: Inspection, width: int) -> RenderableType:
    """Draw every site with what it can take, then every reason why not, then the estimates."""
    rows = _fold(inspection.rows)
    first = [members[0] for _, members in rows]
    sites = [row.site for row in first]
    folded = " ({a-b} = every number from a to b)" if len(rows) < len(inspection.rows) else ""
    columns = [
        Column("site", [_plain(name) for name, _ in rows]),
        Column("kind", [_plain(site.kind) for site in sites], rank=2, lift=True),
        Column("weight", [_plain("x".join(map(str, site.shape))) for site in sites], rank=3),
        Column("problem", [_plain(_problem(row)) for row in first], rank=1),
        Column("tokens", [_plain(f"{row.tokens:,}") for row in first], rank=4, lift=True, right=True),
        Column("patterns", [_plain(_allowed(row.patterns)) for row in first], wrap=True, lift=True),
        Column("kernels", [_plain(_allowed(row.kernels)) for row in first], wrap=True, lift=True),
    ]
    title = f"{printable(model)}: {len(inspection.rows)} sites in {len(rows)} rows{folded}"
    parts = (_runs(inspection), _reasons(inspection), _estimates(inspection))
    return Group(*table(title, columns, width, "--json"), *chain.from_iterable(parts))


def inspection_json(inspection: Inspection) -> str:
    """Write an inspection as JSON."""
    return json.dumps(dataclasses.asdict(inspection), indent=1)


def draw_evaluation(model: str, measures: Sequence[Quality], width: int) -> RenderableType:
    """Draw one row a measure; the dense model's value stands beside it where there is one."""
    compared = any(quality.dense is not None for quality in measures)
    dense = [_plain(number(q.dense) if q.dense is not None else "–") for q in measures]
    columns = [
        Column("measure", [_plain(q.measure) for q in measures]),
        *([Column("dense", dense, right=True)] if compared else []),
        Column("model", [_plain(number(q.sparse), "bold") for q in measures], right=True),
        *([Column("change", [_plain(quality_change(q)) for q in measures], right=True)] if compared else []),
        Column("data", [_plain(q.data) for q in measures], wrap=True, lift=True),
    ]
    return Group(*table(printable(model), columns, width))


def _fold(rows: Sequence[SiteInspection]) -> Folded:
    if len(rows) <= FOLD_ABOVE:
        return tuple((row.site.name, (row,)) for row in rows)
    return fold(rows, lambda row: row.site.name, _same)


def _same(row: SiteInspection) -> object:
    site = row.site
    what = (site.kind, site.shape, site.groups, site.refusal, site.dense_by_default, row.tokens)
    return (*what, tuple(row.patterns.items()), tuple(row.kernels.items()), tuple(row.runs.items()))


def _problem(row: SiteInspection) -> str:
    site = row.site
    return f"{site.groups} x {site.out}x{site.in_}" if site.groups > 1 else f"{site.out}x{site.in_}"


def _allowed(choices: Mapping[str, str | None]) -> str:
    return ", ".join(name for name, reason in choices.items() if reason is None) or "none"


def _runs(inspection: Inspection) -> Iterable[RenderableType]:
    """Say of every pattern which sparse kernels could run it on this device."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in inspection.rows:
        for pattern, kernels in row.runs.items():
            found.setdefault((pattern, kernels), []).append(row.site.name)
    if found:
        yield Text("\nSparse kernels that could run, by pattern", style="bold")
    for (pattern, kernels), names in sorted(found.items(), key=lambda entry: _place(entry[0][0], inspection)):
        yield bullet(_plain(f"{pattern}: {', '.join(kernels) or 'none'} ({_where(names, inspection)})"))


def _place(pattern: str, inspection: Inspection) -> int:
    return [*inspection.rows[0].patterns].index(pattern)


def _where(names: Sequence[str], inspection: Inspection) -> str:
    return "every site" if len(names) == len(inspection.rows) > 1 else fold_names(names)


def _reasons(inspection: Inspection) -> Iterable[RenderableType]:
    found: dict[str, list[str]] = {}
    for row in inspection.rows:
        site = row.site
        if site.refusal:
            found.setdefault(f"cannot be pruned: {site.refusal}", []).append(site.name)
            continue
        if site.dense_by_default:
            found.setdefault(f"dense by default: {site.dense_by_default}", []).append(site.name)
        for name, reason in row.patterns.items():
            if reason is not None:
                found.setdefault(f"pattern {name}: {reason}", []).append(site.name)
    for reason, kernels, names in refusals((row.site.name, _refused(row)) for row in inspection.rows):
        found[f"{', '.join(kernels)}: {reason}"] = list(names)
    if found:
        yield Text("\nWhy not", style="bold")
    for reason, names in found.items():
        yield bullet(_plain(f"{reason} ({_where(names, inspection)})"))


def _refused(row: SiteInspection) -> dict[str, str]:
    """Return the kernels that cannot run a site that can be pruned, and why."""
    return {} if row.site.refusal else {name: reason for name, reason in row.kernels.items() if reason is not None}


def _estimates(inspection: Inspection) -> Iterable[RenderableType]:
    yield Text("\nEstimate for compile", style="bold")
    yield bullet(_plain(f"memory at the peak: {size(inspection.memory_bytes)}"))
    yield bullet(_plain(f"time: {duration(inspection.seconds)}"))
    for note in inspection.notes:
        yield bullet(_plain(note))


def _plain(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)
