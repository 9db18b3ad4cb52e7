"""Is a kernel's output right? The product in float64 and how far rounding alone may take a kernel from it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.kernel import Activation
from sparsify_compiler.runtime.epilogue import activate

ROWS_AT_ONCE = 4096
"""Rows of the weight that are held in float64 at a time."""


@dataclass(frozen=True)
class Expected:
    """The product in float64, (tokens, out), and how far each entry of a kernel's result may be from it.

    An entry may be off by

        eps(a) sqrt(in + 1) (|x| |weight|ᵀ + |bias|)    rounding of a sum of in + 1 terms, accumulated in dtype a
        + 4 eps(d) |reference|                          rounding to the output dtype d: after the sum, the bias,
                                                        the activation

    where a is float64 for float64 and float32 for all others. The first is Higham's n eps bound with n replaced by
    sqrt(n), the size that independent rounding errors have. The activations at most stretch an error by 1.13.
    """

    reference: Tensor
    allowed: Tensor
    dtype: torch.dtype

    def difference(self, y: Tensor) -> str | None:
        """Compare a kernel's result `y` (tokens, out) of `dtype`; None, or what is wrong in words."""
        if y.shape != self.reference.shape or y.dtype != self.dtype:
            return f"returned {y.dtype} {tuple(y.shape)}; expected {self.dtype} {tuple(self.reference.shape)}"
        error = (y.to(torch.float64) - self.reference).abs()
        wrong = ~(error <= self.allowed)  # NaN counts as wrong
        if not wrong.any():
            return None
        worst = float((error / self.allowed).nan_to_num(nan=math.inf).max())
        return (
            f"{int(wrong.sum())} of {wrong.numel()} outputs differ from float64, at worst {worst:.3g} times the bound"
        )


def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Expected:
    """Compute activation(x weightᵀ + bias) in float64 for `x` (tokens, in) and the dense `weight` (out, in)."""
    wide_x = x.to(torch.float64)
    wide_bias = None if bias is None else bias.to(torch.float64)
    linear = _product(wide_x, weight)
    scale = _product(wide_x.abs(), weight, absolute=True)
    if wide_bias is not None:
        linear, scale = linear + wide_bias, scale + wide_bias.abs()
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    terms = math.sqrt(weight.shape[1] + 1)
    allowed = torch.finfo(accumulator).eps * terms * 1.13 * scale + 4 * torch.finfo(x.dtype).eps * linear.abs()
    allowed = allowed + torch.finfo(x.dtype).smallest_normal  # results below it lose digits in any kernel
    return Expected(activate(linear, activation), allowed, x.dtype)


def difference(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None
) -> str | None:
    """Compare `y` (tokens, out) with activation(x weightᵀ + bias) in float64; None, or what is wrong in words.

    `x` is (tokens, in), `weight` the dense (out, in). The bound is that of `Expected`.
    """
    return expected(x, weight, bias, activation).difference(y)


def _product(x: Tensor, weight: Tensor, absolute: bool = False) -> Tensor:
    """Return x weightᵀ (or x |weight|ᵀ) for a float64 x, holding few rows of the weight in float64 at a time."""
    parts = []
    for rows in torch.split(weight, ROWS_AT_ONCE):
        wide = rows.to(torch.float64)
        parts.append(functional.linear(x, wide.abs() if absolute else wide))
    return torch.cat(parts, dim=1)  # (tokens, out)
