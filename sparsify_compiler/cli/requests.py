"""What each verb was asked for, as values: made from the options here, carried out in `cli.jobs`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsify_compiler.api import METHODS
from sparsify_compiler.api_table import Trial
from sparsify_compiler.errors import ExportError, RecipeError
from sparsify_compiler.pattern import parse_pattern
from sparsify_compiler.pipeline.options import Options, check_share
from sparsify_compiler.precision import Precision
from sparsify_compiler.recipe import STEPS, Recipe, make_rule, parse_recipe


@dataclass(frozen=True)
class DataChoice:
    """How much of the data is read and how: the options that `data.load_data` takes."""

    windows: int | None = None
    sequence_length: int | None = None
    batch_size: int | None = None
    preprocess: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class CompileRequest:
    """Prune `model` by `recipe` and write `options.output`; `calibration` and `heldout` are DATA references."""

    model: str
    recipe: Recipe
    options: Options
    calibration: str | None = None
    heldout: str | None = None
    choice: DataChoice = DataChoice()
    trust: bool = False

    def __post_init__(self) -> None:
        check_share(self.options.share_batches, (self.recipe,))


@dataclass(frozen=True)
class InspectRequest:
    """List the sites of `model`, and what compile would need for the kernels at `tokens` in `dtype` and the data."""

    model: str
    tokens: tuple[int, ...]
    dtype: str = "float32"
    calibration: str | None = None
    choice: DataChoice = DataChoice()
    device: str = "auto"
    trust: bool = False


@dataclass(frozen=True)
class EvaluateRequest:
    """Measure `model` on `data`, and the model `against` beside it."""

    model: str
    data: str
    against: str | None = None
    choice: DataChoice = DataChoice()
    device: str = "auto"
    trust: bool = False


@dataclass(frozen=True)
class BenchRequest:
    """Time `models` on the first batch of `data`, or on generated inputs, in every size of the sweep."""

    models: tuple[str, ...]
    data: str | None = None
    choice: DataChoice = DataChoice()
    samples: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    decode: bool = False
    compiled: bool = False
    repeats: int = 20
    device: str = "auto"
    trust: bool = False


@dataclass(frozen=True)
class TableRequest:
    """Prune `model` by every trial on each of `draws` draws of `calibration`, and measure it on every `heldout`.

    `choice` is of the calibration data; at most `heldout_windows` samples of a held-out set are read. Shared batches
    that no trial has rounds for are refused as it is made: a RecipeError.
    """

    model: str
    calibration: str
    heldout: tuple[str, ...]
    trials: tuple[Trial, ...]
    draws: int = 3
    choice: DataChoice = DataChoice()
    heldout_windows: int | None = None
    output: Path | None = None
    resume: bool = False
    share_batches: bool = False
    precision: Precision = "float32"
    device: str = "auto"
    trust: bool = False

    def __post_init__(self) -> None:
        check_share(self.share_batches, (trial.recipe for trial in self.trials))


@dataclass(frozen=True)
class ExportRequest:
    """Write the ONNX file `output` from the folder `artefact` that compile wrote."""

    artefact: Path
    output: Path
    flavour: Literal["packed", "dense", "trt"] = "packed"
    kv_cache: bool = False
    trust: bool = False


@dataclass(frozen=True)
class RecipeChoice:
    """The options that make a recipe: a file of its own, or one rule for every site."""

    file: Path | None = None
    method: str | None = None
    pattern: str | None = None
    sparsity: float | None = None
    keep_dense: tuple[str, ...] = ()
    refit: bool | None = None
    rounds: int | None = None
    swaps: int | None = None
    steps: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        """Read the file, or build the one rule: sparsegpt and 2:4 where nothing else was said.

        Raises:
            RecipeError: the file cannot be read, options contradict each other, or a value is unknown or impossible.
        """
        if self.file is not None:
            return self._from_file(self.file)
        name = self.method or "sparsegpt"
        if name not in METHODS:
            raise RecipeError(f"--method {name!r}: unknown; choose one of {', '.join(sorted(METHODS))}")
        if unknown := [word for word in self.steps if word not in STEPS]:
            raise RecipeError(f"--step {unknown[0]!r}: unknown; choose one of {', '.join(STEPS)}")
        pattern = parse_pattern(self.pattern or "2:4")
        rule = make_rule("*", pattern, METHODS[name](), self.sparsity, self.refit, self.swaps or 0)
        steps: dict[str, Any] = {word: STEPS[word]() for word in self.steps}
        return Recipe((rule,), self.keep_dense, self.rounds or 1, **steps)

    def _from_file(self, file: Path) -> Recipe:
        given = {
            "--method": self.method,
            "--pattern": self.pattern,
            "--sparsity": self.sparsity,
            "--rounds": self.rounds,
            "--swaps": self.swaps,
            "--step": self.steps or None,
            "--refit": True if self.refit else None,
            "--no-refit": True if self.refit is False else None,
        }
        if clash := [option for option, value in given.items() if value is not None]:
            raise RecipeError(f"--recipe and {clash[0]} were both given; put it into {str(file)!r}, or leave one out")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise RecipeError(f"--recipe {str(file)!r}: not a text file; a recipe is TOML in UTF-8") from None
        except OSError as error:
            raise RecipeError(f"--recipe {str(file)!r}: cannot be read ({error.strerror}); check the path") from None
        recipe = parse_recipe(text, METHODS)
        return dataclasses.replace(recipe, keep_dense=recipe.keep_dense + self.keep_dense)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a file that is there already or cannot be written, before any work is done. Raises ExportError."""
    folder = output.parent
    if not folder.is_dir():
        raise ExportError(f"cannot write {str(output)!r}: there is no folder {str(folder)!r}; make it first")
    if not os.access(output if output.is_file() else folder, os.W_OK):
        raise ExportError(f"cannot write {str(output)!r}: it is protected; choose another place, or change the rights")
    if output.is_dir():
        raise ExportError(f"output {str(output)!r} is a folder; give the name of a file")
    if output.exists() and not overwrite:
        raise ExportError(f"output {str(output)!r} exists already; add --overwrite to replace it, or choose another")
