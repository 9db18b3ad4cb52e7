"""Put the operators of a packed weight in the place of the products that read the dense one."""

import math
from collections.abc import Sequence

import onnx_ir
from onnx_ir.tensor_adapters import TorchTensor

from sparsify_compiler.export.onnx_bodies import DOMAIN, make_attributes, operator_name
from sparsify_compiler.export.onnx_weights import remove_unread
from sparsify_compiler.frontends.onnx_products import Product
from sparsify_compiler.graph import ConvLayout
from sparsify_compiler.kernel import Packed
from sparsify_compiler.runtime.formats import packed_tensors


def rewrite_products(
    graph: onnx_ir.Graph, name: str, products: Sequence[Product], packed: Packed, opset: int
) -> list[onnx_ir.Node]:
    """Replace `products`, all that read the weight of site `name`, in execution order; return the ai.sparsify nodes.

    The packed tensors become initialisers once, `<name>.values` and so on. A plain product becomes a `Linear` node of
    the same name; any other node keeps everything but its weight input, which a `Weight` node now computes.
    """
    weights = [product.weight for product in products]
    inputs = _add_initialisers(graph, name, packed)
    nodes: list[onnx_ir.Node] = []
    made: dict[tuple[tuple[int, ...], tuple[int, ...]], onnx_ir.Value] = {}
    for product in products:
        if is_plain(product):
            nodes.append(_replace_product(graph, product, inputs, packed, opset))
            continue
        native = native_form(product, packed.shape)
        if native not in made:
            node = _weight_node(product, inputs, packed, opset, native)
            graph.insert_before(product.node, [node])
            nodes.append(node)
            made[native] = node.outputs[0]
        product.node.replace_input_with(product.index, made[native])
    remove_unread(weights)
    return nodes


def is_plain(product: Product) -> bool:
    """Tell whether the product is x W + C and no more: MatMul, or Gemm with alpha = 1, transA = 0 and beta = 1."""
    node = product.node
    if product.index != 1 or node.op_type not in ("MatMul", "Gemm"):
        return False
    if node.op_type == "MatMul":
        return True
    scaled = node.attributes.get_float("alpha", 1.0) != 1.0
    bias_scaled = len(node.inputs) > 2 and node.inputs[2] is not None and node.attributes.get_float("beta", 1.0) != 1.0
    return not scaled and not bias_scaled and not node.attributes.get_int("transA", 0)


def native_form(product: Product, sides: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (shape, perm) that bring W (groups * out, in), tap-major, into the order the product's node reads."""
    if isinstance(product.layout, ConvLayout):
        kernel = product.layout.kernel
        axes = len(kernel)
        return (sides[0], *kernel, sides[1] // math.prod(kernel)), (0, axes + 1, *range(1, axes + 1))
    transposed = product.layout is not None and product.layout.transposed
    return sides, (1, 0) if transposed else (0, 1)


def _add_initialisers(graph: onnx_ir.Graph, name: str, packed: Packed) -> list[onnx_ir.Value]:
    taken = {value.name for node in graph for value in node.outputs}
    taken |= {*graph.initializers, *(value.name for value in graph.inputs)}
    values = []
    for tensor_name in packed_tensors(packed.layout):
        unique, count = f"{name}.{tensor_name}", 1
        while unique in taken:
            unique, count = f"{name}.{tensor_name}_{count}", count + 1
        tensor = TorchTensor(packed.tensors[tensor_name].contiguous(), name=unique)
        value = onnx_ir.Value(
            name=unique, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        graph.register_initializer(value)
        values.append(value)
    return values


def _replace_product(
    graph: onnx_ir.Graph, product: Product, inputs: list[onnx_ir.Value], packed: Packed, opset: int
) -> onnx_ir.Node:
    old = product.node
    assert inputs[0].dtype is not None
    linear = onnx_ir.Node(
        DOMAIN,
        operator_name(packed.layout, True),
        [old.inputs[0], *inputs],
        make_attributes(packed.layout, opset, inputs[0].dtype, packed.shape),
        name=old.name,
        doc_string=old.doc_string,
        metadata_props=dict(old.metadata_props),
    )
    new = [linear]
    bias = old.inputs[2] if len(old.inputs) > 2 else None
    if bias is not None:
        product_only, y = linear.outputs[0], old.outputs[0]
        product_only.name = f"{y.name}_before_bias"
        product_only.type, product_only.shape = y.type, y.shape
        name = f"{old.name}_bias" if old.name else None
        new.append(onnx_ir.Node("", "Add", [product_only, bias], name=name, metadata_props=dict(old.metadata_props)))
    new[-1].outputs[0].metadata_props.update(old.outputs[0].metadata_props)
    onnx_ir.convenience.replace_nodes_and_values(graph, old, [old], new, [old.outputs[0]], [new[-1].outputs[0]])
    return linear


def _weight_node(
    product: Product,
    inputs: list[onnx_ir.Value],
    packed: Packed,
    opset: int,
    native: tuple[tuple[int, ...], tuple[int, ...]],
) -> onnx_ir.Node:
    shape, perm = native
    dtype = inputs[0].dtype
    assert dtype is not None
    dense = onnx_ir.Value(
        name=f"{inputs[0].name}.dense",
        type=onnx_ir.TensorType(dtype),
        shape=onnx_ir.Shape([shape[axis] for axis in perm]),
    )
    return onnx_ir.Node(
        DOMAIN,
        operator_name(packed.layout, False),
        inputs,
        make_attributes(packed.layout, opset, dtype, packed.shape, shape, perm),
        outputs=[dense],
        name=f"{product.node.name}_weight" if product.node.name else None,
    )
