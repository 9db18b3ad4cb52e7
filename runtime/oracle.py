"""Is a kernel's output right? The product in float64 and how far rounding alone may take a kernel from it."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.kernel import Activation
from sparsify_compiler.runtime.epilogue import activate


def difference(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None
) -> str | None:
    """Compare `y` (tokens, out) with activation(x weightᵀ + bias) in float64; None, or what is wrong in words.

    `x` is (tokens, in), `weight` the dense (out, in). An entry may be off by

        eps(a) sqrt(in + 1) (|x| |weight|ᵀ + |bias|)    rounding of a sum of in + 1 terms, accumulated in dtype a
        + 4 eps(d) |reference|                          rounding to the output dtype d: after the sum, the bias,
                                                        the activation

    where a is float64 for float64 and float32 for all others. The first is Higham's n eps bound with n replaced by
    sqrt(n), the size that independent rounding errors have. The activations at most stretch an error by 1.13.
    """
    if y.shape != (x.shape[0], weight.shape[0]) or y.dtype != x.dtype:
        return f"returned {y.dtype} {tuple(y.shape)}; expected {x.dtype} {(x.shape[0], weight.shape[0])}"
    exact = [None if t is None else t.to(torch.float64) for t in (x, weight, bias)]
    wide_x, wide_weight, wide_bias = exact
    assert wide_x is not None
    assert wide_weight is not None
    linear = functional.linear(wide_x, wide_weight, wide_bias)
    reference = activate(linear, activation)
    scale = functional.linear(wide_x.abs(), wide_weight.abs(), None if wide_bias is None else wide_bias.abs())
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    terms = math.sqrt(weight.shape[1] + 1)
    allowed = torch.finfo(accumulator).eps * terms * 1.13 * scale + 4 * torch.finfo(x.dtype).eps * linear.abs()
    allowed = allowed + torch.finfo(x.dtype).smallest_normal  # results below it lose digits in any kernel
    error = (y.to(torch.float64) - reference).abs()
    wrong = ~(error <= allowed)  # NaN counts as wrong
    if not wrong.any():
        return None
    worst = float((error / allowed).nan_to_num(nan=math.inf).max())
    return f"{int(wrong.sum())} of {wrong.numel()} outputs differ from float64, at worst {worst:.3g} times the bound"
