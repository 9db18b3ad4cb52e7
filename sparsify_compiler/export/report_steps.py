"""The tables of training steps in a report's drawing for a terminal."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.text import Text

from sparsify_compiler.export.report import Report, StepReport
from sparsify_compiler.export.report_rounds import missing
from sparsify_compiler.export.report_rows import printable
from sparsify_compiler.export.report_table import Column, small, table

CHOSEN_BY = "chosen by"
"""The heading of the figures that decide: on held-out data, or on calibration data where there was none to spare."""


def steps_tables(report: Report, width: int) -> Iterable[RenderableType]:
    """Yield a table for every step that trained, for a terminal of `width` columns."""
    for step, rows in by_step(report.steps).items():
        columns = [
            Column(step, [Text(printable(each.part)) for each in rows]),
            Column("before", [Text(missing(each.before)) for each in rows], rank=1, right=True),
            Column(trained(rows), [Text(missing(each.after)) for each in rows], right=True),
            Column(CHOSEN_BY, [Text(missing(each.heldout)) for each in rows], right=True),
            Column("", [Text("kept", style="bold green") if each.kept else Text("") for each in rows]),
        ]
        shown = [column for column in columns if any(cell.plain != "–" for cell in column.cells)]
        yield from table(f"Step {step}: {rows[0].measure}", shown, width)
        yield small(Text(printable(decision(rows))))


def by_step(rows: Iterable[StepReport]) -> dict[str, tuple[StepReport, ...]]:
    """Group the rows of a report by their step, in order."""
    return {step: tuple(group) for step, group in groupby(rows, lambda each: each.step)}


def trained(rows: Sequence[StepReport]) -> str:
    """Name the figure on the calibration batches: that of the weights as they ended, or the mean while they moved."""
    return "while training" if rows[0].before is None else "after"


def moment(report: Report) -> str:
    """Say in words when the errors of sites were measured: steps may move the weights after that."""
    moved = [step for step, rows in by_step(report.steps).items() if any(r.kept and r.after is not None for r in rows)]
    return "as pruning left it" + (f", before {' and '.join(moved)} moved the weights" if moved else "")


def decision(rows: Sequence[StepReport]) -> str:
    """Say in words what decided which rows were kept."""
    if rows[0].data:
        return f"The epoch with the lowest {rows[0].measure} on {rows[0].data} is kept."
    return f"On the calibration batches; a part whose {rows[0].measure} did not fall is left as it was pruned."
