"""Find the products with a constant weight in a torch.fx graph, and say why some cannot be pruned."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify_compiler.graph import ConvLayout, Layout, MatmulLayout

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default: "Conv1d",
    aten.conv2d.default: "Conv2d",
    aten.conv3d.default: "Conv3d",
    aten.conv1d.padding: "Conv1d",
    aten.conv2d.padding: "Conv2d",
    aten.conv3d.padding: "Conv3d",
    F.conv1d: "Conv1d",
    F.conv2d: "Conv2d",
    F.conv3d: "Conv3d",
}
MATMULS = (aten.matmul.default, aten.mm.default, aten.bmm.default, torch.matmul, torch.mm, torch.bmm, operator.matmul)
TRANSPOSES = (aten.t.default, aten.numpy_T.default)
SAME = (aten.alias.default, aten.detach.default, aten.detach_.default, aten.clone.default, aten.contiguous.default)
REFUSED = {
    aten.conv_transpose1d.default: "transposed convolution: its weight is read across output positions",
    aten.conv_transpose2d.input: "transposed convolution: its weight is read across output positions",
    aten.conv_transpose3d.input: "transposed convolution: its weight is read across output positions",
    F.conv_transpose1d: "transposed convolution: its weight is read across output positions",
    F.conv_transpose2d: "transposed convolution: its weight is read across output positions",
    F.conv_transpose3d: "transposed convolution: its weight is read across output positions",
    aten.einsum.default: "einsum with a constant: write it as a matmul or linear",
    aten.bilinear.default: "bilinear layer: not a product of one input with one weight",
    aten.lstm.input: "recurrent cell: its weights are read once a time step inside one operation",
    aten.gru.input: "recurrent cell: its weights are read once a time step inside one operation",
    aten.rnn_tanh.input: "recurrent cell: its weights are read once a time step inside one operation",
}
KINDS = {
    aten.conv_transpose1d.default: "ConvTranspose1d",
    aten.conv_transpose2d.input: "ConvTranspose2d",
    aten.conv_transpose3d.input: "ConvTranspose3d",
    F.conv_transpose1d: "ConvTranspose1d",
    F.conv_transpose2d: "ConvTranspose2d",
    F.conv_transpose3d: "ConvTranspose3d",
    aten.einsum.default: "einsum",
    aten.bilinear.default: "Bilinear",
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN",
}


@dataclass(frozen=True)
class Product:
    """One node that multiplies `input_node` by the weight `parameter`. `input_node` is None for refused ones.

    `weight_node` is the node whose value the product reads as its weight, None inside a call_module node.
    """

    node: fx.Node
    kind: str
    parameter: str
    input_node: fx.Node | None
    layout: Layout | None
    refusal: str | None = None


def find_products(graph_module: fx.GraphModule, lookup: Callable[[str], Any]) -> Iterator[Product]:
    """Yield every product in execution order; `lookup` returns the tensor or module behind a dotted name."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            yield from _from_module(node, lookup(str(node.target)))
        elif node.op == "call_function":
            yield from _from_function(node, lookup)
        elif node.op == "call_method" and node.target in ("matmul", "mm", "bmm"):
            yield from _from_matmul(node, lookup)


def _from_module(node: fx.Node, module: Any) -> Iterator[Product]:
    name = f"{node.target}.weight"
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if isinstance(module, nn.Linear):
        yield Product(node, "Linear", name, source, MatmulLayout(transposed=False))
    elif type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
        yield Product(node, "Conv1D", name, source, MatmulLayout(transposed=True))
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.padding_mode != "zeros":
            yield Product(node, type(module).__name__, name, None, None, f"padding mode {module.padding_mode!r}")
            return
        layout = _conv_layout(module.weight, module.stride, module.padding, module.dilation, module.groups)
        yield Product(node, type(module).__name__, name, source, layout, _depthwise(module.weight, layout))
    elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        yield Product(node, type(module).__name__, name, None, None, REFUSED[F.conv_transpose2d])
    elif isinstance(module, nn.RNNBase):
        for key in (key for key, value in module.named_parameters() if value.dim() == 2):
            yield Product(node, type(module).__name__, f"{node.target}.{key}", None, None, REFUSED[aten.lstm.input])


def _from_function(node: fx.Node, lookup: Callable[[str], Any]) -> Iterator[Product]:
    target, args = node.target, node.args
    if target in (aten.linear.default, F.linear):
        yield from _with_weight(node, "Linear", _arg(node, 0, "input"), _arg(node, 1, "weight"), False, lookup)
    elif target in (aten.addmm.default, torch.addmm):
        yield from _with_weight(node, "Conv1D", args[1], args[2], True, lookup)
    elif target in MATMULS:
        yield from _from_matmul(node, lookup)
    elif target in CONVOLUTIONS:
        yield from _from_convolution(node, lookup)
    elif target in REFUSED:
        for source in node.all_input_nodes:
            name = _parameter(source)
            value = None if name is None else lookup(name)
            if isinstance(value, Tensor) and value.dim() >= 2:
                yield Product(node, KINDS.get(target, str(target)), str(name), None, None, REFUSED[target])


