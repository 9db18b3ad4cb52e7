"""Draw a method table as one HTML page that loads nothing from anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sparsify_compiler.export.method_table import MethodTable, Spread, Summary, spread_of
from sparsify_compiler.export.page import page_template
from sparsify_compiler.export.report_rows import number

WIDTH, HEIGHT = 280.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 10.0, 22.0

Key = tuple[str, str]
"""A held-out set by name, and the measure."""


@dataclass(frozen=True)
class Dot:
    """One way of pruning on a scale: its mean and its range over the draws, in percent of the track."""

    name: str
    value: str
    at: float
    least: float
    width: float


@dataclass(frozen=True)
class Dots:
    """Ways of pruning under each other on one scale; `dense` is where the dense model stands, in percent."""

    title: str
    dots: tuple[Dot, ...]
    dense: float


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the drawing's units, and what it stands for."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A figure after every round: mean over the draws as a line, least to greatest as a band (SVG point lists)."""

    title: str
    line: str
    band: str
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


@dataclass(frozen=True)
class PatternPart:
    """What the page shows of one pattern."""

    pattern: str
    rows: tuple[Summary, ...]
    dots: tuple[Dots, ...]


def method_table_html(table: MethodTable) -> str:
    """Return the table as a page that stands alone: every row, the ranges drawn, the figures after every round."""
    keys = shown_keys(table)
    dense = {(quality.data, quality.measure): quality.sparse for quality in table.dense}
    ordered = sorted(table.summaries(), key=lambda each: _place(table, each.pattern))
    parts = []
    for pattern, group in groupby(ordered, key=lambda each: each.pattern):
        rows = tuple(group)
        parts.append(PatternPart(pattern, rows, tuple(_dots(key, rows, dense[key]) for key in keys)))
    return page_template("method_table.html.jinja").render(
        table=table, parts=parts, keys=keys, dense=dense, curves=_curves(table, keys), cell=spread_words, name=way
    )


def shown_keys(table: MethodTable) -> tuple[Key, ...]:
    """Return the first measure of every held-out set: the one that tables and drawings show."""
    first: dict[str, Key] = {}
    for quality in table.dense or (table.rows[0].quality if table.rows else ()):
        first.setdefault(quality.data, (quality.data, quality.measure))
    return tuple(first.values())


def way(row: Summary) -> str:
    """Name a way of pruning without its pattern."""
    return f"{row.method} + re-solve" if row.refit else row.method


def spread_words(spread: Spread | None) -> str:
    """Write a mean and, where draws differ, the least and the greatest: "38.63 (38.2–39.1)"."""
    if spread is None:
        return "–"
    least, most = number(spread.least), number(spread.most)
    return number(spread.mean) if least == most else f"{number(spread.mean)} ({least}–{most})"


def _place(table: MethodTable, pattern: str) -> int:
    return [row.pattern for row in table.rows].index(pattern)


def _dots(key: Key, rows: Sequence[Summary], dense: float) -> Dots:
    found = [(way(row), row.quality[key]) for row in rows if key in row.quality]
    low = min([dense, *(spread.least for _, spread in found)])
    high = max([dense, *(spread.most for _, spread in found)])
    scale = 94 / (high - low) if high > low else 0.0  # a margin of 3 % on either side

    def at(value: float) -> float:
        return round(3 + scale * (value - low), 2)

    dots = tuple(
        Dot(name, spread_words(spread), at(spread.mean), at(spread.least), round(at(spread.most) - at(spread.least), 2))
        for name, spread in found
    )
    return Dots(f"{key[0]}: {key[1]}", dots, at(dense))


def _curves(table: MethodTable, keys: Sequence[Key]) -> tuple[Curve, ...]:
    """Draw every way of pruning that has rounds, a drawing a held-out set."""
    ways: dict[tuple[str, str, bool], list[dict[int, dict[Key, float]]]] = {}
    for row in table.rows:
        if row.rounds:
            points = {p.number: {(q.data, q.measure): q.sparse for q in p.quality} for p in row.rounds}
            ways.setdefault((row.method, row.pattern, row.refit), []).append(points)
    curves = []
    for (method, pattern, refit), draws in ways.items():
        for key in keys:
            rounds = sorted({number for draw in draws for number in draw})
            spreads = {t: spread_of([draw[t][key] for draw in draws if t in draw]) for t in rounds}
            title = f"{method}{' + re-solve' if refit else ''}, {pattern}, {key[0]}: {key[1]}"
            curves.append(_curve(title, spreads))
    return tuple(curves)


def _curve(title: str, spreads: dict[int, Spread]) -> Curve:
    rounds = list(spreads)
    low, high = min(s.least for s in spreads.values()), max(s.most for s in spreads.values())
    steps = max(rounds[-1] - rounds[0], 1)

    def x(t: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (t - rounds[0]) / steps, 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    upper = [f"{x(t)},{y(spread.most)}" for t, spread in spreads.items()]
    lower = [f"{x(t)},{y(spread.least)}" for t, spread in spreads.items()]
    return Curve(
        title=title,
        line=" ".join(f"{x(t)},{y(spread.mean)}" for t, spread in spreads.items()),
        band=" ".join([*upper, *reversed(lower)]),
        across=tuple(Tick(x(t), str(t)) for t in rounds),
        up=tuple(Tick(y(value), number(value)) for value in dict.fromkeys((low, high))),
    )
