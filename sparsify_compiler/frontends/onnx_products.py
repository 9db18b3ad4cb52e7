"""What an ONNX operator multiplies by: where its weight stands, how it is laid out, or why it cannot be pruned."""

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir

from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends.onnx_constants import STANDARD_DOMAINS, Constants
from sparsify_compiler.graph import ConvLayout, Layout, MatmulLayout

QUANTISED = "quantised operator: its integer weight is not pruned; start from the float model"
RECURRENT = "recurrent weight: it is multiplied once a time step inside the operator"
EINSUM = "Einsum with a constant: its axes are an equation, not a plain product"
EMBEDDING = "embedding: rows are looked up, not multiplied"

REFUSED_OPERATORS = {
    "ConvTranspose": ((1,), "transposed convolution"),
    "DeformConv": ((1,), "deformable convolution: the places it reads move at run time"),
    "ConvInteger": ((1,), QUANTISED),
    "MatMulInteger": ((0, 1), QUANTISED),
    "QLinearConv": ((3,), QUANTISED),
    "QLinearMatMul": ((0, 3), QUANTISED),
    "LSTM": ((1, 2), RECURRENT),
    "GRU": ((1, 2), RECURRENT),
    "RNN": ((1, 2), RECURRENT),
}
"""Operator -> (inputs that may hold a weight, reason)."""

_PRUNABLE_DTYPES = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
    onnx_ir.DataType.DOUBLE,
)


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a constant: `index` is the weight's input, `data` the value it is multiplied with.

    `same_padding`: auto_pad of a strided convolution, whose padding depends on the input's size; the layout then has
    none, and the input is padded before its rows are taken. `refusal` says why the weight cannot be pruned.
    """

    node: onnx_ir.Node
    index: int
    layout: Layout | None = None
    data: onnx_ir.Value | None = None
    same_padding: str | None = None
    refusal: str | None = None

    @property
    def weight(self) -> onnx_ir.Value:
        """The value that reaches the product."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


def find_products(node: onnx_ir.Node, constants: Constants, functions: Collection[object]) -> list[Product]:
    """List the weights that `node` multiplies by; none where it multiplies activations or does something else.

    `functions` are the identifiers of the model's own functions, whose nodes are looked at elsewhere.
    """
    weights = [i for i, value in enumerate(node.inputs) if value in constants]
    if len(weights) == len(node.inputs) or node.op_identifier() in functions:
        return []  # known before the run, or no operator at all
    if node.domain not in STANDARD_DOMAINS:
        reason = f"operator {node.domain}::{node.op_type} is outside the ONNX standard"
        return [Product(node, i, refusal=reason) for i in weights if len(_shape(node, i, constants)) >= 2]
    if node.op_type in ("MatMul", "Gemm"):
        return [_matmul(node, i, constants) for i in weights if i < 2]
    if node.op_type == "Conv":
        return [_conv(node, constants)] if 1 in weights else []
    if node.op_type in REFUSED_OPERATORS:
        indices, reason = REFUSED_OPERATORS[node.op_type]
        return [Product(node, i, refusal=reason) for i in indices if i in weights]
    if node.op_type == "Einsum":
        return [Product(node, i, refusal=EINSUM) for i in weights if len(_shape(node, i, constants)) >= 2]
    if node.op_type == "Gather" and 0 in weights and _is_table(node, constants):
        return [Product(node, 0, refusal=EMBEDDING)]
    return []


def stored_shape(value: onnx_ir.Value, constants: Constants) -> tuple[int, ...]:
    """Return the shape of a constant, () where it is computed inside a body or cannot be computed."""
    try:
        known = constants.describe(value)
    except ModelError:
        return ()
    return known[1] if known else ()


def _matmul(node: onnx_ir.Node, index: int, constants: Constants) -> Product:
    data = node.inputs[1 - index]
    if refusal := _not_float(node, index, constants):
        return Product(node, index, refusal=refusal)
    rank = len(_shape(node, index, constants))
    if rank != 2:
        what = "a vector" if rank < 2 else f"a batch of matrices ({rank} axes)"
        return Product(node, index, refusal=f"the constant is {what}, not one matrix")
    turned = [node.op_type == "Gemm" and bool(node.attributes.get_int(name, 0)) for name in ("transA", "transB")]
    # Right (index 1): y = x W with W (in, out). Left: y = W x, so W is (out, in) and x is reduced on axis -2.
    transposed = (index == 1) != turned[index]
    input_axis = -1 if (index == 1) != turned[1 - index] else -2
    return Product(node, index, MatmulLayout(transposed, input_axis), data)


def _conv(node: onnx_ir.Node, constants: Constants) -> Product:
    if refusal := _not_float(node, 1, constants):
        return Product(node, 1, refusal=refusal)
    shape = _shape(node, 1, constants)
    kernel = shape[2:]
    axes = len(kernel)
    groups = node.attributes.get_int("group", 1)
    if not 1 <= axes <= 3:
        return Product(node, 1, refusal=f"a convolution over {axes} axes; 1 to 3 can be pruned")
    if groups > 1 and shape[1] == 1:
        return Product(node, 1, refusal="depthwise convolution: one input channel a group, nothing to choose among")
    strides = tuple(node.attributes.get_ints("strides", [1] * axes))
    dilations = tuple(node.attributes.get_ints("dilations", [1] * axes))
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    same = auto_pad if auto_pad.startswith("SAME") else None
    if same and max(strides) == 1:
        totals = [dilation * (size - 1) for size, dilation in zip(kernel, dilations, strict=True)]
        pads, same = tuple(same_sides(total, same) for total in totals), None
    elif auto_pad == "NOTSET":
        flat = node.attributes.get_ints("pads", [0] * (2 * axes))
        pads = tuple(zip(flat[:axes], flat[axes:], strict=True))
    else:
        pads = ((0, 0),) * axes
    layout = ConvLayout(tuple(kernel), strides, pads, dilations, groups)
    return Product(node, 1, layout, node.inputs[0], same)


def same_sides(total: int, mode: str) -> tuple[int, int]:
    """Split SAME padding of `total` into (begin, end): SAME_UPPER puts the odd one at the end."""
    small = total // 2
    return (small, total - small) if mode == "SAME_UPPER" else (total - small, small)


def _not_float(node: onnx_ir.Node, index: int, constants: Constants) -> str | None:
    value = node.inputs[index]
    assert value is not None
    try:
        known = constants.describe(value)
    except ModelError as error:
        return f"its constant cannot be computed: {error}"
    if known is None:
        return "its constant is computed inside a body"
    return None if known[0] in _PRUNABLE_DTYPES else f"a weight of type {known[0].name}, which is not floating point"


def _shape(node: onnx_ir.Node, index: int, constants: Constants) -> tuple[int, ...]:
    value = node.inputs[index]
    return () if value is None else stored_shape(value, constants)


def _is_table(node: onnx_ir.Node, constants: Constants) -> bool:
    value = node.inputs[0]
    assert value is not None
    if len(stored_shape(value, constants)) != 2:
        return False
    known = constants.describe(value)
    return known is not None and known[0] in _PRUNABLE_DTYPES
