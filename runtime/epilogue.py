"""What follows the product in a kernel that has no fused epilogue: bias, then activation."""

from torch import Tensor
from torch.nn import functional

from sparsify_compiler.kernel import Activation


def finish(y: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """Return activation(y + bias) for `y` (tokens, out) and `bias` (out,). GELU is the exact one, by erf."""
    if bias is not None:
        y = y + bias
    return activate(y, activation)


def activate(y: Tensor, activation: Activation | None) -> Tensor:
    """Return activation(y), or `y` itself for None."""
    if activation == "relu":
        return functional.relu(y)
    if activation == "gelu":
        return functional.gelu(y)
    if activation == "silu":
        return functional.silu(y)
    return y
