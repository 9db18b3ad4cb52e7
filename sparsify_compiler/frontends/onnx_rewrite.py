"""Put a new weight under the products that use it; everything else in the graph stays as it was."""

from collections.abc import Sequence

import numpy as np
import onnx_ir
import torch
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
        ModelError: `weight` has another shape, or numbers too large for the model's dtype.
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
    tensors = {value: _native(site.name, product, weight, constants) for value, product in product_of.items()}
    return [put_tensor(model.graph, uses[value], tensors[value], _listed(model)) for value in uses]


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


def conv_bias(node: onnx_ir.Node, constants: Constants) -> Tensor | None:
    """Return a copy of the bias of a Conv, float32 (zeros without one); None where a run computes it."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        weight = constants.describe(_required(node, 1))
        assert weight is not None
        return torch.zeros(weight[1][0])
    if value not in constants:
        return None
    return torch.from_numpy(constants.tensor(value).numpy().astype("float32"))


def shift_conv(
    model: onnx_ir.Model, node: onnx_ir.Node, amount: Tensor, constants: Constants
) -> tuple[str, onnx_ir.Value]:
    """Add `amount` (output channels) to what a Conv computes; say where, and return the changed initialiser.

    `model` is modified: the bias; without one the mean of a BatchNormalization that alone reads the output; else a
    new bias.

    Raises:
        ModelError: the bias is computed by the run.
    """
    bias = conv_bias(node, constants)
    if bias is None:
        raise ModelError(f"{node.op_type} {node.name!r}: its bias is computed by the run and cannot be corrected")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return "bias", _put_vector(model, node, 2, bias + amount, constants)
    users = node.outputs[0].uses()
    norm = next((user for user, index in users if index == 0), None)
    if norm is not None and len(users) == 1 and not node.outputs[0].is_graph_output() and _fixed_norm(norm, constants):
        mean = torch.from_numpy(constants.tensor(_required(norm, 3)).numpy().astype("float32"))
        return f"mean of {norm.name or norm.op_type}", _put_vector(model, norm, 3, mean - amount, constants)
    node.resize_inputs(3)
    return "new bias", _put_vector(model, node, 2, amount, constants)


def _fixed_norm(node: onnx_ir.Node, constants: Constants) -> bool:
    if node.op_type != "BatchNormalization" or node.attributes.get_int("training_mode", 0) == 1:
        return False
    return len(node.outputs) == 1 and len(node.inputs) == 5 and node.inputs[3] in constants


def _put_vector(
    model: onnx_ir.Model, node: onnx_ir.Node, index: int, vector: Tensor, constants: Constants
) -> onnx_ir.Value:
    old = node.inputs[index]
    known = constants.describe(old if old is not None else _required(node, 1))
    assert known is not None
    tensor = onnx_ir.Tensor(vector.detach().cpu().float().numpy().astype(known[0].numpy()), dtype=known[0])
    listed = _listed(model)
    if old is not None:
        return put_tensor(model.graph, [(node, index)], tensor, listed)
    name = _free_name(model.graph, f"{_required(node, 1).name}_bias")
    tensor.name = name
    shape = onnx_ir.Shape(vector.shape)
    new = onnx_ir.Value(name=name, type=onnx_ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    node.replace_input_with(index, new)
    model.graph.register_initializer(new)
    if listed:
        model.graph.inputs.append(new)
    return new


def _required(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _listed(model: onnx_ir.Model) -> bool:
    return (model.ir_version or FIRST_IR_WITH_FREE_INITIALISERS) < FIRST_IR_WITH_FREE_INITIALISERS


def _native(name: str, product: Product, weight: Tensor, constants: Constants) -> onnx_ir.TensorProtocol:
    known = constants.describe(product.weight)
    assert known is not None
    assert product.layout is not None
    dtype, shape = known
    native = from_problem(weight.detach().cpu().float(), product.layout, shape).numpy()
    with np.errstate(over="ignore"):  # looked at below, and said with the layer's name
        cast = native.astype(dtype.numpy())
    if not np.isfinite(cast.astype(np.float32)).all():
        largest = float(np.abs(native).max())
        raise ModelError(f"layer {name!r}: a new weight of size {largest:.3g} does not fit {dtype.name.lower()}")
    return onnx_ir.Tensor(cast, dtype=dtype)


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
