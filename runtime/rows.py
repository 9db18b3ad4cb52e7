"""What our CUDA kernels ask of x: rows of whole 16-byte words, one after the other."""

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.kernel import Activation

HALF_DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16
ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2, "silu": 3}
"""The numbers of runtime/cuda/epilogue.cuh."""


def aligned_rows(x: Tensor, columns: int) -> Tensor:
    """Return `x` (tokens, in) as (tokens, columns), columns >= in: contiguous, at a 16-byte address, zeros beyond in.

    `x` itself where it is that already; else a copy.
    """
    if x.shape[1] < columns:
        return functional.pad(x, (0, columns - x.shape[1]))
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def element_defines(dtype: torch.dtype, activation: Activation | None = None) -> tuple[tuple[str, int], ...]:
    """Return the defines that ptx.cuh and epilogue.cuh read."""
    return (("BF16", int(dtype == torch.bfloat16)), ("ACTIVATION", ACTIVATION_CODES[activation]))


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
