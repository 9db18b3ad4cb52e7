"""Tables that fit a terminal: what is the same in every row is said once above, what does not fit is named below."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NAME_LEAST = 34
"""Columns of text that the first table column keeps before others are dropped for it."""

GAP = 2


@dataclass(frozen=True)
class Column:
    """One table column. Of those that do not fit, the one of lowest `rank` goes first; inf never goes.

    `lift`: where every row says the same, it moves into the line above the table. `wrap`: its text may take lines,
    and asks for `most` characters of one.
    """

    title: str
    cells: Sequence[Text]
    rank: float = inf
    lift: bool = False
    wrap: bool = False
    right: bool = False
    most: int = 40

    def width(self) -> int:
        """Count the characters of the widest cell, at most `most` where the text may take several lines."""
        widest = max((cell.cell_len for cell in self.cells), default=0)
        return max(len(self.title), min(widest, self.most) if self.wrap else widest)


def table(
    title: str, columns: Sequence[Column], width: int, elsewhere: str = "report.html"
) -> Iterable[RenderableType]:
    """Yield a heading, what all rows share, the table, and the titles of the columns that did not fit `width`.

    `elsewhere` names the place that has all columns.
    """
    shared = [column for column in columns if _is_lifted(column)]
    left = [column for column in columns if not _is_lifted(column)]
    dropped: list[Column] = []
    while _needed(left) > width - GAP and any(column.rank < inf for column in left):
        dropped.append(min(left, key=lambda column: column.rank))
        left = [column for column in left if column is not dropped[-1]]
    yield Text(f"\n{title}", style="bold")
    if shared:
        said = (Text.assemble(f"{column.title} ", (column.cells[0].plain, "bold")) for column in shared)
        yield small(Text.assemble("every row: ", Text(", ").join(said)))
    yield _draw(left, width)
    if dropped:
        names = ", ".join(column.title for column in dropped)
        yield small(Text(f"Too narrow for {names}: see a wider terminal or {elsewhere}."))


def small(text: Text) -> RenderableType:
    """Set a remark under or over a table."""
    text.stylize_before("dim")
    return Padding(text, (0, 0, 0, GAP))


def bullet(text: Text) -> RenderableType:
    """Set one item of a list."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row(" •", text)
    return grid


def _is_lifted(column: Column) -> bool:
    return column.lift and len(column.cells) > 1 and len({cell.plain for cell in column.cells}) == 1


def _needed(columns: Sequence[Column]) -> int:
    return min(columns[0].width(), NAME_LEAST) + sum(column.width() + GAP for column in columns[1:])


def _draw(columns: Sequence[Column], width: int) -> Table:
    # rich adds one column of its own between two: the padding is one less than the gap
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    rest = sum(column.width() + GAP for column in columns[1:])
    name_width = min(columns[0].width(), max(width - rest - 2 * GAP, 16))
    for index, column in enumerate(columns):
        drawn.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.wrap and index > 0,
            overflow="fold",
            width=name_width if index == 0 else None,
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        drawn.add_row(_break_name(cells[0], name_width), *cells[1:])
    return drawn


def _break_name(name: Text, width: int) -> Text:
    """Break a long name after a dot, slash or bracket, so that its parts stay readable."""
    if name.cell_len <= width:
        return name
    lines = [""]
    for part in re.findall(r".[^./\[]*", name.plain, flags=re.DOTALL):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return Text("\n ".join(lines), style=name.style)