def _from_matmul(node: fx.Node, lookup: Callable[[str], Any]) -> Iterator[Product]:
    left, right = node.args[0], node.args[1]
    if isinstance(right, fx.Node) and _constant(right)[0] is not None:
        yield from _with_weight(node, "MatMul", left, right, True, lookup)
    elif isinstance(left, fx.Node) and _constant(left)[0] is not None:
        yield from _with_weight(node, "MatMul", right, left, False, lookup, input_axis=-2)


def _with_weight(
    node: fx.Node,
    kind: str,
    source: Any,
    weight: Any,
    transposed: bool,
    lookup: Callable[[str], Any],
    input_axis: int = -1,
) -> Iterator[Product]:
    """Yield the product of `source` with a constant matrix, seen through transposes."""
    if not isinstance(weight, fx.Node) or not isinstance(source, fx.Node):
        return
    name, flips = _constant(weight)
    if name is None:
        roots = _parameters_behind(weight)
        for root in roots:
            yield Product(node, kind, root, None, None, "the weight is computed from parameters before the product")
        return
    value = lookup(name)
    if not isinstance(value, nn.Parameter) and not _float_matrix(value):
        return
    if value.dim() != 2:
        yield Product(node, kind, name, None, None, f"the constant has {value.dim()} axes; a matrix is needed")
        return
    yield Product(node, kind, name, source, MatmulLayout(transposed != bool(flips % 2), input_axis))


def _from_convolution(node: fx.Node, lookup: Callable[[str], Any]) -> Iterator[Product]:
    kind = CONVOLUTIONS[node.target]
    source, weight = _arg(node, 0, "input"), _arg(node, 1, "weight")
    if not isinstance(weight, fx.Node) or not isinstance(source, fx.Node):
        return
    name, flips = _constant(weight)
    if name is None or flips:
        for root in _parameters_behind(weight):
            yield Product(node, kind, root, None, None, "the weight is computed from parameters before the product")
        return
    value = lookup(name)
    layout = _conv_layout(
        value,
        _arg(node, 3, "stride", 1),
        _arg(node, 4, "padding", 0),
        _arg(node, 5, "dilation", 1),
        _arg(node, 6, "groups", 1),
    )
    yield Product(node, kind, name, source, layout, _depthwise(value, layout))


def _conv_layout(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> ConvLayout:
    kernel = tuple(weight.shape[2:])
    strides, dilations = _each(stride, len(kernel)), _each(dilation, len(kernel))
    if padding == "valid":
        pads: tuple[tuple[int, int], ...] = ((0, 0),) * len(kernel)
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in _each(padding, len(kernel)))
    return ConvLayout(kernel, strides, pads, dilations, groups)


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * count if len(values) == 1 else values


def _depthwise(weight: Tensor, layout: ConvLayout) -> str | None:
    if layout.groups > 1 and weight.shape[1] == 1:
        return "depthwise convolution: each output reads one input channel, so there is nothing to choose between"
    return None


def _constant(node: fx.Node) -> tuple[str | None, int]:
    """Follow transposes back to a get_attr node: its name and how many transposes lie between, or (None, 0)."""
    flips = 0
    while node.op == "call_function" or (node.op == "call_method" and node.target == "t"):
        if node.target in TRANSPOSES or node.target == "t" or _swaps_two_axes(node):
            flips += 1
        elif node.target not in SAME:
            return None, 0
        first = node.args[0]
        if not isinstance(first, fx.Node):
            return None, 0
        node = first
    return _parameter(node), flips


def _swaps_two_axes(node: fx.Node) -> bool:
    rest = node.args[1:]
    if node.target in (aten.transpose.int, torch.transpose):
        return {abs(int(axis) + (2 if int(axis) < 0 else 0)) for axis in rest if isinstance(axis, int)} == {0, 1}
    return node.target is aten.permute.default and rest[0] in ([1, 0], [-1, -2])


def _parameter(node: fx.Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None


def _parameters_behind(node: fx.Node) -> list[str]:
    """Name the parameters a value is computed from, when it is computed from parameters alone."""
    names, stack, seen = [], [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return []
        if current.op == "get_attr":
            names.append(str(current.target))
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return names


def _float_matrix(value: Any) -> bool:
    """Say whether a buffer is large enough to be a weight rather than a constant of the arithmetic."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2 and min(value.shape) >= 16


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)
