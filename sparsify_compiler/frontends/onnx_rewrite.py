"""Put a new weight under the products that use it; everything else in the graph stays as it was."""

from collections.abc import Sequence

import onnx_ir
from torch import Tensor

from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends.layout import from_problem
from sparsify_compiler.frontends.onnx_constants import Constants
from sparsify_compiler.frontends.onnx_products import Product
from sparsify_compiler.frontends.onnx_sites import FoundSite

FIRST_IR_WITH_FREE_INITIALISERS = 4
"""Below IR version 4 every initialiser must be listed among the graph's inputs."""


def put_problem(model: onnx_ir.Model, found: FoundSite, weight: Tensor, constants: Constants) -> list[onnx_ir.Value]:
    """Give every product of `found` that stands in `model` the weight `weight` (groups, out, in), cast to its dtype.

    `model` is the whole model or a piece of it with the same names, and is modified; `constants` are those of the
    whole. Returns the initialisers that hold the weight now.

    Raises:
        ModelError: `weight` has another shape.
    """
    site = found.site
    asked = (site.groups, site.out, site.in_)
    if tuple(weight.shape) != asked:
        what = f"asked for a weight (groups, out, in) {asked}, found {tuple(weight.shape)}"
        raise ModelError(f"layer {site.name!r}: {what}")
    node_of = {node.outputs[0].name: node for node in model.graph if node.outputs}
    uses: dict[onnx_ir.Value, list[tuple[onnx_ir.Node, int]]] = {}
    product_of: dict[onnx_ir.Value, Product] = {}
    for product in found.products:
        node = node_of.get(product.node.outputs[0].name)
        value = node.inputs[product.index] if node is not None else None
        if node is not None and value is not None:
            uses.setdefault(value, []).append((node, product.index))
            product_of[value] = product
    # Cast before the first replacement: a product's old value is gone afterwards.
    tensors = {value: _native(product, weight, constants) for value, product in product_of.items()}
    listed = (model.ir_version or FIRST_IR_WITH_FREE_INITIALISERS) < FIRST_IR_WITH_FREE_INITIALISERS
    return [put_tensor(model.graph, uses[value], tensors[value], listed) for value in uses]


def put_tensor(
    graph: onnx_ir.Graph, uses: Sequence[tuple[onnx_ir.Node, int]], tensor: onnx_ir.TensorProtocol, listed: bool
) -> onnx_ir.Value:
    """Make `tensor` what each (node, input index) of `uses` reads, and return its initialiser.

    All of `uses` read one value. Given an initialiser that nobody else reads: it keeps its name and place. Given
    anything else: a new initialiser, under the old name where the nodes that made it are dead and removed, under a
    new one where somebody else reads the old value. `listed`: initialisers must be graph inputs too. `graph` is
    modified.
    """
    old = uses[0][0].inputs[uses[0][1]]
    assert old is not None
    shared = old.is_graph_output() or {tuple(use) for use in old.uses()} != set(uses)
    if old.is_initializer() and not shared:
        tensor.name = old.name
        old.const_value = tensor
        return old
    name = _free_name(graph, f"{old.name}_pruned") if shared else old.name
    tensor.name = name
    new = onnx_ir.Value(
        name=name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    for node, index in uses:
        node.replace_input_with(index, new)
    if not shared:
        _remove_dead(graph, old, listed)
    graph.register_initializer(new)
    if listed:
        graph.inputs.append(new)
    return new


def _native(product: Product, weight: Tensor, constants: Constants) -> onnx_ir.TensorProtocol:
    known = constants.describe(product.weight)
    assert known is not None
    assert product.layout is not None
    dtype, shape = known
    native = from_problem(weight.detach().cpu().float(), product.layout, shape)
    return onnx_ir.Tensor(native.numpy().astype(dtype.numpy()), dtype=dtype)


def _free_name(graph: onnx_ir.Graph, wanted: str) -> str:
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph.all_nodes() for value in node.outputs}
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def _remove_dead(graph: onnx_ir.Graph, value: onnx_ir.Value, listed: bool) -> None:
    """Remove the nodes and initialisers that only led to `value`, which nobody reads any more."""
    stack = [value]
    while stack:
        current = stack.pop()
        if current.uses() or current.is_graph_output():
            continue
        node = current.producer()
        if node is None and current.is_initializer() and current.graph is graph:
            if current.is_graph_input() and not listed:
                continue  # a default that the user can still override by name
            if current.is_graph_input():
                graph.inputs.remove(current)
            del graph.initializers[current.name or ""]
        elif node is not None and not any(out.uses() or out.is_graph_output() for out in node.outputs):
            inputs = [each for each in node.inputs if each is not None]
            graph.remove(node, safe=True)
            stack.extend(inputs)
