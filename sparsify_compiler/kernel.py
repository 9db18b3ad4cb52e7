"""The kernel seam: what a sparse product looks like, what a kernel promises, what a packed weight holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparsify_compiler.pattern import Pattern

Activation = Literal["relu", "gelu", "silu"]


@dataclass(frozen=True)
class MatmulSpec:
    """y = x Wᵀ with a sparse W: all that decides whether a kernel may run.

    `out` and `in_` are the weight's sides, `density` the share kept, `tokens` the row counts of x that the user
    cares for, `capability` the CUDA compute capability (None on a CPU). `run` is the pattern's: groups of N:M start
    again after that many columns (the input channels at one tap of a convolution); None: they run over the whole row.
    """

    out: int
    in_: int
    dtype: torch.dtype
    pattern: Pattern
    density: float
    tokens: tuple[int, ...]
    device: torch.device
    capability: tuple[int, int] | None = None
    run: int | None = None


@dataclass(frozen=True)
class Packed:
    """A sparse weight in its standard layout: named dense tensors, as artefacts and ONNX files hold them.

    `layout` is "nm", "bitmap" or "block" (runtime/formats.py says what each tensor means); `shape` is (out, in).
    """

    layout: str
    pattern: Pattern
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class Prepared:
    """A weight in a kernel's own order, on the device. Only the kernel named by `kernel` may read `tensors`.

    `variants` says which of the kernel's variants the tuner found best, as runtime/variants.py writes it; "" leaves
    the choice to the kernel. It changes the speed of `run`, never what `tensors` hold.
    """

    kernel: str
    shape: tuple[int, int]
    tensors: tuple[Tensor, ...]
    variants: str = ""


class Format(Protocol):
    """One standard layout. `unpack(pack(weight, keep))` equals `weight * keep` exactly."""

    @property
    def layout(self) -> str:
        """The word in `Packed.layout`."""
        ...

    def pack(self, weight: Tensor, keep: Tensor, pattern: Pattern, run: int | None = None) -> Packed:
        """Pack `weight` (out, in), any floating dtype, where `keep` (out, in) bool is True. `run` as in patterns."""
        ...

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (out, in) weight."""
        ...


class Kernel(Protocol):
    """One way to compute y = activation(x Wᵀ + bias)."""

    @property
    def name(self) -> str:
        """The word in reports and `Prepared.kernel`."""
        ...

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Return None, or the reason in words why this kernel cannot run `spec`."""
        ...

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the variants worth timing for `tokens` rows, the kernel's own choice first; ("",) where there is one.

        A name is made of letters, digits, dots and dashes. Any variant gives a right result for any token count.
        """
        ...

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Bring a packed weight into the kernel's own order on `spec.device`. Once, at load."""
        ...

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in), on the current stream, capturable in a CUDA graph."""
        ...
