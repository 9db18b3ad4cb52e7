"""The table of rounds in a report's drawing for a terminal."""

from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text

from sparsify_compiler.export.report import Report, RoundReport
from sparsify_compiler.export.report_rows import number, printable
from sparsify_compiler.export.report_table import Column, small, table

ERRORS = (
    "errors = sum of the sites' relative errors on the round's batches: in the first round against the layers' own "
    "inputs, then against the dense model, which is more."
)


def rounds_table(report: Report, width: int) -> Iterable[RenderableType]:
    """Yield one line a round for a terminal of `width` columns; nothing where the network was pruned once."""
    rounds = report.rounds
    if not rounds:
        return
    chosen = {True: Text("kept", style="bold green"), False: Text("")}
    columns = [
        Column("round", [Text(str(each.number)) for each in rounds], right=True),
        Column("calibrated on", [Text(printable(each.batches)) for each in rounds], rank=1),
        Column(rounds[0].measure, [Text(number(each.heldout)) for each in rounds], right=True),
        Column("errors", [Text(missing(each.error)) for each in rounds], rank=2, right=True),
        Column("mask changed", [Text(share(each.changed)) for each in rounds], rank=3, right=True),
        Column("anew", [Text(anew(each)) for each in rounds], rank=4),
        Column("", [chosen[each.chosen] for each in rounds]),
    ]
    yield from table(f"Rounds: {len(rounds)}", columns, width)
    decides = f"the lowest {rounds[0].measure} on {rounds[0].data} decides"
    yield small(Text(printable(f"{decides}. {ERRORS}")))


def missing(value: float | None) -> str:
    """Write a figure, or a dash."""
    return "–" if value is None else number(value)


def share(value: float | None) -> str:
    """Write a share of the mask, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def anew(each: RoundReport) -> str:
    """Say what the round had that the one before had not."""
    if each.changed is None:
        return "–"
    return ", ".join(each.differed) or "nothing"
