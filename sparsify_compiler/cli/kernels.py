"""The verb `kernels`: what this machine can run, which self-tests pass, what it could do at most."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from sparsify_compiler.api_bench import survey_kernels
from sparsify_compiler.cli import options as opt
from sparsify_compiler.cli.guard import guard
from sparsify_compiler.cli.progress import draw_progress
from sparsify_compiler.export.report_rows import printable
from sparsify_compiler.export.report_table import Column, bullet, small, table
from sparsify_compiler.pipeline.kernel_survey import Survey, SurveyRow
from sparsify_compiler.runtime.tuning.verdicts import by_reason


def kernels_verb(
    device: opt.Device = "auto",
    selftest: Annotated[
        bool, typer.Option("--selftest/--no-selftest", help="Run each kernel against float64 in a process of its own.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: opt.Debug = False,
) -> None:
    """List every kernel: the patterns and types it runs here, the reason where it does not, its self-tests."""
    with guard(debug):
        with draw_progress(Console(stderr=True)) as progress:
            found = survey_kernels(device, selftest=selftest, progress=progress)
        console = Console(highlight=False)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
        else:
            console.print(draw_survey(found, console.width))


def draw_survey(survey: Survey, width: int) -> RenderableType:
    """Draw one row a kernel, every reason against one, the ceilings and the machine."""
    names = list(dict.fromkeys(row.kernel for row in survey.rows))
    by_name = {name: [row for row in survey.rows if row.kernel == name] for name in names}
    columns = [
        Column("kernel", [_plain(name) for name in names]),
        Column("runs", [_plain(_runs(by_name[name])) for name in names], wrap=True),
        Column("types", [_plain(_types(by_name[name])) for name in names], wrap=True),
        Column("self-tests", [_tests(by_name[name]) for name in names], wrap=True),
    ]
    return Group(*table("Kernels on this machine", columns, width, "--json"), *_reasons(survey), *_ends(survey))


def _runs(rows: list[SurveyRow]) -> str:
    return _patterns([row for row in rows if row.refused is None], rows) or "nothing here"


def _patterns(rows: Sequence[SurveyRow], of: Sequence[SurveyRow]) -> str:
    """Name the patterns of `rows`, or say that they are all that `of` has."""
    named = dict.fromkeys(map(_weight, rows))
    return "every pattern" if len(named) == len(dict.fromkeys(map(_weight, of))) else ", ".join(named)


def _types(rows: list[SurveyRow]) -> str:
    return ", ".join(dict.fromkeys(row.dtype for row in rows if row.refused is None)) or "–"


def _tests(rows: list[SurveyRow]) -> Text:
    tested = [row for row in rows if row.tested]
    failed = [row for row in tested if row.refused is not None]
    if not tested:
        return _plain("–")
    if failed:
        return _plain(f"{len(failed)} of {len(tested)} failed", "bold red")
    return _plain(f"{len(tested)} passed", "green")


def _reasons(survey: Survey) -> Iterable[RenderableType]:
    """Say every reason once, with the kernels that gave it: what each found stands in --json."""
    found = by_reason((row.kernel, row.refused) for row in survey.rows if row.refused is not None)
    if found:
        yield Text("\nWhy not", style="bold")
    for reason, kernels in found.items():
        yield bullet(_plain(f"{', '.join(kernels)}: {reason}"))


def _ends(survey: Survey) -> Iterable[RenderableType]:
    for found in survey.ceilings:
        rates = f"{found.bytes_per_s / 1e9:,.0f} GB/s copied, {found.flops_per_s / 1e12:,.3g} TFLOP/s in {found.dtype}"
        yield small(_plain(f"measured ceilings: {rates}"))
    yield small(_plain("; ".join(f"{name} {value}" for name, value in survey.machine)))


def _weight(row: SurveyRow) -> str:
    return row.pattern if ":" in row.pattern else f"{row.pattern} at {1 - row.density:.0%}"


def _plain(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)
