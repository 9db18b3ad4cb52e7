"""The dtype that matrix products of the model run in, whatever its weights are stored in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
"""The dtype that products run in: the weights' own, or bfloat16 with sums in float32."""


def products(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Multiply in `precision` inside (autocast): weights, their gradients and accumulators stay float32.

    "float32" leaves what holds outside as it is.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


@contextmanager
def whole_float32() -> Iterator[None]:
    """Multiply float32 in float32 inside, whatever the program around chose: TF32 and bfloat16 spoil second moments.

    Autocast (`products`) is another matter and stays. What the program chose holds again afterwards.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a program that chose by PyTorch's newer settings is refused by the older ones
        with _newer_settings_whole():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _newer_settings_whole() -> Iterator[None]:
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def check_precision(precision: str) -> None:
    """Refuse a word that is no `Precision`. Raises ValueError."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision {precision!r}: choose float32 or bfloat16, what products run in")
