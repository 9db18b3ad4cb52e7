"""Bodies of the sparse ONNX operators: model-local functions that unpack a weight with standard operators.

Domain `ai.sparsify`, version 1. For each standard layout (runtime/formats.py) there are two operators:

    y = NMLinear(x, values, mask)                        # y = x Wᵀ, x (..., in), y (..., out)
    y = BitmapLinear(x, values, mask, row_starts)
    y = BlockLinear(x, values, mask)
    w = NMWeight(values, mask), and likewise for the others   # W in the shape the user's own node reads

Integer attributes: `in_features` (and `out_features` for blocks) are the sides of W (out, in); the `Weight` operators
reshape W to `shape` and then permute its axes by `perm`. Before opset 15 there is also `dtype`, the TensorProto number
of the values' type. Opset 11 cannot turn an integer attribute into a tensor, so there every attribute but `perm` and
`dtype` comes a second time as an int64 tensor named with the suffix `_tensor`.

The bodies only move numbers and never compute with them: a removed entry reads a zero that is put in front of the
values. So a body is exact for every dtype, and ONNX Runtime folds it away at load in float16 too, where arithmetic
would stay in the graph (its CPU provider has no float16 kernels to fold with).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsify_compiler.errors import ExportError
from sparsify_compiler.runtime.formats import packed_tensors

DOMAIN = "ai.sparsify"
DOMAIN_VERSION = 1
LEAST_OPSET = 11
"""The first opset with the operators of the bodies (CumSum, GatherElements)."""

_ATTRIBUTE_AS_TENSOR = 12  # Constant(value_int=...)
_CAST_LIKE = 15


def operator_name(layout: str, product: bool) -> str:
    """Name the operator of a layout ("nm", "bitmap", "block"): the product, or the weight alone."""
    prefixes = {"nm": "NM", "bitmap": "Bitmap", "block": "Block"}
    return prefixes[layout] + ("Linear" if product else "Weight")


def make_function(layout: str, product: bool, opset: int) -> onnx_ir.Function:
    """Write the function of `operator_name(layout, product)`. `opset` is the model's own, which the body must share.

    Raises:
        ExportError: `opset` is below 11.
    """
    if opset < LEAST_OPSET:
        raise ExportError(f"a packed weight needs opset {LEAST_OPSET}; found {opset}; write dense zeros instead")
    body = _Body(opset)
    inputs = [onnx_ir.Value(name=name) for name in packed_tensors(layout)]
    weight = _UNPACK[layout](body, *inputs)
    if product:
        x = onnx_ir.Value(name="x")
        inputs.insert(0, x)
        turned = body.add("Transpose", [weight], "weight_transposed", onnx_ir.AttrInt64s("perm", [1, 0]))
        result = body.add("MatMul", [x, turned], "y")
    else:
        shaped = body.add("Reshape", [weight, body.size("shape", one=False)], "shaped")
        perm = onnx_ir.RefAttr("perm", "perm", onnx_ir.AttributeType.INTS)
        body.attributes["perm"] = onnx_ir.AttributeType.INTS
        result = body.add("Transpose", [shaped], "w", perm)
    declared = [onnx_ir.Attr(name, kind, None) for name, kind in body.attributes.items()]
    name = operator_name(layout, product)
    graph = onnx_ir.Graph(inputs, [result], nodes=body.nodes, opset_imports={"": opset}, name=name)
    return onnx_ir.Function(DOMAIN, name, graph=graph, attributes=declared)


def make_attributes(
    layout: str,
    opset: int,
    dtype: onnx_ir.DataType,
    sides: tuple[int, int],
    shape: tuple[int, ...] | None = None,
    perm: tuple[int, ...] | None = None,
) -> list[onnx_ir.Attr]:
    """Write the attributes of a node: `sides` (out, in) of W, and `shape` and `perm` for the `Weight` operators."""
    sizes: dict[str, int | tuple[int, ...]] = {"in_features": sides[1]}
    if layout == "block":
        sizes["out_features"] = sides[0]
    if shape is not None:
        sizes["shape"] = shape
    result: list[onnx_ir.Attr] = []
    for name, value in sizes.items():
        result.append(
            onnx_ir.AttrInt64(name, value) if isinstance(value, int) else onnx_ir.AttrInt64s(name, list(value))
        )
        if opset < _ATTRIBUTE_AS_TENSOR:
            tensor = onnx_ir.tensor(np.array(value, np.int64).reshape(-1), name=f"{name}_tensor")
            result.append(onnx_ir.AttrTensor(f"{name}_tensor", tensor))
    if perm is not None:
        result.append(onnx_ir.AttrInt64s("perm", list(perm)))
    if opset < _CAST_LIKE:
        result.append(onnx_ir.AttrInt64("dtype", int(dtype)))
    return result


@dataclass(frozen=True)
class _Body:
    """The nodes of one function under construction, and the attributes they refer to."""

    opset: int
    nodes: list[onnx_ir.Node] = field(default_factory=list)
    attributes: dict[str, onnx_ir.AttributeType] = field(default_factory=dict)

    def add(self, op: str, inputs: list[onnx_ir.Value], name: str, *attributes: onnx_ir.Attr) -> onnx_ir.Value:
        """Append a node and return its output, called `name`."""
        output = onnx_ir.Value(name=name)
        self.nodes.append(onnx_ir.Node("", op, inputs, attributes, outputs=[output], name=f"{name}_{op}"))
        return output

    def constant(self, name: str, array: npt.NDArray[Any]) -> onnx_ir.Value:
        """Append a constant."""
        return self.add("Constant", [], name, onnx_ir.AttrTensor("value", onnx_ir.tensor(array, name=name)))

    def integers(self, name: str, *values: int) -> onnx_ir.Value:
        """Append a constant int64 vector."""
        return self.constant(name, np.array(values, np.int64))

    def size(self, name: str, one: bool = True) -> onnx_ir.Value:
        """Append the integer (`one`) or integers of attribute `name` as an int64 vector."""
        if self.opset < _ATTRIBUTE_AS_TENSOR:
            self.attributes[name] = onnx_ir.AttributeType.INT if one else onnx_ir.AttributeType.INTS
            name, kind, field_name = f"{name}_tensor", onnx_ir.AttributeType.TENSOR, "value"
            self.attributes[name] = kind
            return self.add("Constant", [], name, onnx_ir.RefAttr(field_name, name, kind))
        kind = onnx_ir.AttributeType.INT if one else onnx_ir.AttributeType.INTS
        self.attributes[name] = kind
        value = self.add("Constant", [], name, onnx_ir.RefAttr("value_int" if one else "value_ints", name, kind))
        return self.add("Reshape", [value, self.integers(f"{name}_as", -1)], f"{name}_vector") if one else value

    def zero(self, values: onnx_ir.Value, rank: int) -> onnx_ir.Value:
        """Append a zero of the dtype of `values`, with `rank` axes of length 1."""
        zero = self.constant("zero_float", np.zeros((1,) * rank, np.float32))
        if self.opset >= _CAST_LIKE:
            return self.add("CastLike", [zero, values], "zero")
        self.attributes["dtype"] = onnx_ir.AttributeType.INT
        return self.add("Cast", [zero], "zero", onnx_ir.RefAttr("to", "dtype", onnx_ir.AttributeType.INT))


def _bits(body: _Body, mask: onnx_ir.Value, columns: onnx_ir.Value) -> onnx_ir.Value:
    """Spread `mask` (rows, bytes) uint8 into (rows, columns) int32 of 0 and 1, lowest bit first.

    A table of the bits of every byte: one copy of eight entries a byte, where shifting and masking pass over all
    entries three times (and decide how long a large model takes to load).
    """
    bytes_ = np.arange(256, dtype=np.uint8)[:, np.newaxis]
    table = body.constant("bits_of_byte", bytes_ >> np.arange(8, dtype=np.uint8) & 1)  # (256, 8)
    int32 = onnx_ir.AttrInt64("to", int(onnx_ir.DataType.INT32))
    index = body.add("Cast", [mask], "mask_index", int32)
    spread = body.add("Gather", [table, index], "bits", onnx_ir.AttrInt64("axis", 0))  # (rows, bytes, 8)
    rows = body.add("Reshape", [spread, body.integers("row_shape", 0, -1)], "bit_rows")
    return body.add("Cast", [_first(body, rows, columns, 1, "keep_bits")], "keep", int32)


def _first(body: _Body, x: onnx_ir.Value, count: onnx_ir.Value, axis: int, name: str) -> onnx_ir.Value:
    """Take the first `count` (1,) entries of `x` along `axis`."""
    start, along = body.integers(f"{name}_start", 0), body.integers(f"{name}_axis", axis)
    return body.add("Slice", [x, start, count, along], name)


def _count(body: _Body, keep: onnx_ir.Value, axis: int) -> onnx_ir.Value:
    """Number the ones of `keep` along `axis` from 1."""
    return body.add("CumSum", [keep, body.constant("count_axis", np.array(axis, np.int64))], "count")


def _unpack_nm(body: _Body, values: onnx_ir.Value, mask: onnx_ir.Value) -> onnx_ir.Value:
    keep = _bits(body, mask, body.size("in_features"))
    position = body.add("Mul", [_count(body, keep, 1), keep], "position")  # 0 where removed
    value_shape = body.add("Shape", [values], "value_shape")
    out = _first(body, value_shape, body.integers("out_count", 1), 0, "out")
    column = body.add("Concat", [out, body.integers("one", 1)], "column_shape", onnx_ir.AttrInt64("axis", 0))
    zeros = body.add("Expand", [body.zero(values, 2), column], "zeros")
    padded = body.add("Concat", [zeros, values], "padded", onnx_ir.AttrInt64("axis", 1))
    return body.add("GatherElements", [padded, position], "weight", onnx_ir.AttrInt64("axis", 1))


def _unpack_bitmap(body: _Body, values: onnx_ir.Value, mask: onnx_ir.Value, row_starts: onnx_ir.Value) -> onnx_ir.Value:
    keep = _bits(body, mask, body.size("in_features"))
    starts = _first(body, row_starts, body.integers("starts_stop", -1), 0, "starts")
    column = body.add("Reshape", [starts, body.integers("column_shape", -1, 1)], "start_column")
    numbered = body.add("Add", [column, _count(body, keep, 1)], "numbered")
    position = body.add("Mul", [numbered, keep], "position")  # 0 where removed
    padded = body.add("Concat", [body.zero(values, 1), values], "padded", onnx_ir.AttrInt64("axis", 0))
    return body.add("Gather", [padded, position], "weight", onnx_ir.AttrInt64("axis", 0))


def _unpack_block(body: _Body, values: onnx_ir.Value, mask: onnx_ir.Value) -> onnx_ir.Value:
    in_features, out_features = body.size("in_features"), body.size("out_features")
    value_shape = body.add("Shape", [values], "value_shape")
    tile_width = body.add("Gather", [value_shape, body.integers("width_index", 2)], "tile_width")
    below = body.add("Sub", [tile_width, body.integers("one", 1)], "tile_width_less_one")
    reach = body.add("Add", [in_features, below], "reach")
    tile_columns = body.add("Div", [reach, tile_width], "tile_columns")  # rounded up
    keep = _bits(body, mask, tile_columns)  # (tile rows, tile columns)
    flat = body.add("Reshape", [keep, body.integers("flat_shape", -1)], "keep_flat")
    position = body.add("Mul", [_count(body, flat, 0), flat], "position_flat")  # 0 where removed
    grid = body.add("Reshape", [position, body.add("Shape", [keep], "grid_shape")], "position")
    tile_height = body.add("Gather", [value_shape, body.integers("height_index", 1)], "tile_height")
    one_tile = [body.integers("one_tile", 1), tile_height, tile_width]
    tile_shape = body.add("Concat", one_tile, "tile_shape", onnx_ir.AttrInt64("axis", 0))
    zeros = body.add("Expand", [body.zero(values, 3), tile_shape], "zeros")
    padded = body.add("Concat", [zeros, values], "padded", onnx_ir.AttrInt64("axis", 0))
    tiles = body.add("Gather", [padded, grid], "tiles", onnx_ir.AttrInt64("axis", 0))  # (rows, columns, high, wide)
    strips = body.add("Transpose", [tiles], "strips", onnx_ir.AttrInt64s("perm", [0, 2, 1, 3]))
    wide = body.add("Mul", [tile_columns, tile_width], "padded_in")
    shape = body.add("Concat", [body.integers("any", -1), wide], "padded_shape", onnx_ir.AttrInt64("axis", 0))
    rows = body.add("Reshape", [strips, shape], "padded_weight")
    return _first(body, _first(body, rows, out_features, 0, "weight_rows"), in_features, 1, "weight")


_UNPACK: Mapping[str, Callable[..., onnx_ir.Value]] = MappingProxyType(
    {"nm": _unpack_nm, "bitmap": _unpack_bitmap, "block": _unpack_block}
)
