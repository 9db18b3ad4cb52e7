"""What operations do with the factors of their operands' axes: the operations that `torch_labels` may look through."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from sparsify_compiler.frontends.torch_axes import Factors
from sparsify_compiler.frontends.torch_label_shapes import (
    cat,
    expand,
    pad,
    permute,
    repeat,
    repeat_interleave,
    select,
    split,
    take,
    transpose,
    view,
)
from sparsify_compiler.frontends.torch_labels import (
    POSITIONS,
    Label,
    Labels,
    Rule,
    argument,
    fresh,
    integer,
    lengths_of,
    whole,
)
from sparsify_compiler.frontends.torch_uses import operation_name


def pointwise(labels: Labels, node: fx.Node) -> Label:
    """Entry by entry: operands broadcast against each other."""
    return labels.pair(list(labels.tensors(node)), operation_name(node))


def same(labels: Labels, node: fx.Node) -> Label:
    """The first operand, entry by entry; others only lend a dtype or a shape."""
    return labels.of(node.args[0])


def linear(labels: Labels, node: fx.Node) -> Label:
    """(..., in) by (out, in): (..., out)."""
    x, weight = labels.of(node.args[0]), labels.of(node.args[1])
    labels.axes.match(x[-1], weight[-1], "linear")
    result = (*x[:-1], *weight[:-1])
    return labels.pair([result, labels.of(argument(node, 2, "bias"))], "linear")


def addmm(labels: Labels, node: fx.Node) -> Label:
    """(out,) or (tokens, out), plus (tokens, in) by (in, out)."""
    x, weight = labels.of(node.args[1]), labels.of(node.args[2])
    labels.axes.match(x[1], weight[0], "addmm")
    return labels.pair([(x[0], weight[1]), labels.of(node.args[0])], "addmm")


def matmul(labels: Labels, node: fx.Node) -> Label | None:
    """(..., m, k) by (..., k, n): (..., m, n)."""
    left, right = labels.of(node.args[0]), labels.of(node.args[1])
    if len(left) < 2 or len(right) < 2:
        return None
    labels.axes.match(left[-1], right[-2], "matmul")
    return (*labels.pair([left[:-2], right[:-2]], "matmul"), left[-2], right[-1])


def convolution(labels: Labels, node: fx.Node) -> Label | None:
    """(images, in, *positions) by (out, in / groups, *kernel): each group of channels by itself."""
    x, weight = labels.of(node.args[0]), labels.of(node.args[1])
    groups = argument(node, 6, "groups", 1)
    if len(x) != len(weight):
        return None
    if groups == 1:
        labels.axes.match(x[1], weight[1], "convolution")
    else:
        group = labels.axes.new(groups)
        labels.axes.match(x[1], (*group, *weight[1]), "convolution")
        out = labels.axes.new(whole(lengths_of(node)[1]) // groups)
        labels.axes.match(weight[0], (*group, *out), "convolution")
    for factors in (*x[2:], *weight[2:]):
        labels.axes.fix(factors, POSITIONS)
    result = (x[0], weight[0], *fresh(labels, node)[2:])
    _match_channels(labels, result[1], [argument(node, 2, "bias")], "convolution")
    return result


def batch_norm(labels: Labels, node: fx.Node) -> Label:
    """Every channel, axis 1, by statistics and parameters of its own."""
    x = labels.of(node.args[0])
    _match_channels(labels, x[1], node.args[1:5], "batch_norm")
    return x


def layer_norm(labels: Labels, node: fx.Node) -> Label:
    """Over the last axes together; scale and shift entry by entry. Also rms_norm."""
    x = labels.of(node.args[0])
    shape: Any = node.args[1]
    over = x[-len(shape) :]
    labels.mixed.append((tuple(factor for axis in over for factor in axis), x))
    parameters = [labels.of(value) for value in node.args[2:4] if isinstance(value, fx.Node)]
    labels.pair([over, *parameters], operation_name(node))
    return x


def group_norm(labels: Labels, node: fx.Node) -> Label:
    """Over positions and the channels of one group; scale and shift channel by channel."""
    x = labels.of(node.args[0])
    groups: Any = node.args[1]
    inside = labels.axes.new(whole(lengths_of(node)[1]) // groups)
    labels.axes.match(x[1], (*labels.axes.new(groups), *inside), "group_norm")
    labels.mixed.append((inside, x))
    _match_channels(labels, x[1], node.args[2:4], "group_norm")
    return x


def softmax(labels: Labels, node: fx.Node) -> Label:
    """Along one axis, the same for any order of it."""
    x = labels.of(node.args[0])
    labels.mixed.append((x[integer(node.args[1])], x))
    return x


def reduction(labels: Labels, node: fx.Node) -> Label | None:
    """A sum, mean or extreme over some axes: the same for any order of them."""
    x = labels.of(node.args[0])
    over: Any = argument(node, 1, "dim")
    if isinstance(over, bool):
        return None
    axes = range(len(x)) if over is None or over == [] else [over] if isinstance(over, int) else over
    gone = {axis % len(x) for axis in axes} if x else set()
    if len(lengths_of(node)) == len(x):
        return tuple(() if axis in gone else factors for axis, factors in enumerate(x))
    return tuple(factors for axis, factors in enumerate(x) if axis not in gone)


def windows(labels: Labels, node: fx.Node) -> Label | None:
    """Pooling or resizing of positions, channel by channel."""
    x = labels.of(node.args[0])
    result = fresh(labels, node)
    if len(x) < 3 or len(result) != len(x):
        return None
    if not operation_name(node).startswith("upsample") and len(x) != 2 + int(operation_name(node)[-2]):
        return None  # without the axis of images, axis 1 is no channel
    for factors in x[2:]:
        labels.axes.fix(factors, POSITIONS)
    return (x[0], x[1], *result[2:])


def embedding(labels: Labels, node: fx.Node) -> Label:
    """Rows of a table (rows, channels) looked up."""
    table, index = labels.of(node.args[0]), labels.of(node.args[1])
    labels.axes.fix(table[0], "rows are looked up by their number")
    return (*index, table[1])


def attention(labels: Labels, node: fx.Node) -> Label | None:
    """Softmax(Q Kᵀ) V over (images, heads, positions, channels); heads of K and V may serve several of Q."""
    query, key, value = (labels.of(operand) for operand in node.args[:3])
    if not len(query) == len(key) == len(value) == 4:
        return None
    if node.kwargs.get("enable_gqa"):
        shared = labels.axes.new(whole(lengths_of(node.args[0])[1]) // whole(lengths_of(node.args[1])[1]))
        labels.axes.match(query[1], (*key[1], *shared), "attention")
        labels.axes.match(key[1], value[1], "attention")
        batch = (*labels.pair([query[:1], key[:1], value[:1]], "attention"), query[1])
    else:
        batch = labels.pair([query[:2], key[:2], value[:2]], "attention")
    labels.axes.match(query[3], key[3], "attention")
    labels.axes.match(key[2], value[2], "attention")
    for factors in (query[2], key[2]):
        labels.axes.fix(factors, POSITIONS)
    labels.pair([(*batch, query[2], key[2]), labels.of(argument(node, 3, "attn_mask"))], "attention")
    return (*batch, query[2], value[3])


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("to", "to_copy", "contiguous", "clone", "alias", "detach", "dropout", "type_as", "hardswish", "hardsigmoid"),
        same,
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), lambda labels, node: fresh(labels, node)),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "unsafe_view"), view),
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), reduction),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"), windows),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "upsample_nearest2d"), windows),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    **dict.fromkeys(("t", "transpose", "numpy_T"), transpose),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "slice": take,
    "linear": linear,
    "addmm": addmm,
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "permute": permute,
    "expand": expand,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "select": select,
    "cat": cat,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
}
"""Operations by their bare names; all others that torch tags pointwise follow `pointwise`."""


def _match_channels(labels: Labels, channels: Factors, values: Any, where: str) -> None:
    """Match the only axis of each tensor among `values` with `channels`."""
    for value in values:
        if isinstance(value, fx.Node):
            labels.axes.match(labels.of(value)[0], channels, where)
