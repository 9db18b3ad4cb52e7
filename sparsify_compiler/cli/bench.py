"""The verb `bench`: whole models, single layers with random weights, or a decoder of real size."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsify_compiler.api_bench import (
    BenchReport,
    DecodeChoice,
    RandomLayers,
    bench_decoder,
    bench_layers,
    bench_sites,
)
from sparsify_compiler.cli import options as opt
from sparsify_compiler.cli.bench_tables import draw_bench
from sparsify_compiler.cli.guard import guard
from sparsify_compiler.cli.jobs import bench_models
from sparsify_compiler.cli.progress import draw_progress
from sparsify_compiler.cli.requests import BenchRequest, DataChoice, check_output
from sparsify_compiler.errors import DataError
from sparsify_compiler.export.bench_html import bench_html
from sparsify_compiler.pattern import Pattern, parse_pattern
from sparsify_compiler.pipeline.options import DTYPES, Options
from sparsify_compiler.progress import Progress
from sparsify_compiler.runtime.benchmark.models import plot as plot_rows

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...", help="One or more; the first is the measure of the others.", show_default=False
    ),
]
OptionalData = Annotated[
    str | None, typer.Option(help="Its first batch is the input; else inputs are generated.", show_default=False)
]
Counts = Annotated[
    str | None, typer.Option(help="Samples at once; several as in 1,8.", show_default="as the inputs are")
]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--sequence-length", help="Tokens a sample; several as in 128,2048.", show_default="as the inputs are"
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Single layers instead of models: random weights out x in, as in 14336x4096,4096x4096, or those of OUT/."
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="A decoder with random weights instead of models: llama-3-8b, llama-3.2-1b, llama-2-7b, smollm2-135m, or "
        "the config.json of a Llama-like model."
    ),
]
Kind = Annotated[
    opt.Dtype | None,
    typer.Option("--dtype", help="For --layers and --config.", show_default="float16 on a GPU, else float32"),
]
Patterns = Annotated[
    str, typer.Option("--pattern", help="For --layers and --config: one or several patterns, as in 2:4,16:32.")
]
Seed = Annotated[int, typer.Option(help="Draws the weights and inputs that are random, and windows of --data.")]

OPTIONS = {
    "MODEL": ("data", "batch_size", "sequence_length", "preprocess", "decode", "compiled", "repeats", "plot", "trust"),
    "--layers": ("pattern", "sparsity", "dtype", "tokens"),
    "--config": ("pattern", "sparsity", "dtype", "batch_size", "cached", "depth", "compiled", "repeats", "plot"),
}
"""Of the options that not every form of the verb reads, those that each reads."""


def bench_verb(
    context: typer.Context,
    models: Models = None,
    layers: Layers = None,
    config: Config = None,
    pattern: Patterns = "2:4",
    sparsity: opt.Sparsity = None,
    dtype: Kind = None,
    tokens: Annotated[str, typer.Option(callback=opt.parse_tokens, help="Rows of x, for --layers.")] = "1,16,64,512",
    data: OptionalData = None,
    batch_size: Counts = None,
    sequence_length: Lengths = None,
    preprocess: opt.Preprocess = None,
    decode: Annotated[bool, typer.Option("--decode", help="Also time one more token after each sequence.")] = False,
    compiled: Annotated[bool, typer.Option("--torch-compile", help="Also time what torch.compile makes.")] = False,
    cached: Annotated[int, typer.Option("--context", min=1, help="Tokens in the cache, for --config.")] = 512,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers, for --config.", show_default="all of them")
    ] = None,
    repeats: Annotated[int, typer.Option(min=5, help="Rounds that are counted.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Draw everything on one page.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the models' times to this .png or .svg file.", show_default=False)
    ] = None,
    device: opt.Device = "auto",
    seed: Seed = 0,
    trust: opt.Trust = False,
    debug: opt.Debug = False,
) -> None:
    """Time models against the first: same run, rounds interleaved, medians, spread shown.

    With --layers: every kernel on single layers, beside dense and what the machine could do at most. With --config: a
    decoder of real size, token by token.
    """
    with guard(debug):
        form = _checked_form(context, models, layers, config)
        _check_files(json_file, html, plot)
        samples, lengths = _counts(batch_size, "--batch-size"), _counts(sequence_length, "--sequence-length")
        batch, kind = max(samples, default=1), DTYPES[dtype or _usual_dtype(device)]
        patterns = _patterns(pattern, samples, form)
        with draw_progress(Console(stderr=True)) as progress:
            if layers is not None:
                asked = RandomLayers((), patterns, sparsity, opt.token_counts(tokens), kind, seed)
                report = _time_layers(layers, asked, device, progress)
            elif config is not None:
                what = DecodeChoice(sparsity, kind, device, batch, cached, depth, repeats, compiled, seed)
                report = bench_decoder(config, patterns[0], what, progress)
            else:
                choice = DataChoice(batch, max(lengths, default=None), batch, preprocess, seed)
                names = tuple(models or ())
                request = BenchRequest(names, data, choice, samples, lengths, decode, compiled, repeats, device, trust)
                report = bench_models(request, progress)
        _show(report, json_file, html, plot)


def _checked_form(context: typer.Context, models: list[str] | None, layers: str | None, config: str | None) -> str:
    """Say which form of the verb was asked for. Raises DataError for none or several, or an option of another form."""
    chosen = [name for name, given in (("MODEL", models), ("--layers", layers), ("--config", config)) if given]
    if len(chosen) != 1:
        raise DataError(f"bench times MODELs, --layers or --config; found {' and '.join(chosen) or 'none of them'}")
    (form,) = chosen
    names = {name: parameter.opts[0] for parameter in context.command.params if (name := parameter.name)}
    for option in dict.fromkeys(name for each in OPTIONS.values() for name in each if name not in OPTIONS[form]):
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            reads = ", ".join(names[name] for name in OPTIONS[form])
            raise DataError(f"{names[option]} does not go with {form}, which reads {reads}; leave it out")
    return form


def _check_files(*files: Path | None) -> None:
    """Refuse files that could not be written before anything is measured. Raises DataError or ExportError."""
    *_, plot = files
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise DataError(f"--plot {str(plot)!r}: cannot draw {plot.suffix or 'that'}; choose a .png or .svg file")
    for file in files:
        if file is not None:
            check_output(file, overwrite=True)


def _patterns(text: str, samples: Sequence[int], form: str) -> tuple[Pattern, ...]:
    """Read --pattern. Raises DataError where --config was given several of what it times one of."""
    patterns = tuple(parse_pattern(part) for part in text.split(","))
    if form == "--config" and max(len(patterns), len(samples)) > 1:
        raise DataError("--config times one --pattern and one --batch-size a run; give one of each")
    return patterns


def _time_layers(layers: str, asked: RandomLayers, device: str, progress: Progress) -> BenchReport:
    if Path(layers).is_dir():
        return bench_sites(layers, asked.tokens, device=device, progress=progress)
    shapes = tuple(_shape(text) for text in layers.split(","))
    return bench_layers(replace(asked, shapes=shapes), device=device, progress=progress)


def _show(report: BenchReport, json_file: Path | None, html: Path | None, plot: Path | None) -> None:
    console = Console(highlight=False)
    console.print(draw_bench(report, console.width))
    if json_file is not None:
        json_file.write_text(report.to_json(), encoding="utf-8")
    if html is not None:
        html.write_text(bench_html(report), encoding="utf-8")
    if plot is not None:
        plot_rows(report.rows, plot)


def _usual_dtype(device: str) -> str:
    return "float16" if Options(device=device).torch_device().type == "cuda" else "float32"


def _counts(text: str | None, option: str) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return opt.token_counts(text)
    except typer.BadParameter as error:
        raise DataError(f"{option} {error}") from None


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", text)
    if match is None:
        raise DataError(f"--layers {text!r}: write out x in, as in 14336x4096, with commas, or a compiled folder")
    return int(match[1]), int(match[2])
