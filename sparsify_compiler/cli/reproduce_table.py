"""The verb `reproduce method-table`: methods side by side on one model, by patterns, draws and held-out sets."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from sparsify_compiler.api_table import MethodTable, Trial, method_trials, recipe_trial
from sparsify_compiler.cli import options as opt
from sparsify_compiler.cli.guard import guard
from sparsify_compiler.cli.jobs import compare_methods
from sparsify_compiler.cli.progress import draw_progress
from sparsify_compiler.cli.requests import DataChoice, RecipeChoice, TableRequest
from sparsify_compiler.export.method_table import Summary
from sparsify_compiler.export.method_table_html import shown_keys, spread_words, way
from sparsify_compiler.export.report_rows import duration, number, printable, size
from sparsify_compiler.export.report_table import Column, bullet, small, table
from sparsify_compiler.precision import Precision

Refit = Literal["both", "yes", "no"]

RESUME = "finished rows are kept: give the same command with --resume to go on"
REFITS: dict[Refit, tuple[bool, ...]] = {"both": (False, True), "yes": (True,), "no": (False,)}


Calibration = Annotated[
    str, typer.Option("--calibration", "-c", help=f"Calibration data: {opt.DATA}.", show_default=False)
]
Heldout = Annotated[list[str], typer.Option(help="Data to measure on; may be given several times.", show_default=False)]
Methods = Annotated[str, typer.Option(help="Words of compile's --method, commas between.")]
Patterns = Annotated[str, typer.Option(help="Commas between: 0.5 is unstructured, 2:4, 64x64@0.9 names its sparsity.")]
RefitOption = Annotated[Refit, typer.Option(help="With the re-solve of the kept weights, without it, or both.")]
Sites = Annotated[
    list[str] | None, typer.Option(help="A glob of sites to prune; several times.", show_default="every site")
]
Recipes = Annotated[
    list[Path] | None,
    typer.Option("--recipe", help="A recipe in TOML as a row of its own; several times.", show_default=False),
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of iobs, each measured; the other methods have one.")]
Draws = Annotated[int, typer.Option(min=1, help="Draws of the calibration data.")]
TablePrecision = Annotated[
    Precision, typer.Option("--precision", help="What products of every model run in, pruned and measured.")
]
HeldoutWindows = Annotated[
    int | None, typer.Option(min=1, help="Samples of a held-out set to measure on, the first.", show_default="all")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A folder for rows.jsonl, table.json, table.html.", show_default=False),
]


def table_verb(
    model: opt.Model,
    calibration: Calibration,
    heldout: Heldout,
    methods: Methods = "magnitude,wanda,sparsegpt,alps,obc,iobs",
    patterns: Patterns = "0.5,2:4",
    refit: RefitOption = "both",
    sites: Sites = None,
    keep_dense: opt.KeepDense = None,
    recipe: Recipes = None,
    rounds: Rounds = 3,
    share_batches: opt.ShareBatches = False,
    precision: TablePrecision = "float32",
    draws: Draws = 3,
    windows: opt.Windows = None,
    heldout_windows: HeldoutWindows = None,
    sequence_length: opt.Length = None,
    batch_size: opt.BatchSize = None,
    preprocess: opt.Preprocess = None,
    output: Output = None,
    resume: opt.Resume = False,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
    debug: opt.Debug = False,
) -> None:
    """Prune MODEL by every method, pattern and draw, with and without the re-solve, and measure each on every set.

    MODEL must be a torch model, not an ONNX file. Where a draw would take all of the calibration data, those after
    the first take seven samples in eight.
    """
    with guard(debug, lambda: RESUME if output is not None else ""):
        dense = tuple(keep_dense or ())
        trials = method_trials(_split(methods), _split(patterns), REFITS[refit], sites or ("*",), dense, rounds)
        rows = tuple(_recipe_row(file, dense) for file in recipe or ())
        choice = DataChoice(windows, sequence_length, batch_size, preprocess, seed)
        request = TableRequest(
            model, calibration, tuple(heldout), trials + rows, draws, choice, heldout_windows, output, resume
        )
        request = replace(request, share_batches=share_batches, precision=precision, device=device, trust=trust)
        with draw_progress(Console(stderr=True)) as progress:
            found = compare_methods(request, progress)
        console = Console(highlight=False)
        console.print(draw_method_table(found, console.width))
        if output is not None:
            console.print(Text(f"\n{output / 'table.json'}, {output / 'table.html'}"))


def draw_method_table(found: MethodTable, width: int) -> RenderableType:
    """Draw one table a pattern, the dense model first, then what all rows share."""
    parts: list[RenderableType] = []
    order = [row.pattern for row in found.rows]
    summaries = sorted(found.summaries(), key=lambda each: order.index(each.pattern))
    for pattern, rows in groupby(summaries, key=lambda each: each.pattern):
        parts += _pattern(found, pattern, tuple(rows), width)
    parts.append(small(Text("mean over the draws (least–greatest)")))
    described = [f"draw {number}: {words}" for number, words in enumerate(found.calibration)]
    described += [f"{name}: {words}" for name, words in found.heldout.items()]
    parts += [bullet(Text(printable(words))) for words in (*described, *found.notes)]
    return Group(*parts)


def _pattern(found: MethodTable, pattern: str, rows: tuple[Summary, ...], width: int) -> Iterable[RenderableType]:
    dense = {(quality.data, quality.measure): quality.sparse for quality in found.dense}
    columns = [Column("method", [Text("dense"), *(Text(printable(way(row))) for row in rows)])]
    for key in shown_keys(found):
        cells = [Text(number(dense[key])), *(Text(spread_words(row.quality.get(key)), "bold") for row in rows)]
        columns.append(Column(printable(f"{key[0]}: {key[1]}"), cells, right=True))
    if any(row.without for row in rows):
        for key in shown_keys(found):
            cells = [Text("–"), *(Text(spread_words(row.without.get(key))) for row in rows)]
            columns.append(Column("BatchNorm as given", cells, rank=4, right=True))
    removed = [Text("0"), *(Text(f"{row.sparsity:.4f}") for row in rows)]
    columns.append(Column("removed", removed, rank=2, right=True))
    columns.append(Column("time", [Text("–"), *(Text(duration(row.seconds)) for row in rows)], rank=3, right=True))
    memory = [Text("–"), *(Text(size(row.peak_memory_bytes)) for row in rows)]
    columns.append(Column("memory", memory, rank=1, right=True))
    yield from table(f"{printable(found.model)}, {printable(pattern)}", columns, width, "table.html")


def _recipe_row(file: Path, keep_dense: tuple[str, ...]) -> Trial:
    return recipe_trial(file.stem, RecipeChoice(file, keep_dense=keep_dense).recipe())


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
