"""The only place that knows how a layer's own weight and input map to the pruning problem's (out, in) and rows.

A convolution is one problem per group with tap-major columns: column `tap * channels + channel`, so that neighbouring
columns are input channels at one kernel tap, the axis sparse tensor cores reduce over.
"""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify_compiler.batches import Padding
from sparsify_compiler.graph import ConvLayout, Layout, MatmulLayout

CHUNK_ELEMENTS = 1 << 22
"""Largest number of float32 entries unfolded at a time (16 MiB)."""

LEAST_ROWS = 4096
"""Rows that a matmul, of which nothing is unfolded, gives at a time at least."""


def problem_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, int, int, int]:
    """Return (groups, out, in, run) of the pruning problem for a weight of the layer's own `shape`."""
    if isinstance(layout, MatmulLayout):
        out, in_ = reversed(shape) if layout.transposed else shape
        return 1, out, in_, in_
    channels, taps = shape[1], _taps(layout)
    return layout.groups, shape[0] // layout.groups, taps * channels, channels


def to_problem(weight: Tensor, layout: Layout) -> Tensor:
    """Bring a layer's own weight into (groups, out, in); a view where the layout allows it.

    Matmul: (out, in), or (in, out) where `layout.transposed`. Convolution: (out channels, in channels / groups,
    *kernel) becomes (groups, out / groups, taps * in / groups).
    """
    groups, out, in_, _ = problem_shape(tuple(weight.shape), layout)
    if isinstance(layout, MatmulLayout):
        return (weight.t() if layout.transposed else weight).reshape(1, out, in_)
    return weight.movedim(1, -1).reshape(groups, out, in_)


def from_problem(problem: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """Undo `to_problem`: from (groups, out, in) to the layer's own contiguous `shape`."""
    if isinstance(layout, MatmulLayout):
        weight = problem[0].t() if layout.transposed else problem[0]
        return weight.reshape(shape).contiguous()
    return problem.reshape(shape[0], *layout.kernel, shape[1]).movedim(-1, 1).contiguous()


def row_chunks(x: Tensor, layout: Layout, padding: Padding | None = None) -> Iterator[Tensor]:
    """Yield the rows of X that a layer with input `x` multiplies, as (groups, tokens, in) chunks of bounded size.

    Matmul: every axis but `layout.input_axis` is a token axis. Convolution: `x` is (batch, channels, *spatial), or
    (channels, *spatial); tokens are output positions. Rows of a matmul that `padding` hides are left out.
    """
    if isinstance(layout, MatmulLayout):
        rows = x.movedim(layout.input_axis, -1)
        rows = rows if padding is None else padding.drop(rows)
        rows = rows.reshape(-1, rows.shape[-1])
        step = max(CHUNK_ELEMENTS // max(rows.shape[1], 1), LEAST_ROWS)
        for start in range(0, rows.shape[0], step):
            yield rows[start : start + step].unsqueeze(0)
        return
    if x.dim() == len(layout.kernel) + 1:
        x = x.unsqueeze(0)
    per_image = x[0].numel() * _taps(layout)
    step = max(CHUNK_ELEMENTS // max(per_image, 1), 1)
    for start in range(0, x.shape[0], step):
        yield _unfold(x[start : start + step], layout)


def output_rows(y: Tensor, layout: Layout, padding: Padding | None = None) -> Tensor:
    """Return what a layer makes of the rows of `row_chunks`, in order, for the output `y`: (groups, tokens, out)."""
    if isinstance(layout, MatmulLayout):
        none = y.new_empty(1, 0, y.shape[layout.input_axis])
        return torch.cat([none, *row_chunks(y, layout, padding)], dim=1)
    if y.dim() == len(layout.kernel) + 1:
        y = y.unsqueeze(0)
    split = y.reshape(y.shape[0], layout.groups, y.shape[1] // layout.groups, -1)  # (images, groups, out, positions)
    return split.permute(1, 0, 3, 2).reshape(layout.groups, -1, split.shape[2])


def _unfold(x: Tensor, layout: ConvLayout) -> Tensor:
    """Return (groups, images * positions, taps * channels / groups) for x (images, channels, *spatial)."""
    flat_padding = [side for pair in reversed(layout.padding) for side in pair]
    if any(flat_padding):
        x = F.pad(x, flat_padding)
    images, channels = x.shape[:2]
    positions = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            x.shape[2:], layout.kernel, layout.stride, layout.dilation, strict=True
        )
    ]
    per_group = channels // layout.groups
    total = images
    for count in positions:
        total *= count
    rows = x.new_empty(layout.groups, total, _taps(layout), per_group)
    for index, tap in enumerate(product(*(range(size) for size in layout.kernel))):
        window = x
        for axis, (offset, count) in enumerate(zip(tap, positions, strict=True)):
            start, stride = offset * layout.dilation[axis], layout.stride[axis]
            window = window.narrow(axis + 2, start, stride * (count - 1) + 1)
            window = window[(slice(None),) * (axis + 2) + (slice(None, None, stride),)]
        window = window.reshape(images, layout.groups, per_group, -1)
        rows[:, :, index] = window.permute(1, 0, 3, 2).reshape(layout.groups, total, per_group)
    return rows.reshape(layout.groups, total, -1)


def _taps(layout: ConvLayout) -> int:
    taps = 1
    for size in layout.kernel:
        taps *= size
    return taps
