"""How a 2-d convolution becomes a product: the windows of its input as rows, tap-major like its weight.

Column `tap * channels + channel` of a row, as in frontends/layout.py; on channels-last input a tap's channels lie
together already, so rows are read in whole runs of them, and a 1x1 kernel needs no copy at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_compiler.errors import KernelError

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

CPU_CHUNK, CUDA_CHUNK = 1 << 20, 1 << 26
"""The most entries of rows at a time: on a CPU they then stay in its caches, on a GPU launches stay few."""


@dataclass(frozen=True)
class ConvGeometry:
    """All that a 2-d convolution is but its weight; `padding` is ((top, bottom), (left, right)).

    Raises:
        KernelError: groups that do not divide the channels, or a depthwise convolution.
    """

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.channels % self.groups:
            raise KernelError(f"convolution of {self.channels} channels: {self.groups} groups do not divide them")
        if self.groups > 1 and self.channels == self.groups:
            raise KernelError(
                f"depthwise convolution of {self.channels} channels: each output reads one channel, so there is no "
                f"product to make sparse; keep it dense"
            )

    @property
    def run(self) -> int:
        """The input channels of one group at one tap: groups of N:M start again after so many columns."""
        return self.channels // self.groups

    @property
    def columns(self) -> int:
        """The columns of a group's weight, and of a row."""
        return self.kernel[0] * self.kernel[1] * self.run

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the output.

        Raises:
            KernelError: the kernel does not fit into the padded input.
        """
        found = []
        for axis, size in enumerate((height, width)):
            room = size + sum(self.padding[axis]) - self.dilation[axis] * (self.kernel[axis] - 1) - 1
            found.append(room // self.stride[axis] + 1)
        if min(found) < 1:
            raise KernelError(f"convolution of kernel {self.kernel}: input of {height}x{width} is too small for it")
        return found[0], found[1]

    def pad(self, x: Tensor) -> Tensor:
        """Return `x` (images, channels, height, width) with its borders; `x` itself where there are none."""
        sides = (*self.padding[1], *self.padding[0])
        if not any(sides):
            return x
        return functional.pad(x, sides, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def rows(self, x: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the windows of `x` (images, channels, height, width), one (rows, columns) tensor a group, by chunks.

        Rows are output positions in the order image, height, width; all chunks together are all of them.
        """
        padded = self.pad(x)
        if self.kernel == (1, 1):  # views where x is channels-last
            points = padded[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
            yield tuple(part.reshape(-1, self.run) for part in points.chunk(self.groups, dim=3))
            return
        last = padded.permute(0, 2, 3, 1).contiguous()  # (images, height, width, channels)
        windows = last
        for axis in (0, 1):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            windows = windows.unfold(1 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        taps = windows.permute(
            0, 1, 2, 4, 5, 3
        )  # (images, out height, out width, kernel height, kernel width, channels)
        for chunk in self._chunks(taps):
            yield tuple(part.reshape(-1, self.columns) for part in chunk.chunk(self.groups, dim=5))

    def _chunks(self, taps: Tensor) -> Iterator[Tensor]:
        """Cut windows by images, and images of more than a chunk by lines. Whole in programs, whose sizes may vary."""
        most = CUDA_CHUNK if taps.is_cuda else CPU_CHUNK
        if torch.compiler.is_compiling() or taps.numel() <= most:
            yield taps
            return
        image = taps[0].numel()
        for images in torch.split(taps, max(most // image, 1)):
            yield from torch.split(images, max(most * taps.shape[1] // image, 1), dim=1) if image > most else (images,)


def is_channels_last(x: Tensor) -> bool:
    """Say whether the channels of `x` (images, channels, height, width) lie side by side, and it is not contiguous too.

    By its strides, for vmap cannot be asked about a memory format.
    """
    _, channels, _, wide = x.shape
    return x.stride(1) == 1 and x.stride(3) == channels and x.stride(2) == wide * channels and not x.is_contiguous()


def geometry_of(conv: nn.Conv2d) -> ConvGeometry:
    """Read the geometry of a PyTorch convolution, string padding included.

    Raises:
        KernelError: as `ConvGeometry`.
    """
    kernel, stride, dilation = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation)
    if conv.padding == "valid":
        padding = ((0, 0), (0, 0))
    elif conv.padding == "same":
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
        padding = ((totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2))
    else:
        high, wide = _pair(conv.padding)
        padding = ((int(high), int(high)), (int(wide), int(wide)))
    mode: PaddingMode = conv.padding_mode
    return ConvGeometry(conv.in_channels, kernel, stride, padding, dilation, conv.groups, mode)


def _pair(value: object) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple) else (value, value)
    return int(first), int(second)
