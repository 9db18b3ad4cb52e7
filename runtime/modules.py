"""Sparse layers as torch modules. Importing this file registers the operator `sparsify::linear`, as PyTorch requires.

One operator runs every kernel, so torch.compile, torch.export, autograd and CUDA graphs see a single opaque node:

    sparsify::linear(Tensor x, Tensor[] tensors, Tensor? bias, str kernel, int out_features, str? activation) -> Tensor
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.runtime.formats import format_for, packed_tensors, unpack
from sparsify_compiler.runtime.kernels import kernel_named, spec_for


@torch.library.custom_op("sparsify::linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    out_features: int,
    activation: str | None,
) -> Tensor:
    """Return activation(x Wᵀ + bias), (..., out_features), for `x` (..., in) of any leading shape and strides.

    `tensors` are the weight as `kernel` prepared it; only a `Prepared` of the same kernel may supply them.

    Raises:
        KernelError: no kernel has that name.
    """
    prepared = Prepared(kernel, (out_features, x.shape[-1]), tuple(tensors))
    return _product(prepared, x, bias, cast(Activation | None, activation))


def _product(prepared: Prepared, x: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    # Autocast reaches through an opaque operator into its products, and would run them in a dtype nobody measured.
    with torch.autocast(x.device.type, enabled=False):
        y = kernel_named(prepared.kernel).run(prepared, rows, bias, activation)
    return y.reshape(*x.shape[:-1], prepared.shape[0])


@sparse_linear.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    out_features: int,
    activation: str | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, bias, ctx.kernel, ctx.out_features, ctx.activation = inputs
    ctx.count, ctx.has_bias = len(tensors), bias is not None
    ctx.save_for_backward(x, *([] if bias is None else [bias]), *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for x and bias. W comes from the forward kernel on an identity, so every kernel is differentiable."""
    x, *rest = ctx.saved_tensors
    bias, tensors = (rest[0], rest[1:]) if ctx.has_bias else (None, rest)
    if ctx.activation is not None:
        grad = _through_activation(
            grad, sparse_linear(x, tensors, bias, ctx.kernel, ctx.out_features, None), ctx.activation
        )
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        transposed = sparse_linear(identity, tensors, None, ctx.kernel, ctx.out_features, None)  # (in, out)
        grad_x = grad @ transposed.T
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(dim=0)
    return grad_x, [None] * ctx.count, grad_bias, None, None, None  # type: ignore[return-value]


