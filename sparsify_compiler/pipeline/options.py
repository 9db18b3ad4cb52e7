"""What a user may choose about a compile run, beside the recipe."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from sparsify_compiler.errors import DataError, RecipeError
from sparsify_compiler.precision import Precision, check_precision
from sparsify_compiler.recipe import Recipe
from sparsify_compiler.runtime.tuning.cache import default_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Choices of one compile run.

    `output` is the folder to write, None for nothing on disk. `dtype` is the compiled model's (pruning itself runs on
    the model as given). `device` is "auto", "cpu", "cuda" or "cuda:N": where calibration runs and kernels are measured.
    `tokens` are the row counts the kernels are measured at. `seed` draws generated inputs. `resume` goes on with the
    finished segments that a stopped run left beside `output`; without it they are refused, and with `overwrite`
    dropped. `overwrite` also replaces what stands in `output`. `require_sparse` turns every pruned site that stays on a
    dense kernel into an error. `cache` is the folder that keeps what was measured for later runs on the same machine
    and versions (None: measure everything anew). `share_batches` gives every round of a recipe with several all
    calibration batches, not a part of its own each. `precision` is what the model's products run in while it is
    calibrated and tuned: "bfloat16" is about twice as fast on processors that have such products, and moves activations
    by a part in 500. `dense_copy` lets a layer keep its dense weight beside the sparse one, for the token counts at
    which dense wins.
    """

    output: Path | None = None
    dtype: str = "float32"
    device: str = "auto"
    tokens: tuple[int, ...] = (1, 16, 2048)
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    require_sparse: bool = False
    onnx: bool = True
    onnx_flavour: Literal["packed", "dense", "trt"] = "packed"
    kv_cache: bool = False
    recalibrate_batchnorm: bool = True
    cache: Path | None = field(default_factory=default_folder)
    dense_copy: bool = False
    share_batches: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DataError(f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if not self.tokens or min(self.tokens) < 1:
            raise DataError(f"tokens {self.tokens}: give at least one count, each at least 1")
        try:
            check_precision(self.precision)
        except ValueError as error:
            raise DataError(str(error)) from None

    def torch_dtype(self) -> torch.dtype:
        """Return the compiled model's dtype."""
        return DTYPES[self.dtype]

    def torch_device(self) -> torch.device:
        """Return the device; "auto" and "cuda" are the current CUDA device, by its number. Raises DataError."""
        asked = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            device = torch.device(asked)
        except RuntimeError:
            raise DataError(f"device {self.device!r}: choose auto, cpu, cuda or cuda:N") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise DataError(f"device {self.device!r}: torch finds no CUDA device here; use --device cpu")
        if device.type != "cuda":
            return device
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise DataError(
                f"device {self.device!r}: torch finds {torch.cuda.device_count()} CUDA devices, from cuda:0"
            )
        return torch.device("cuda", index)  # as tensors say where they are: one without a number equals none of theirs


def check_share(share_batches: bool, recipes: Iterable[Recipe]) -> None:
    """Refuse `share_batches` where no recipe of the run has rounds that could share. Raises RecipeError."""
    if share_batches and all(recipe.rounds == 1 for recipe in recipes):
        raise RecipeError(
            "--share-batches gives every round all calibration batches, and nothing is pruned in more than one round; "
            "ask for more (--rounds 3, rounds = 3 in a recipe; in a method table only iobs and recipes have them), or "
            "leave it out"
        )
