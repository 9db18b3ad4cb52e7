"""SparseLinear: a product with a packed weight as a torch module, through the operator of custom_op.py."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import FallbackWarning, KernelError
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.formats import format_for, packed_tensors, unpack
from sparsify_compiler.runtime.kernels import kernel_named, spec_for
from sparsify_compiler.runtime.layers.custom_op import opaque, product, sparse_linear

ACTIVATIONS = (None, "relu", "gelu", "silu")


@dataclass(frozen=True)
class Running:
    """The kernel a layer really uses, "" where it cannot run yet, and why it is not the one asked for ("" if it is)."""

    kernel: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kernel or 'nothing'} ({self.reason})" if self.reason else self.kernel


class SparseLinear(nn.Module):
    """y = activation(x Wᵀ + bias) with a packed W, in place of a Linear (or a Conv1D of transformers).

    The packed tensors are buffers, saved and loaded by their names in runtime/formats.py. What the kernel made of
    them is rebuilt after `load_state_dict` and after every move to a device or dtype, and is never saved. Where the
    kernel cannot run after a move the layer runs dense, with a FallbackWarning; `running` tells at any time. With
    `offload`, and on a GPU, the packed tensors stay in host memory, so that the GPU holds the weight once: they are
    saved and loaded as ever, and brought back for as long as a move or a load needs them. Under autocast the product
    runs in the weight's dtype, the one that was measured, and returns the autocast dtype.
    """

    values: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        kernel: str = "dense",
        tokens: tuple[int, ...] = (1,),
        variants: str = "",
        activation: Activation | None = None,
        run: int | None = None,
        offload: bool = False,
    ) -> None:
        """Hold `packed` and `bias` (out,); run them by the kernel named `kernel`, tuned for `tokens`.

        `variants` is what the tuner found (`Prepared.variants`), `run` what the weight was packed with.

        Raises:
            KernelError: no kernel has that name, it rejects this weight, the packed tensors are broken, the bias has
                another shape or dtype than the weight asks for, or the activation is unknown.
        """
        super().__init__()
        dtype = packed.tensors["values"].dtype
        if bias is not None and (bias.shape != packed.shape[:1] or bias.dtype != dtype):
            raise KernelError(
                f"SparseLinear of weight {packed.shape} {dtype} needs a bias ({packed.shape[0]},) of the same dtype; "
                f"found {tuple(bias.shape)} {bias.dtype}; convert it"
            )
        if activation not in ACTIVATIONS:
            raise KernelError(f"activation {activation!r}: choose None, 'relu', 'gelu' or 'silu'")
        self.out_features, self.in_features = packed.shape
        self.layout, self.pattern = packed.layout, packed.pattern
        self.kernel, self.tokens, self.variants = kernel, tokens, variants
        self.activation, self.run, self.offload = activation, run, offload
        self._home, self._offloaded = packed.tensors["values"].device, False
        for name in packed_tensors(packed.layout):
            self.register_buffer(name, packed.tensors[name])
        own = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", own)
        self._prepared: tuple[str, ...] = ()
        self._kernel: Kernel = Dense()
        self._held = Prepared("", packed.shape, ())
        self._running = Running("")
        if reason := self._prepare():
            raise KernelError(reason)
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
        """Pack `weight` (out, in), any floating dtype, where `keep` (out, in) bool. `spec` gives tokens and run.

        Raises:
            KernelError: as `Format.pack` and the constructor.
        """
        run = spec.run if spec else None
        packed = format_for(pattern).pack(weight.detach(), keep, pattern, run)
        return cls(packed, bias, kernel, spec.tokens if spec else (1,), run=run)

    @property
    def packed(self) -> Packed:
        """The packed weight: the module's own tensors, not copies, in host memory where they are offloaded."""
        tensors = {name: cast(Tensor, getattr(self, name)) for name in packed_tensors(self.layout)}
        return Packed(self.layout, self.pattern, (self.out_features, self.in_features), tensors)

    @property
    def weight(self) -> Tensor:
        """The dense (out, in) weight, unpacked at every call: for code that asks a layer for its weight's dtype."""
        return unpack(self.packed).to(self._home)

    @property
    def running(self) -> Running:
        """The kernel that really runs here, and why it is not `kernel` where it is another."""
        return self._running

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """What the running kernel made of the packed weight; empty without data."""
        return tuple(cast(Tensor, getattr(self, name)) for name in self._prepared)

    def prepare(self) -> None:
        """Rebuild the kernel's own tensors from the packed ones; dense ones, with a warning, where it cannot run.

        Raises:
            KernelError: no kernel is named `kernel`, or the packed tensors are broken.
        """
        if reason := self._prepare():
            # The same words for every layer of a model, so that Python shows them once.
            warnings.warn(f"{reason}; it runs dense until it is moved back", FallbackWarning, stacklevel=2)

    def _prepare(self) -> str:
        """Prepare `kernel`, or dense and return why; the meta device has no data and no reason."""
        self._forget()
        self._bring_back()
        self._home = self.values.device
        if self.values.is_meta:
            self._running = Running("", "no data yet (meta device); load a state dict with assign=True")
            return ""
        packed = self.packed
        spec = spec_for(packed, self.tokens, run=self.run)
        kernel, reason = kernel_named(self.kernel), ""
        prepared: Prepared | None = None
        if rejected := kernel.rejects(spec):
            reason = f"kernel {self.kernel!r} cannot run {spec.pattern} {spec.dtype} on {spec.device.type}: {rejected}"
        else:
            try:
                prepared = kernel.prepare(packed, spec)
            except KernelError as error:
                reason = f"kernel {self.kernel!r} cannot be prepared on {spec.device.type}: {error}"
        if prepared is None:
            kernel = Dense()
            prepared = kernel.prepare(packed, spec)
        self._prepared = tuple(f"prepared_{index}" for index in range(len(prepared.tensors)))
        for name, tensor in zip(self._prepared, prepared.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._held = Prepared(kernel.name, prepared.shape, prepared.tensors, self.variants)
        self._kernel, self._running = kernel, Running(kernel.name, reason)
        if self._may_offload():
            self._put_packed(torch.device("cpu"))
            self._offloaded = True
        return reason

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for `x` (..., in) of the weight's dtype.

        Raises:
            KernelError: the layer has no data yet, or `x` has another width, dtype or device.
        """
        # A module looks its tensors up at a cost of a microsecond each, so here they are read where they lie.
        values, bias = cast(Tensor, self._buffers["values"]), self._parameters["bias"]
        if not self._prepared or x.device != self._home:
            raise KernelError(self._unfit(x))
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast and x.is_floating_point():
            x = x.to(values.dtype)
        if x.shape[-1] != self.in_features or x.dtype != values.dtype:
            raise KernelError(self._unfit(x))
        if opaque(x, bias):
            kernel, variants = self._held.kernel, self._held.variants
            y = sparse_linear(x, list(self.prepared), bias, kernel, self.out_features, self.activation, variants)
        else:
            y = product(self._kernel, self._current(), x, bias, self.activation)
        return cast(Tensor, y.to(torch.get_autocast_dtype(x.device.type))) if autocast else y

    def _current(self) -> Prepared:
        """Return what was prepared, with the tensors that `torch.func.functional_call` puts in their place, if any."""
        held = self._held
        for name, tensor in zip(self._prepared, held.tensors, strict=True):
            if self._buffers[name] is not tensor:
                return replace(held, tensors=self.prepared)
        return held

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"pattern={self.pattern}, kernel={self.kernel}",
        ]
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        if self.running.reason:
            parts.append(f"running={self.running}")
        return ", ".join(parts)

    def _unfit(self, x: Tensor) -> str:
        if not self._prepared:
            return f"SparseLinear has {self.running.reason}"
        return (
            f"SparseLinear({self.in_features}, {self.out_features}) needs x of (..., {self.in_features}) "
            f"{self.values.dtype}; found {tuple(x.shape)} {x.dtype} on {x.device}, the weight on "
            f"{self._home}; convert x, or the module with .to()"
        )

    def _forget(self) -> None:
        for name in self._prepared:
            delattr(self, name)
        self._prepared = ()

    def _may_offload(self) -> bool:
        return self.offload and self._home.type == "cuda"

    def _bring_back(self) -> None:
        if self._offloaded and not self.values.is_meta:
            self._put_packed(self._home)
        self._offloaded = False

    def _put_packed(self, device: torch.device) -> None:
        for name in packed_tensors(self.layout):
            setattr(self, name, cast(Tensor, getattr(self, name)).to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        """Move the packed tensors, then prepare again: a kernel's own tensors may depend on device and dtype."""
        self._forget()
        self._bring_back()  # else a change of dtype alone would leave the layer in host memory
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.prepare()
        return self


def _prepare_again(module: nn.Module, keys: object) -> None:
    cast(SparseLinear, module).prepare()