def _through_activation(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return grad * (before > 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, before)  # type: ignore[no-any-return]
    return torch.ops.aten.silu_backward(grad, before)  # type: ignore[no-any-return]


sparse_linear.register_autograd(_backward, setup_context=_remember)


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias with a packed W, in place of a Linear (or a Conv1D of transformers).

    The packed tensors are buffers, saved and loaded by their names in runtime/formats.py. What the kernel made of
    them is rebuilt after `load_state_dict` and after every move to a device or dtype, and is never saved. Under
    autocast the product runs in the weight's dtype, the one that was measured, and returns the autocast dtype.
    """

    values: Tensor

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, kernel: str = "dense", tokens: tuple[int, ...] = (1,)
    ) -> None:
        """Hold `packed` and `bias` (out,); run them by the kernel named `kernel`, tuned for `tokens`.

        Raises:
            KernelError: no kernel has that name, it rejects this weight, the packed tensors are broken, or the bias
                has another shape or dtype than the weight asks for.
        """
        super().__init__()
        dtype = packed.tensors["values"].dtype
        if bias is not None and (bias.shape != packed.shape[:1] or bias.dtype != dtype):
            raise KernelError(
                f"SparseLinear of weight {packed.shape} {dtype} needs a bias ({packed.shape[0]},) of the same dtype; "
                f"found {tuple(bias.shape)} {bias.dtype}; convert it"
            )
        self.out_features, self.in_features = packed.shape
        self.layout, self.pattern = packed.layout, packed.pattern
        self.kernel, self.tokens = kernel, tokens
        for name in packed_tensors(packed.layout):
            self.register_buffer(name, packed.tensors[name])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self._prepared: tuple[str, ...] = ()
        self._unusable: str | None = None
        self.prepare()
        if self._unusable is not None and not self.values.is_meta:
            raise KernelError(self._unusable)
        self.register_load_state_dict_post_hook(_prepare_again)  # type: ignore[no-untyped-call]

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        keep: Tensor,
        pattern: Pattern,
        bias: Tensor | None = None,
        kernel: str = "dense",
        spec: MatmulSpec | None = None,
    ) -> "SparseLinear":
        """Pack `weight` (out, in), any floating dtype, where `keep` (out, in) bool. `spec` gives the token counts.

        Raises:
            KernelError: as `Format.pack` and the constructor.
        """
        packed = format_for(pattern).pack(weight.detach(), keep, pattern)
        return cls(packed, bias, kernel, spec.tokens if spec else (1,))

    @property
    def packed(self) -> Packed:
        """The packed weight: the module's own tensors, not copies."""
        tensors = {name: cast(Tensor, getattr(self, name)) for name in packed_tensors(self.layout)}
        return Packed(self.layout, self.pattern, (self.out_features, self.in_features), tensors)

    @property
    def weight(self) -> Tensor:
        """The dense (out, in) weight, unpacked at every call: for code that asks a layer for its weight's dtype."""
        return unpack(self.packed)

    def prepare(self) -> None:
        """Rebuild the kernel's own tensors from the packed ones. If the kernel cannot run here, `forward` says so."""
        for name in self._prepared:
            delattr(self, name)
        self._prepared, self._unusable = (), None
        if self.values.is_meta:
            self._unusable = "SparseLinear has no data yet (meta device); load a state dict with assign=True"
            return
        packed = self.packed
        spec = spec_for(packed, self.tokens)
        kernel = kernel_named(self.kernel)
        if reason := kernel.rejects(spec):
            self._unusable = (
                f"kernel {self.kernel!r} cannot run {packed.shape} {spec.dtype} on {spec.device}: {reason}; "
                f"set .kernel to 'dense' and call .prepare(), or move the module back"
            )
            return
        tensors = kernel.prepare(packed, spec).tensors
        self._prepared = tuple(f"prepared_{index}" for index in range(len(tensors)))
        for name, tensor in zip(self._prepared, tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for `x` (..., in) of the weight's dtype.

        Raises:
            KernelError: the kernel cannot run on this device or dtype, or `x` has another width or dtype.
        """
        if self._unusable is not None:
            raise KernelError(self._unusable)
        device_type, dtype = x.device.type, self.values.dtype
        autocast = torch.is_autocast_enabled(device_type)
        if autocast and x.is_floating_point():
            x = x.to(dtype)
        if x.shape[-1] != self.in_features or x.dtype != dtype:
            raise KernelError(
                f"SparseLinear({self.in_features}, {self.out_features}) needs x of (..., {self.in_features}) {dtype}; "
                f"found {tuple(x.shape)} {x.dtype}; convert x, or the module with .to(dtype)"
            )
        tensors = [cast(Tensor, getattr(self, name)) for name in self._prepared]
        if type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Plain inference needs no operator, and on a CPU its 25 us would be more than many a layer gains.
            y = _product(
                Prepared(self.kernel, (self.out_features, self.in_features), tuple(tensors)), x, self.bias, None
            )
        else:
            y = sparse_linear(x, tensors, self.bias, self.kernel, self.out_features, None)
        return y.to(torch.get_autocast_dtype(device_type)) if autocast else y

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, kernel={self.kernel}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        """Move the packed tensors, then prepare again: a kernel's own tensors may depend on device and dtype."""
        for name in self._prepared:
            delattr(self, name)
        self._prepared = ()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.prepare()
        return self


def _prepare_again(module: nn.Module, keys: object) -> None:
    cast(SparseLinear, module).prepare()
