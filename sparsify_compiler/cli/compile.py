"""The verbs that write: compile, demo, export; and report, which shows again what compile found."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from sparsify_compiler.cli import options as opt
from sparsify_compiler.cli.guard import guard
from sparsify_compiler.cli.jobs import artefact_fault, compile_model, demo_request, export_artefact, read_report
from sparsify_compiler.cli.progress import draw_progress
from sparsify_compiler.cli.requests import CompileRequest, DataChoice, ExportRequest, RecipeChoice, check_output
from sparsify_compiler.export.report_rows import printable, size
from sparsify_compiler.export.report_text import render_report, verification_words
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.pipeline.workspace import Workspace
from sparsify_compiler.runtime.tuning.cache import default_folder

RESUME = "segments that were finished are kept: give the same command with --resume to go on"


def compile_verb(
    model: opt.Model,
    output: opt.Output,
    calibration: opt.Calibration = None,
    heldout: opt.Heldout = None,
    recipe: opt.RecipeFile = None,
    method: opt.Method = None,
    pattern: opt.PatternText = None,
    sparsity: opt.Sparsity = None,
    keep_dense: opt.KeepDense = None,
    refit: opt.Refit = None,
    rounds: opt.Rounds = None,
    swaps: opt.Swaps = None,
    step: opt.Steps = None,
    share_batches: opt.ShareBatches = False,
    precision: opt.PrecisionOption = "float32",
    dtype: opt.DtypeOption = "float32",
    device: opt.Device = "auto",
    tokens: opt.Tokens = "1,16,2048",
    windows: opt.Windows = None,
    sequence_length: opt.Length = None,
    batch_size: opt.BatchSize = None,
    preprocess: opt.Preprocess = None,
    seed: opt.Seed = 0,
    resume: opt.Resume = False,
    overwrite: opt.OverwriteRun = False,
    require_sparse: opt.RequireSparse = False,
    onnx_flavour: opt.FlavourOption = "packed",
    kv_cache: opt.KvCache = False,
    no_onnx: opt.NoOnnx = False,
    no_cache: opt.NoCache = False,
    dense_copy: opt.DenseCopy = False,
    trust: opt.Trust = False,
    debug: opt.Debug = False,
) -> None:
    """Prune MODEL, check it, and write OUT/: model.onnx, model.safetensors, report.html and report.json."""
    with guard(debug, lambda: _resumable(output)):
        Workspace(output, overwrite, resume)  # refuses what would be lost before any work is done
        dense, steps = tuple(keep_dense or ()), tuple(step or ())
        wanted = RecipeChoice(recipe, method, pattern, sparsity, dense, refit, rounds, swaps, steps)
        options = Options(
            output=output,
            dtype=dtype,
            device=device,
            tokens=opt.token_counts(tokens),
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            require_sparse=require_sparse,
            onnx=not no_onnx,
            onnx_flavour=onnx_flavour,
            kv_cache=kv_cache,
            cache=None if no_cache else default_folder(),
            dense_copy=dense_copy,
            share_batches=share_batches,
            precision=precision,
        )
        choice = DataChoice(windows, sequence_length, batch_size, preprocess, seed)
        request = CompileRequest(model, wanted.recipe(), options, calibration, heldout, choice, trust)
        _compile(request, output)


def demo_verb(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("demo-out"),
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to use.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    resume: opt.Resume = False,
    overwrite: opt.OverwriteRun = False,
    debug: opt.Debug = False,
) -> None:
    """Prune SmolLM2-135M to 2:4 with SparseGPT on text that comes along, export it, check it, show the report."""
    with guard(debug, lambda: _resumable(output)):
        request = demo_request(output, windows, sequence_length, resume, overwrite)
        Workspace(output, overwrite, resume)  # refuses what would be lost before any work is done
        _compile(request, output)


def export_verb(
    artefact: opt.Artefact,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The ONNX file.", show_default="model.onnx in the folder")
    ] = None,
    onnx_flavour: opt.FlavourOption = "packed",
    kv_cache: opt.KvCache = False,
    overwrite: opt.Overwrite = False,
    trust: opt.Trust = False,
    debug: opt.Debug = False,
) -> None:
    """Write the ONNX file of a folder that `compile` wrote, and check it in ONNX Runtime."""
    with guard(debug):
        target = output or artefact / "model.onnx"
        check_output(target, overwrite)
        written = export_artefact(ExportRequest(artefact, target, onnx_flavour, kv_cache, trust))
        for file in written.files:
            _say(f"written: {target.with_name(file.name)}, {size(file.size_bytes)}")
        for note in (verification_words(written.verification), *written.notes):
            _say(note)


def report_verb(artefact: opt.Artefact, debug: opt.Debug = False) -> None:
    """Show the report of a folder that `compile` wrote."""
    with guard(debug):
        console = Console(highlight=False)
        console.print(render_report(read_report(artefact), console.width))
        if broken := artefact_fault(artefact):
            _say(f"\nthe report is whole, the model beside it is not: {broken}")


def _resumable(output: Path) -> str:
    """Say how to go on after an interruption, where there is anything to go on from."""
    return RESUME if Workspace(output, overwrite=True).has_segments() else ""


def _compile(request: CompileRequest, output: Path) -> None:
    with draw_progress(Console(stderr=True)) as progress:
        report = compile_model(request, progress)
    console = Console(highlight=False)
    console.print(render_report(report, console.width))
    _say(f"\nwritten to {output}: {', '.join(file.name for file in report.files)}")


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(Text(printable(text)))
