"""Bar charts as numbers: where every bar, grid line and label of the HTML report's small drawings stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from sparsify_compiler.export.report import Report, SiteReport
from sparsify_compiler.export.report_rows import NUMBER, best_timings, error_selected

HEIGHT = 120.0
TOP = 8.0
BOTTOM = 8.0
LEFT = 40.0
ALONE_BELOW = 4
"""A family of fewer sites than this is drawn together with the other small ones."""


@dataclass(frozen=True)
class Bar:
    """A rectangle in the drawing's units. `style` is a CSS class, `label` what a pointer over it is told."""

    x: float
    y: float
    width: float
    height: float
    style: str
    label: str


@dataclass(frozen=True)
class GridLine:
    """A horizontal line and the value it stands for."""

    y: float
    label: str
    style: str = "grid"


@dataclass(frozen=True)
class Chart:
    """One drawing, `width` by `height`. `wide` drawings take the whole line of the page."""

    title: str
    width: float
    height: float
    bars: tuple[Bar, ...]
    grid: tuple[GridLine, ...]
    wide: bool = False


def error_charts(report: Report) -> tuple[Chart, ...]:
    """Draw the relative error of every pruned site, one chart a family of alike names, all on one scale."""
    sites = [site for site in report.sites if site.relative_error is not None]
    if not sites:
        return ()
    highest = max(max(site.relative_error or 0.0, error_selected(site) or 0.0) for site in sites)
    top = chart_top(highest)
    families: dict[str, list[SiteReport]] = {}
    for site in sites:
        families.setdefault(NUMBER.sub("#", site.name), []).append(site)
    large = {name: members for name, members in families.items() if len(members) >= ALONE_BELOW}
    small = [site for site in sites if NUMBER.sub("#", site.name) not in large]
    charts = [_error_chart(name, members, top) for name, members in large.items()]
    if small:
        charts.append(_error_chart("other sites" if large else "all sites", small, top))
    return tuple(charts)


def speed_charts(report: Report) -> tuple[Chart, ...]:
    """Draw the speedup of every measured site, one chart a token count, all on one scale."""
    sites = [site for site in report.sites if site.timings]
    found = {site.name: best_timings(site) for site in sites}
    counts = sorted({count for timings in found.values() for count in timings})
    highest = max((timing.speedup for timings in found.values() for timing in timings.values()), default=0.0)
    top = chart_top(max(highest, 1.0) * 1.02)
    charts = []
    for count in counts:
        measured = [(site, found[site.name][count]) for site in sites if count in found[site.name]]
        width = _width(len(measured))
        slot = (width - LEFT) / len(measured)
        bars = [
            chart_bar(
                (index, slot),
                timing.speedup,
                top,
                "win" if site.kernel != "dense" else "lose",
                f"{site.name}: {timing.kernel} {timing.speedup:.2f}x, runs on {site.kernel}",
            )
            for index, (site, timing) in enumerate(measured)
        ]
        even = GridLine(chart_y(1.0, top), "1x", "even")
        grid = (GridLine(chart_y(0.0, top), "0"), even, GridLine(chart_y(top, top), f"{top:g}x"))
        title = f"{count:,} token{'' if count == 1 else 's'}"
        charts.append(Chart(title, width, HEIGHT, tuple(bars), grid, wide=len(measured) > 48))
    return tuple(charts)


def _error_chart(title: str, sites: Sequence[SiteReport], top: float) -> Chart:
    width = _width(len(sites))
    slot = (width - LEFT) / max(len(sites), 8)
    bars: list[Bar] = []
    for index, site in enumerate(sites):
        after, before = site.relative_error or 0.0, error_selected(site)
        label = f"{site.name}: {after:.4g}"
        if before is not None and before > after:
            label += f", before the re-solve {before:.4g}"
            bars.append(chart_bar((index, slot), before, top, "before", label))
        bars.append(chart_bar((index, slot), after, top, "after", label))
    grid = tuple(GridLine(chart_y(value, top), f"{value:.3g}") for value in (0.0, top / 2, top))
    return Chart(title, width, HEIGHT, tuple(bars), grid, wide=len(sites) > 48)


def chart_bar(place: tuple[int, float], value: float, top: float, style: str, label: str) -> Bar:
    """Place the bar of `value` in slot `place` (index, width of a slot) of a chart that ends at `top`."""
    index, slot = place
    gap = min(slot * 0.2, 2.0)
    y = chart_y(min(value, top), top)
    return Bar(
        round(LEFT + index * slot + gap / 2, 2), y, round(slot - gap, 2), round(chart_y(0.0, top) - y, 2), style, label
    )


def chart_y(value: float, top: float) -> float:
    """Return the height in the drawing of `value` in a chart that ends at `top`."""
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top), 2)


def _width(bars: int) -> float:
    return 280.0 if bars <= 48 else 900.0


def chart_top(value: float) -> float:
    """Return the least of 1, 1.5, 2, 2.5, 3, 4, 5, 6 or 8 times a power of ten that is at least `value`; 1 for zero."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-12))
