"""The verbs that look and measure: inspect, evaluate, run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsify_compiler.cli import options as opt
from sparsify_compiler.cli.guard import guard
from sparsify_compiler.cli.jobs import evaluate_model, inspect_model, run_model
from sparsify_compiler.cli.progress import draw_progress
from sparsify_compiler.cli.requests import DataChoice, EvaluateRequest, InspectRequest, check_output
from sparsify_compiler.cli.tables import draw_evaluation, draw_inspection, inspection_json
from sparsify_compiler.export.report_rows import printable


def inspect_verb(
    model: opt.Model,
    calibration: opt.Calibration = None,
    tokens: opt.Tokens = "1,16,2048",
    dtype: opt.DtypeOption = "float32",
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
        request = InspectRequest(model, opt.token_counts(tokens), dtype, calibration, choice, device, trust)
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
