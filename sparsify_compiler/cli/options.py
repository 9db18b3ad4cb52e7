"""The options of the command line, each described once and shared by the verbs that have it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsify_compiler.precision import Precision
from sparsify_compiler.recipe import STEPS

DATA = "text or .jsonl, .npz or .safetensors of named inputs, a folder or tar of images with a labels.csv, or "
DATA += "package.module:factory (with --trust)"
MODEL = "A Hugging Face folder, a .gguf, .onnx or .pt2 file, a compiled OUT/, or package.module:factory."


Dtype = Literal["float32", "float16", "bfloat16"]
Flavour = Literal["packed", "dense", "trt"]


def parse_tokens(text: str) -> str:
    """Check a list of token counts such as "1,16,2048" while the command line is read; `token_counts` splits it.

    Raises:
        typer.BadParameter: an entry is no whole number of at least 1.
    """
    token_counts(text)
    return text


def token_counts(text: str) -> tuple[int, ...]:
    """Split "1,16,2048" into numbers, in the order given, each once.

    Raises:
        typer.BadParameter: an entry is no whole number of at least 1.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isascii() and entry.isdigit() and int(entry) > 0 for entry in entries):
        raise typer.BadParameter(f"{text!r}: write whole numbers of at least 1 with commas between, as in 1,16,2048")
    return tuple(dict.fromkeys(int(entry) for entry in entries))


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
Artefact = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `compile` wrote.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)]
Calibration = Annotated[str | None, typer.Option(help=f"Calibration data: {DATA}.", show_default=False)]
Heldout = Annotated[
    str | None, typer.Option(help="Data to measure quality on, before and after; as --calibration.", show_default=False)
]
Data = Annotated[str, typer.Option(help=f"Data to measure on: {DATA}.", show_default=False)]

RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe in TOML.", show_default=False)]
Method = Annotated[
    str | None,
    typer.Option(help="magnitude, wanda, sparsegpt, alps, obc, iobs or woodtaylor.", show_default="sparsegpt"),
]
PatternText = Annotated[
    str | None,
    typer.Option("--pattern", help="unstructured, kept:of as in 2:4, or rows x cols as in 64x64.", show_default="2:4"),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="The share of weights removed, in [0, 1); N:M patterns imply it.", show_default=False),
]
KeepDense = Annotated[
    list[str] | None,
    typer.Option(help="A glob of sites to leave dense; may be given several times.", show_default=False),
]
Rounds = Annotated[
    int | None,
    typer.Option(min=1, help="Prune so many times and keep the best round on held-out data.", show_default="1"),
]
ShareBatches = Annotated[
    bool,
    typer.Option(
        "--share-batches",
        help="Give every round all calibration batches, not a part of its own; with --rounds or a recipe's.",
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="What the model's products run in while it is calibrated and tuned."),
]
Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit",
        help="Re-solve the kept weights on the final mask, or leave them as the method does.",
        show_default="--refit; not for woodtaylor, nor for iobs in rounds",
    ),
]
Swaps = Annotated[
    int | None,
    typer.Option(min=0, help="Rounds of 1-swap search that improve each mask before the re-solve.", show_default="0"),
]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--step",
        help=f"A step beside the pruning, with its default settings: {', '.join(STEPS)}; may be given several times.",
        show_default=False,
    ),
]

DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="The compiled model's floating-point type.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Tokens = Annotated[
    str, typer.Option(callback=parse_tokens, help="Token counts (rows of x) that kernels are measured at.")
]
Windows = Annotated[
    int | None,
    typer.Option(min=1, help="Samples, or windows of text, to use.", show_default="text: 128, else all"),
]
Length = Annotated[
    int | None,
    typer.Option("--sequence-length", min=2, help="Tokens a window.", show_default="the model's, at most 1024"),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Samples that run at once.", show_default="what suits the data")
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        help="How to prepare images: 'size=224 mean=0.485,0.456,0.406 std=0.229,0.224,0.225 channels=rgb'.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Decides which windows are drawn and all else that is random.")]

Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the output.")]
OverwriteRun = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace what stands in the output; without --resume also drop what a stopped run had finished.",
    ),
]
RequireSparse = Annotated[bool, typer.Option("--require-sparse", help="Fail if a pruned site stays on a dense kernel.")]
FlavourOption = Annotated[
    Flavour,
    typer.Option(
        "--onnx-flavour",
        help="packed: sparse weights and a portable body; dense: zeros in dense weights; trt: 2:4 for TensorRT.",
    ),
]
KvCache = Annotated[bool, typer.Option("--kv-cache", help="A decoder's past keys and values are inputs and outputs.")]
NoOnnx = Annotated[bool, typer.Option("--no-onnx", help="Write the torch artefact only.")]
Trust = Annotated[bool, typer.Option("--trust", help="Allow inputs that run code: .pt2 and package.module:factory.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure kernels anew; neither read nor keep verdicts.")]
DenseCopy = Annotated[
    bool, typer.Option("--dense-copy", help="Let a layer keep its dense weight too, for token counts where dense wins.")
]
