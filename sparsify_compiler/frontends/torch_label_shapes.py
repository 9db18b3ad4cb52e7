"""What operations that only move entries do with the factors of axes: views, transposes, slices, copies."""

from typing import Any

from torch import fx

from sparsify_compiler.frontends.torch_axes import size_of
from sparsify_compiler.frontends.torch_labels import POSITIONS, Label, Labels, argument, fresh, integer, lengths_of
from sparsify_compiler.frontends.torch_uses import operation_name


def view(labels: Labels, node: fx.Node) -> Label:
    """The same entries in the same order under another shape."""
    factors = [factor for axis in labels.of(node.args[0]) for factor in axis]
    return labels.axes.regroup(factors, lengths_of(node), operation_name(node))


def permute(labels: Labels, node: fx.Node) -> Label:
    """Axes in another order."""
    x = labels.of(node.args[0])
    order: Any = node.args[1]
    return tuple(x[axis] for axis in order)


def transpose(labels: Labels, node: fx.Node) -> Label:
    """Two axes exchanged; without arguments the two of a matrix."""
    x = list(labels.of(node.args[0]))
    one, other = (integer(node.args[1]), integer(node.args[2])) if len(node.args) > 2 else (0, len(x) - 1)
    x[one], x[other] = x[other], x[one]
    return tuple(x)


def expand(labels: Labels, node: fx.Node) -> Label:
    """Axes of length 1 repeated."""
    x, lengths = labels.of(node.args[0]), lengths_of(node)
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
    count, axis = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(count, int) or not isinstance(axis, int):
        return None
    x = list(labels.of(node.args[0]))
    x[axis] = (*x[axis], *labels.axes.new(count))
    return tuple(x)


def split(labels: Labels, node: fx.Node) -> list[Label]:
    """Consecutive parts of an axis. Of equal length they are factors (part, place in it), and the places are shared."""
    x = labels.of(node.args[0])
    axis = int(argument(node, 2, "dim", 0)) % len(x)
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
    x, axis = labels.of(node.args[0]), integer(node.args[1])
    axis %= len(x)
    labels.axes.fix(x[axis], "one position of it is selected")
    return (*x[:axis], *x[axis + 1 :])


def take(labels: Labels, node: fx.Node) -> Label:
    """A slice of one axis."""
    reason = "a part of it is taken"
    x, result = labels.of(node.args[0]), list(fresh(labels, node, reason))
    before, after = lengths_of(node.args[0]), lengths_of(node)
    for axis, factors in enumerate(x):
        if before[axis] == after[axis]:
            result[axis] = factors
        else:
            labels.axes.fix(factors, reason)
    return tuple(result)


def pad(labels: Labels, node: fx.Node) -> Label:
    """Entries added around, or cut off, from the last axis on."""
    x, result = labels.of(node.args[0]), list(fresh(labels, node))
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
    axis = int(argument(node, 1, "dim", 0)) % len(operands[0])
    reason = "it is joined with others"
    for operand in operands:
        labels.axes.fix(operand[axis], reason)
    joined = fresh(labels, node, reason)[axis]
    result = list(labels.pair([(*label[:axis], (), *label[axis + 1 :]) for label in operands], "cat"))
    result[axis] = joined
    return tuple(result)
