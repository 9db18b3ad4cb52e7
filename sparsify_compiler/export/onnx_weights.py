"""Whether a weight can leave an ONNX graph, and taking out what nothing reads any more."""

from collections.abc import Sequence

import onnx_ir

from sparsify_compiler.frontends.onnx_products import Product


def stored_bytes(products: Sequence[Product]) -> int:
    """Return the bytes that the file spends on the weight of `products`: its largest initialiser or `Constant`."""
    sizes = [
        tensor.nbytes
        for value in _upstream(products[0].weight)
        if (tensor := onnx_ir.convenience.get_const_tensor(value)) is not None
    ]
    return max(sizes, default=0)


def obstacle(products: Sequence[Product]) -> str | None:
    """Say why the weight would stay in the file although `products` no longer read it, or None."""
    gone = {(product.node, product.index) for product in products}
    for value in {value for product in products for value in _upstream(product.weight)}:
        producer = value.producer()
        if producer is not None:
            gone.update((producer, index) for index in range(len(producer.inputs)))
    for product in products:
        for value in _upstream(product.weight):
            if value.is_graph_input():
                return f"{value.name!r} is also an input of the graph"
            if value.is_graph_output():
                return f"{value.name!r} is also an output of the graph"
            readers = [use.node for use in value.uses() if (use.node, use.idx) not in gone]
            if readers and _is_large(value):
                return f"{readers[0].op_type} {readers[0].name!r} reads it too"
    return None


def remove_unread(values: Sequence[onnx_ir.Value]) -> None:
    """Take out initialisers and nodes that only led to `values`, which nothing reads any more."""
    for value in values:
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        producer = value.producer()
        if producer is not None and producer.graph is not None and not any(o.uses() for o in producer.outputs):
            inputs = [each for each in producer.inputs if each is not None]
            producer.graph.remove(producer, safe=True)
            remove_unread(inputs)
        elif value.is_initializer() and value.graph is not None and value.name is not None:
            value.graph.initializers.pop(value.name, None)


def _upstream(value: onnx_ir.Value) -> list[onnx_ir.Value]:
    """List `value` and everything it is computed from."""
    found, stack = [value], [value]
    while stack:
        producer = stack.pop().producer()
        fresh = [v for v in (producer.inputs if producer else ()) if v is not None and v not in found]
        found += fresh
        stack += fresh
    return found


def _is_large(value: onnx_ir.Value) -> bool:
    """Axes and scales may be shared with anything; they are not the weight."""
    tensor = onnx_ir.convenience.get_const_tensor(value)
    return value.producer() is not None or (tensor is not None and len(tensor.shape) >= 2)
