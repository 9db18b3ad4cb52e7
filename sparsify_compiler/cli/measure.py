"""The verbs that look and measure: inspect, evaluate, run, bench."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsify_compiler.cli import options as opt
from sparsify_compiler.cli.guard import guard
from sparsify_compiler.cli.jobs import bench_models, evaluate_model, inspect_model, run_model
from sparsify_compiler.cli.progress import draw_progress
from sparsify_compiler.cli.requests import BenchRequest, DataChoice, EvaluateRequest, InspectRequest, check_output
from sparsify_compiler.cli.tables import draw_bench, draw_evaluation, draw_inspection, inspection_json
from sparsify_compiler.errors import DataError
from sparsify_compiler.export.report_rows import printable
from sparsify_compiler.runtime.bench import plot as plot_rows
from sparsify_compiler.runtime.bench import rows_to_json


def inspect_verb(
    model: opt.Model,
    calibration: opt.Calibration = None,
    tokens: opt.Tokens = "1,16,2048",
    windows: opt.Windows = None,
    sequence_length: opt.Length = None,
    batch_size: opt.BatchSize = None,
    preprocess: opt.Preprocess = None,
    device: opt.Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust: opt.Trust = False,
    debug: opt.Debug = False,
) -> None:
    """List every site of MODEL: shape, tokens it would see, patterns and kernels it can take, or why not."""
    with guard(debug):
        choice = DataChoice(windows, sequence_length, batch_size, preprocess)
        request = InspectRequest(model, opt.token_counts(tokens), calibration, choice, device, trust)
        with draw_progress(Console(stderr=True)) as progress:
            inspection = inspect_model(request, progress)
        console = Console(highlight=False)
        if as_json:
            typer.echo(inspection_json(inspection))
        else:
            console.print(draw_inspection(model, inspection, console.width))


def evaluate_verb(
    model: opt.Model,
    data: opt.Data,
    against: Annotated[
        str | None, typer.Option(help="The dense model to compare with; as MODEL.", show_default=False)
    ] = None,
    windows: opt.Windows = None,
    sequence_length: opt.Length = None,
    batch_size: opt.BatchSize = None,
    preprocess: opt.Preprocess = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
    debug: opt.Debug = False,
) -> None:
    """Measure MODEL on data: perplexity, top-1 and top-5 accuracy, or how close it stays to the dense model."""
    with guard(debug):
        choice = DataChoice(windows, sequence_length, batch_size, preprocess, seed)
        request = EvaluateRequest(model, data, against, choice, device, trust)
        with draw_progress(Console(stderr=True)) as progress:
            measures = evaluate_model(request, progress)
        console = Console(highlight=False)
        console.print(draw_evaluation(model, measures, console.width))


def run_verb(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file.", show_default=False)],
    inputs: Annotated[Path, typer.Option("--input", help="An .npz of the inputs by name.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz to write.", show_default=False)],
    overwrite: opt.Overwrite = False,
    debug: opt.Debug = False,
) -> None:
    """Run an ONNX file on inputs from a file and write its outputs by name."""
    with guard(debug):
        check_output(output, overwrite)
        for line in run_model(model, inputs, output):
            typer.echo(printable(line))


def bench_verb(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="One or more; the first is the measure of the others.", show_default=False
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Its first batch is the input; else inputs are generated.", show_default=False)
    ] = None,
    sequence_length: opt.Length = None,
    batch_size: opt.BatchSize = None,
    preprocess: opt.Preprocess = None,
    repeats: Annotated[int, typer.Option(min=5, help="Rounds that are counted.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the times to this .png or .svg file.", show_default=False)
    ] = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
    debug: opt.Debug = False,
) -> None:
    """Time models against the first: same run, rounds interleaved, medians, spread shown."""
    with guard(debug):
        if plot is not None and plot.suffix not in (".png", ".svg"):
            raise DataError(f"--plot {str(plot)!r}: cannot draw {plot.suffix or 'that'}; choose a .png or .svg file")
        choice = DataChoice(batch_size or 1, sequence_length, batch_size, preprocess, seed)
        request = BenchRequest(tuple(models), data, choice, repeats, device, trust)
        with draw_progress(Console(stderr=True)) as progress:
            rows = bench_models(request, progress)
        console = Console(highlight=False)
        console.print(draw_bench(rows, console.width))
        if json_file is not None:
            json_file.write_text(rows_to_json(rows), encoding="utf-8")
        if plot is not None:
            plot_rows(rows, plot)
