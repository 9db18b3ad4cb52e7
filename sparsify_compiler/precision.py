"""The dtype that matrix products of the model run in, whatever its weights are stored in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
"""The dtype that products run in: the weights' own, or bfloat16 with sums in float32."""


def products(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Multiply in `precision` inside (autocast): weights, their gradients and accumulators stay float32.

    "float32" leaves what holds outside as it is.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def check_precision(precision: str) -> None:
    """Refuse a word that is no `Precision`. Raises ValueError."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision {precision!r}: choose float32 or bfloat16, what products run in")
