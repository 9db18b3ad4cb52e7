"""SparseConv2d: a convolution with a packed weight, run as one sparse product a group."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, Packed
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.layers.conv_windows import ConvGeometry, is_channels_last
from sparsify_compiler.runtime.layers.modules import Running, SparseLinear


class SparseConv2d(nn.Module):
    """y = activation(conv2d(x, W) + bias) with a packed W, in place of a Conv2d.

    A 1x1 kernel is a product on the input itself, copied only where it is not channels-last; any other reads its
    windows in chunks of bounded size. Where the kernel is dense (asked for, or fallen back to after a move) the layer
    runs `torch.nn.functional.conv2d`, under autocast in autocast's dtype. What is said of SparseLinear of state and
    moves, and with a sparse kernel of autocast, holds here.
    """

    def __init__(
        self,
        packed: Sequence[Packed],
        geometry: ConvGeometry,
        bias: Tensor | None = None,
        kernel: str = "dense",
        tokens: tuple[int, ...] = (1,),
        variants: str = "",
        activation: Activation | None = None,
        offload: bool = False,
    ) -> None:
        """Hold one packed weight (out / groups, kernel height * width * channels / groups) a group, tap-major.

        `bias` is (out,); `tokens` are the output positions of the calls that the kernel was tuned for.

        Raises:
            KernelError: as SparseLinear, or weights that do not fit the geometry.
        """
        super().__init__()
        shapes = {part.shape for part in packed}
        if len(packed) != geometry.groups or len(shapes) != 1 or packed[0].shape[1] != geometry.columns:
            found = ", ".join(map(str, sorted(shapes)))
            raise KernelError(
                f"SparseConv2d of {geometry.groups} groups and kernel {geometry.kernel} needs as many weights of "
                f"(out, {geometry.columns}); found {len(packed)} of {found}"
            )
        self.geometry = geometry
        pieces = [None] * geometry.groups if bias is None else list(bias.chunk(geometry.groups))
        self.products = nn.ModuleList(
            SparseLinear(part, piece, kernel, tokens, variants, activation, geometry.run, offload)
            for part, piece in zip(packed, pieces, strict=True)
        )

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        keep: Tensor,
        pattern: Pattern,
        geometry: ConvGeometry,
        bias: Tensor | None = None,
        kernel: str = "dense",
        tokens: tuple[int, ...] = (1,),
        variants: str = "",
    ) -> "SparseConv2d":
        """Pack a Conv2d's own `weight` (out, channels / groups, height, width) where `keep` (groups, out, in) bool.

        Raises:
            KernelError: as `Format.pack` and the constructor.
        """
        rows = weight.detach().permute(0, 2, 3, 1).reshape(geometry.groups, -1, geometry.columns)
        form = format_for(pattern)
        packed = [form.pack(w, k, pattern, geometry.run) for w, k in zip(rows, keep, strict=True)]
        return cls(packed, geometry, bias, kernel, tokens, variants)

    @property
    def parts(self) -> tuple[SparseLinear, ...]:
        """The products, one a group."""
        return tuple(cast(SparseLinear, part) for part in self.products)

    @property
    def weight(self) -> Tensor:
        """The dense (out, channels / groups, height, width) weight, unpacked at every call."""
        return self._native([part.weight for part in self.parts])

    @property
    def running(self) -> Running:
        """The kernel that really runs here, and why it is not the one asked for where it is another."""
        return self.parts[0].running

    def forward(self, x: Tensor) -> Tensor:
        """Return (images, out, height, width) for `x` (images, channels, height, width), both without images too.

        Raises:
            KernelError: the layer has no data yet, `x` has other channels or another dtype or device, or is too small.
        """
        if x.dim() == 3:
            return cast(Tensor, self(x.unsqueeze(0)).squeeze(0))
        self._check(x)
        geometry = self.geometry
        high, wide = geometry.out_size(x.shape[2], x.shape[3])
        if self.running.kernel == "dense":
            y = self._dense(x)
        else:
            chunks = [torch.cat(groups, dim=1) if len(groups) > 1 else groups[0] for groups in self._products(x)]
            rows = torch.cat(chunks) if len(chunks) > 1 else chunks[0]  # (images * positions, out)
            y = rows.reshape(x.shape[0], high, wide, rows.shape[1]).permute(0, 3, 1, 2)
        # Channels-last input gives channels-last output. Any other is what code that calls .view() on it expects.
        return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y.contiguous()

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        return str(self.geometry)

    def _check(self, x: Tensor) -> None:
        values, channels = self.parts[0].values, self.geometry.channels
        if not self.running.kernel:
            raise KernelError(f"SparseConv2d has {self.running.reason}")
        fits = x.dim() == 4 and x.shape[1] == channels and x.device == values.device
        if not fits or (
            x.dtype != values.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type))
        ):
            raise KernelError(
                f"SparseConv2d needs x of (images, {channels}, height, width) {values.dtype} on {values.device}; found "
                f"{tuple(x.shape)} {x.dtype} on {x.device}; convert x, or the module with .to()"
            )

    def _products(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        return [
            tuple(cast(Tensor, part(rows)) for part, rows in zip(self.products, groups, strict=True))
            for groups in self.geometry.rows(x)
        ]

    def _dense(self, x: Tensor) -> Tensor:
        geometry, parts = self.geometry, self.parts
        weight = self._native([part.prepared[0] for part in parts])
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        padded = geometry.pad(x)
        y = functional.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)
        return activate(y, parts[0].activation)

    def _native(self, rows: list[Tensor]) -> Tensor:
        """Bring weights of (out / groups, columns) into (out, channels / groups, height, width); a view of one."""
        weight = rows[0] if len(rows) == 1 else torch.cat(rows)
        return weight.reshape(weight.shape[0], *self.geometry.kernel, self.geometry.run).permute(0, 3, 1, 2)
