"""The command line `sparsify-compiler`: its verbs, and what happens when one fails."""

import sys
from typing import Annotated

import typer

from sparsify_compiler.cli.bench import bench_verb
from sparsify_compiler.cli.compile import compile_verb, demo_verb, export_verb, report_verb
from sparsify_compiler.cli.guard import install_bug_report
from sparsify_compiler.cli.kernels import kernels_verb
from sparsify_compiler.cli.measure import evaluate_verb, inspect_verb, run_verb
from sparsify_compiler.cli.reproduce_recovery import recovery_verb
from sparsify_compiler.cli.reproduce_table import table_verb
from sparsify_compiler.version import __version__

VERBS = (
    (
        "compile",
        compile_verb,
        "sparsify-compiler compile SmolLM2-135M/ -o OUT/ --calibration train.txt --heldout test.txt",
        "sparsify-compiler compile resnet.onnx -o OUT/ --method wanda --pattern unstructured --sparsity 0.5 "
        "--calibration images.npz",
    ),
    ("inspect", inspect_verb, "sparsify-compiler inspect resnet.onnx --tokens 1,64"),
    (
        "evaluate",
        evaluate_verb,
        "sparsify-compiler evaluate OUT/model.onnx --data test.txt --against SmolLM2-135M/",
    ),
    ("run", run_verb, "sparsify-compiler run OUT/model.onnx --input x.npz -o y.npz"),
    (
        "bench",
        bench_verb,
        "sparsify-compiler bench dense.onnx OUT/model.onnx --json times.json --html times.html",
        "sparsify-compiler bench SmolLM2-135M/ OUT/ --batch-size 1,8 --sequence-length 128,512 --decode",
        "sparsify-compiler bench --layers 14336x4096,4096x14336 --pattern 2:4,16:32 --tokens 1,8,64",
        "sparsify-compiler bench --config llama-3-8b --pattern 2:4",
    ),
    ("kernels", kernels_verb, "sparsify-compiler kernels --device cuda"),
    ("export", export_verb, "sparsify-compiler export OUT/ -o model_trt.onnx --onnx-flavour trt"),
    (
        "reproduce sparse-recovery",
        recovery_verb,
        "sparsify-compiler reproduce sparse-recovery --runs 20 --plot recovery.svg",
    ),
    (
        "reproduce method-table",
        table_verb,
        "sparsify-compiler reproduce method-table SmolLM2-135M/ -c c4.jsonl --heldout wikitext.txt --heldout c4.txt "
        "--methods magnitude,wanda,sparsegpt,alps,iobs --patterns 0.5,2:4,16:32 --output table/",
    ),
    ("report", report_verb, "sparsify-compiler report OUT/"),
    ("demo", demo_verb, "sparsify-compiler demo -o demo-out/ --windows 16"),
)

GROUPS = {"reproduce": "Run a published experiment, or a comparison of methods, again."}
"""What the verbs of two words, by the first of them, have in common."""


def main() -> None:
    """Run the command line with the arguments of the process, and leave with its exit status."""
    install_bug_report(sys.argv[1:])
    # the command itself, not the Typer object: calling that would replace the excepthook with typer's own
    typer.main.get_command(build_app())(prog_name="sparsify-compiler")


def build_app() -> typer.Typer:
    """Put the verbs together."""
    app = typer.Typer(
        name="sparsify-compiler",
        help="Give it a trained model and some data: the most accurate sparse model, measured, as a torch module and "
        "as an ONNX file.",
        epilog="Example: sparsify-compiler compile MODEL -o OUT/ --calibration text.txt",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
    )
    app.callback()(_program)
    groups = {word: typer.Typer(no_args_is_help=True, rich_markup_mode="rich") for word in GROUPS}
    for word, group in groups.items():
        app.add_typer(group, name=word, help=GROUPS[word])
    for name, verb, *examples in VERBS:
        heading = "Example" if len(examples) == 1 else "Examples"
        # a blank line between two: rich joins lines that follow each other
        epilog = f"[bold]{heading}[/bold]\n\n" + "\n\n".join(f"  {example}" for example in examples)
        word, _, experiment = name.partition(" ")
        groups.get(word, app).command(experiment or word, epilog=epilog)(verb)
    return app


def _program(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda value: _version(value), help="Show the version.")
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsify-compiler {__version__}")
        raise typer.Exit
