"""The operator `sparsify::linear`, which runs every kernel. Importing this file registers it, as PyTorch requires.

torch.compile, torch.export, autograd, vmap and CUDA graphs see a single opaque node:

    sparsify::linear(Tensor x, Tensor[] tensors, Tensor? bias, str kernel, SymInt out_features, str? activation,
                     str variants="") -> Tensor
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, Kernel, Prepared
from sparsify_compiler.runtime.kernels import kernel_named


@torch.library.custom_op("sparsify::linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    out_features: int,
    activation: str | None,
    variants: str = "",
) -> Tensor:
    """Return activation(x Wᵀ + bias), (..., out_features), for `x` (..., in) of any leading shape and strides.

    `tensors` are the weight as `kernel` prepared it; only a `Prepared` of the same kernel may supply them. `variants`
    are those of `Prepared`; a program saved before they existed runs with "".

    Raises:
        KernelError: no kernel has that name.
    """
    prepared = Prepared(kernel, (out_features, x.shape[-1]), tuple(tensors), variants)
    return product(kernel_named(kernel), prepared, x, bias, cast(Activation | None, activation))


def product(
    kernel: Kernel, prepared: Prepared, x: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    """Run `kernel` on `x` (..., in), on the current stream of x's device; returns (..., out)."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # Autocast reaches through an opaque operator into its products, and would run them in a dtype nobody measured.
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            y = _on_device(kernel, prepared, rows, bias, activation)
    else:
        y = _on_device(kernel, prepared, rows, bias, activation)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], prepared.shape[0])


def _on_device(
    kernel: Kernel, prepared: Prepared, rows: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    # Triton launches on the current device, whichever device holds the tensors.
    if rows.is_cuda and rows.device.index != torch.cuda.current_device():
        with torch.cuda.device(rows.device):
            return kernel.run(prepared, rows, bias, activation)
    return kernel.run(prepared, rows, bias, activation)


def opaque(x: Tensor, bias: Tensor | None) -> bool:
    """Say whether somebody looks on who must see the operator: autograd, a compiler, a transform or a mode.

    Plain inference needs none, and on a CPU the operator's 25 us would be more than many a layer gains.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._is_tracing():
        return True
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    # PyTorch has no public words for "inside vmap or grad" and "under a dispatch mode" (make_fx, FakeTensorMode).
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


@sparse_linear.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    out_features: int,
    activation: str | None,
    variants: str = "",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@sparse_linear.register_vmap
def _batched(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    out_features: int,
    activation: str | None,
    variants: str = "",
) -> tuple[Tensor, int]:
    """Run a batch of inputs as more rows; the weight and the bias are the same for all of them."""
    if in_dims[2] is not None or any(dim is not None for dim in in_dims[1]):
        raise KernelError(
            "vmap over the weight or bias of a sparse layer: one product has one weight; map over its input alone"
        )
    rows = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[0] is None:
        rows = x.expand(info.batch_size, *x.shape)
    return sparse_linear(rows, tensors, bias, kernel, out_features, activation, variants), 0


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, bias, ctx.kernel, ctx.out_features, ctx.activation, ctx.variants = inputs
    ctx.count, ctx.has_bias = len(tensors), bias is not None
    ctx.save_for_backward(x, *([] if bias is None else [bias]), *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for x and bias. W comes from the forward kernel on an identity, so every kernel is differentiable."""
    x, *rest = ctx.saved_tensors
    bias, tensors = (rest[0], rest[1:]) if ctx.has_bias else (None, rest)
    if ctx.activation is not None:
        before = sparse_linear(x, tensors, bias, ctx.kernel, ctx.out_features, None, ctx.variants)
        grad = _through_activation(grad, before, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        transposed = sparse_linear(identity, tensors, None, ctx.kernel, ctx.out_features, None, ctx.variants)
        grad_x = grad @ transposed.T  # transposed is (in, out)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(dim=0)
    found = (grad_x, [None] * ctx.count, grad_bias, None, None, None, None)
    return found[: len(ctx.needs_input_grad)]  # type: ignore[return-value]  # arguments left at their default are not given


def _through_activation(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return grad * (before > 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, before)  # type: ignore[no-any-return]
    share = torch.sigmoid(before)  # aten::silu_backward cannot be differentiated again
    return grad * share * (1 + before * (1 - share))


sparse_linear.register_autograd(_backward, setup_context=_remember)
