"""What operations do with the factors of their operands' axes: the operations that `torch_labels` may look through."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from sparsify_compiler.frontends.torch_axes import Factors, Size, size_of
from sparsify_compiler.frontends.torch_labels import Label, Labels, Rule
from sparsify_compiler.frontends.torch_uses import operation_name

POSITIONS = "its positions are neighbours to each other"


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
    return labels.pair([result, labels.of(_arg(node, 2, "bias"))], "linear")


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
    groups = _arg(node, 6, "groups", 1)
    if len(x) != len(weight):
        return None
    if groups == 1:
        labels.axes.match(x[1], weight[1], "convolution")
    else:
        group = labels.axes.new(groups)
        labels.axes.match(x[1], (*group, *weight[1]), "convolution")
        out = labels.axes.new(_whole(_lengths(node)[1]) // groups)
        labels.axes.match(weight[0], (*group, *out), "convolution")
    for factors in (*x[2:], *weight[2:]):
        labels.axes.fix(factors, POSITIONS)
    result = (x[0], weight[0], *_fresh(labels, node)[2:])
    _match_channels(labels, result[1], [_arg(node, 2, "bias")], "convolution")
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
    inside = labels.axes.new(_whole(_lengths(node)[1]) // groups)
    labels.axes.match(x[1], (*labels.axes.new(groups), *inside), "group_norm")
    labels.mixed.append((inside, x))
    _match_channels(labels, x[1], node.args[2:4], "group_norm")
    return x


def softmax(labels: Labels, node: fx.Node) -> Label:
    """Along one axis, the same for any order of it."""
    x = labels.of(node.args[0])
    labels.mixed.append((x[_int(node.args[1])], x))
    return x


def reduction(labels: Labels, node: fx.Node) -> Label | None:
    """A sum, mean or extreme over some axes: the same for any order of them."""
    x = labels.of(node.args[0])
    over: Any = _arg(node, 1, "dim")
    if isinstance(over, bool):
        return None
    axes = range(len(x)) if over is None or over == [] else [over] if isinstance(over, int) else over
    gone = {axis % len(x) for axis in axes} if x else set()
    if len(_lengths(node)) == len(x):
        return tuple(() if axis in gone else factors for axis, factors in enumerate(x))
    return tuple(factors for axis, factors in enumerate(x) if axis not in gone)


def windows(labels: Labels, node: fx.Node) -> Label | None:
    """Pooling or resizing of positions, channel by channel."""
    x = labels.of(node.args[0])
    result = _fresh(labels, node)
    if len(x) < 3 or len(result) != len(x):
        return None
    if not operation_name(node).startswith("upsample") and len(x) != 2 + int(operation_name(node)[-2]):
        return None  # without the axis of images, axis 1 is no channel
    for factors in x[2:]:
        labels.axes.fix(factors, POSITIONS)
    return (x[0], x[1], *result[2:])


def view(labels: Labels, node: fx.Node) -> Label:
    """The same entries in the same order under another shape."""
    factors = [factor for axis in labels.of(node.args[0]) for factor in axis]
    return labels.axes.regroup(factors, _lengths(node), operation_name(node))


def permute(labels: Labels, node: fx.Node) -> Label:
    """Axes in another order."""
    x = labels.of(node.args[0])
    order: Any = node.args[1]
    return tuple(x[axis] for axis in order)


def transpose(labels: Labels, node: fx.Node) -> Label:
    """Two axes exchanged; without arguments the two of a matrix."""
    x = list(labels.of(node.args[0]))
    one, other = (_int(node.args[1]), _int(node.args[2])) if len(node.args) > 2 else (0, len(x) - 1)
    x[one], x[other] = x[other], x[one]
    return tuple(x)


def expand(labels: Labels, node: fx.Node) -> Label:
    """Axes of length 1 repeated."""
    x, lengths = labels.of(node.args[0]), _lengths(node)
    x = ((),) * (len(lengths) - len(x)) + x
    return tuple(factors or labels.axes.new(length) for factors, length in zip(x, lengths, strict=True))


def repeat(labels: Labels, node: fx.Node) -> Label:
    """Axes repeated as a whole: the number of the copy counts slower than what is copied."""
    x = labels.of(node.args[0])
    counts: Any = node.args[1]
    x = ((),) * (len(counts) - len(x)) + x
    sizes = [size_of(count.meta["val"] if isinstance(count, fx.Node) else count) for count in counts]
    return tuple((*labels.axes.new(size), *factors) for factors, size in zip(x, sizes, strict=True))


def repeat_interleave(labels: Labels, node: fx.Node) -> Label | None:
    """Every entry along an axis repeated: the number of the copy counts faster than what is copied."""
    count, axis = _arg(node, 1, "repeats"), _arg(node, 2, "dim")
    if not isinstance(count, int) or not isinstance(axis, int):
        return None
    x = list(labels.of(node.args[0]))
    x[axis] = (*x[axis], *labels.axes.new(count))
    return tuple(x)


def split(labels: Labels, node: fx.Node) -> list[Label]:
    """Consecutive parts of an axis. Of equal length they are factors (part, place in it), and the places are shared."""
    x = labels.of(node.args[0])
    axis = int(_arg(node, 2, "dim", 0)) % len(x)
    reason = "it is split into parts"
    lengths = [size_of(value.shape[axis]) for value in node.meta["val"]]
    if len(set(lengths)) > 1:
        labels.axes.fix(x[axis], f"{reason} of several lengths")
        places = [labels.axes.new(length, reason) for length in lengths]
    else:
        place = labels.axes.new(lengths[0])
        labels.axes.match(x[axis], (*labels.axes.new(len(lengths), reason), *place), "split")
        places = [place] * len(lengths)
    return [(*x[:axis], place, *x[axis + 1 :]) for place in places]


def select(labels: Labels, node: fx.Node) -> Label:
    """One position of an axis."""
    x, axis = labels.of(node.args[0]), _int(node.args[1])
    axis %= len(x)
    labels.axes.fix(x[axis], "one position of it is selected")
    return (*x[:axis], *x[axis + 1 :])


def take(labels: Labels, node: fx.Node) -> Label:
    """A slice of one axis."""
    x, result = labels.of(node.args[0]), list(_fresh(labels, node))
    before, after = _lengths(node.args[0]), _lengths(node)
    for axis, factors in enumerate(x):
        if before[axis] == after[axis]:
            result[axis] = factors
        else:
            labels.axes.fix(factors, "a part of it is taken")
    return tuple(result)


def pad(labels: Labels, node: fx.Node) -> Label:
    """Entries added around, or cut off, from the last axis on."""
    x, result = labels.of(node.args[0]), list(_fresh(labels, node))
    amounts: Any = node.args[1]
    for axis, factors in enumerate(x):
        back = 2 * (len(x) - 1 - axis)
        if any(amount != 0 for amount in amounts[back : back + 2]):
            labels.axes.fix(factors, POSITIONS)
        else:
            result[axis] = factors
    return tuple(result)


def cat(labels: Labels, node: fx.Node) -> Label:
    """Tensors one after another along an axis; the others are matched."""
    operands = list(labels.tensors(node))
    axis = int(_arg(node, 1, "dim", 0)) % len(operands[0])
    for operand in operands:
        labels.axes.fix(operand[axis], "it is joined with others")
    joined = _fresh(labels, node)[axis]
    result = list(labels.pair([(*label[:axis], (), *label[axis + 1 :]) for label in operands], "cat"))
    result[axis] = joined
    return tuple(result)


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
        shared = labels.axes.new(_whole(_lengths(node.args[0])[1]) // _whole(_lengths(node.args[1])[1]))
        labels.axes.match(query[1], (*key[1], *shared), "attention")
        labels.axes.match(key[1], value[1], "attention")
        batch = (*labels.pair([query[:1], key[:1], value[:1]], "attention"), query[1])
    else:
        batch = labels.pair([query[:2], key[:2], value[:2]], "attention")
    labels.axes.match(query[3], key[3], "attention")
    labels.axes.match(key[2], value[2], "attention")
    for factors in (query[2], key[2]):
        labels.axes.fix(factors, POSITIONS)
    labels.pair([(*batch, query[2], key[2]), labels.of(_arg(node, 3, "attn_mask"))], "attention")
    return (*batch, query[2], value[3])


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("to", "to_copy", "contiguous", "clone", "alias", "detach", "dropout", "type_as", "hardswish", "hardsigmoid"),
        same,
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), lambda labels, node: _fresh(labels, node)),
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


def _fresh(labels: Labels, node: fx.Node) -> Label:
    result = labels.fresh(node, POSITIONS)
    assert not isinstance(result, list)
    return result


def _lengths(value: Any) -> list[Size]:
    """Return the lengths of the axes of the tensor that a node makes."""
    return [size_of(length) for length in value.meta["val"].shape]


def _whole(size: Size) -> int:
    """Return a length that tracing left no choice."""
    assert not size.free, f"channels and heads are counted by numbers, found {size}"
    return size.number


def _int(value: Any) -> int:
    assert isinstance(value, int)
    return value


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
