"""The verb `reproduce sparse-recovery`: the synthetic experiment of the I-OBS paper beside its published figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from sparsify_compiler.cli import options as opt
from sparsify_compiler.cli.guard import guard
from sparsify_compiler.errors import DataError
from sparsify_compiler.export.report_table import Column, small, table
from sparsify_compiler.passes.prune.sparse_recovery import SEED, read_images, sparse_recovery
from sparsify_compiler.passes.prune.sparse_recovery_result import (
    PUBLISHED,
    Curve,
    Prior,
    RecoveryResult,
    Scale,
    plot_recovery,
)
from sparsify_compiler.pipeline.options import Options

MILESTONES = (0, 1, 2, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000)
"""The steps shown where nothing was published."""

MEANING = {
    "paper": "loss: mean of squares before the step, distance to the true vector after it, as the paper's code counts; "
    "means over the runs. published: 20 runs at its own seed.",
    "correct": "loss: half the sum of squares, and distance to the true vector, both after so many steps; means over "
    "the runs. The paper shows no figures at this scale: a Newton step recovers the vector at once.",
}


def recovery_verb(
    prior: Annotated[Prior, typer.Option(help="What the sparse vector is drawn from.")] = "gaussian",
    scale: Annotated[
        Scale, typer.Option(help="paper: its code's 2/n between gradient and Hessian; correct: both of one loss.")
    ] = "paper",
    runs: Annotated[int, typer.Option(min=1, help="Problems drawn.")] = 20,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of every method.", show_default="the paper's; correct scale: 100")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="An .npz file of images, for the mnist prior.", show_default=False)
    ] = None,
    obc_mask: Annotated[
        bool, typer.Option("--obc-mask", help="Also run the paper's OBC-mask variant, its defects included.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the figure to this .png or .svg file.", show_default=False)
    ] = None,
    device: opt.Device = "auto",
    seed: Annotated[int, typer.Option(help="Decides what is drawn; the default is the authors'.")] = SEED,
    debug: opt.Debug = False,
) -> None:
    """Run Figure 1 of the I-OBS paper again and print its figures beside the published ones."""
    with guard(debug):
        _check(prior, data, plot)
        images = read_images(data) if data is not None else None
        where = str(Options(device=device).torch_device())
        result = sparse_recovery(prior, scale, runs, steps, seed, images, obc_mask, where)
        if json_file is not None:
            json_file.write_text(result.to_json(), encoding="utf-8")
        if plot is not None:
            plot_recovery(result, plot)
        console = Console(highlight=False)
        console.print(draw_recovery(result, console.width))


def draw_recovery(result: RecoveryResult, width: int) -> RenderableType:
    """Draw one table a method: loss and distance at some steps, beside the published ones."""
    parts: list[RenderableType] = []
    for curve in result.curves:
        parts += _curve(result, curve, width)
    return Group(*parts, small(Text(MEANING[result.scale])))


def _curve(result: RecoveryResult, curve: Curve, width: int) -> Iterable[RenderableType]:
    known = {point.step: point for point in PUBLISHED.get((result.prior, result.scale, curve.method), ())}
    last = result.steps - 1 if result.scale == "paper" else result.steps
    steps = [step for step in (known or MILESTONES) if step <= last]
    steps += [last] if last not in steps else []
    found = [result.at(curve.method, step) for step in steps]
    columns = [Column("step", [Text(str(step)) for step in steps], right=True)]
    for index, name in enumerate(("loss", "distance")):
        columns.append(Column(name, [Text(f"{values[index]:.4g}") for values in found], right=True))
        if known:
            published = [getattr(known[step], name) if step in known else None for step in steps]
            cells = [Text("–" if value is None else f"{value:.4g}", "dim") for value in published]
            columns.append(Column("published", cells, right=True))
    title = f"{curve.method}: {result.prior} prior, {result.scale} scale, {result.runs} runs"
    return table(title, columns, width, "--json")


def _check(prior: Prior, data: Path | None, plot: Path | None) -> None:
    """Refuse what could not end well before anything is run. Raises DataError."""
    if prior == "mnist" and data is None:
        raise DataError("--prior mnist draws its vectors from images: give --data mnist.npz, MNIST as one .npz file")
    if prior != "mnist" and data is not None:
        raise DataError(f"--data is for --prior mnist, {prior} needs none; leave one out")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise DataError(f"--plot {str(plot)!r}: cannot draw {plot.suffix or 'that'}; choose a .png or .svg file")
