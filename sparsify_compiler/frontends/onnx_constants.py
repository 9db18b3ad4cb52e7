"""Which values of an ONNX model are the same in every run, where they come from, and what they are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir

from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends.onnx_file import load_weights, to_bytes
from sparsify_compiler.frontends.onnx_session import OrtSession

STANDARD_DOMAINS = ("", "ai.onnx")

_NOT_REPEATABLE = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")


@dataclass(frozen=True)
class Source:
    """Where a constant comes from: `root` is its largest initialiser or `Constant` output, `through` the operators.

    `through` lists the operators between, from the root to the value; empty where the value is the root.
    """

    root: onnx_ir.Value
    through: tuple[str, ...]


class Constants:
    """The values of `model` that depend on initialisers and `Constant` nodes alone, those of bodies included.

    An initialiser that is also a graph input counts: files of IR version 3 list every weight that way.
    """

    def __init__(self, model: onnx_ir.Model) -> None:
        self._model = model
        self._known: dict[onnx_ir.Value, tuple[onnx_ir.DataType, tuple[int, ...]] | None] = {}
        self._values: set[onnx_ir.Value] = {
            value for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None
        }
        self._carried: dict[onnx_ir.Value, onnx_ir.Value] = {}
        for node in model.graph.all_nodes():
            self._carried.update({inner: outer for inner, outer in carried_values(node) if outer in self._values})
            self._values.update(self._carried)
            if _folds(node) and all(value is None or value in self._values for value in node.inputs):
                self._values.update(node.outputs)

    def __contains__(self, value: onnx_ir.Value | None) -> bool:
        """Tell whether `value` is the same in every run."""
        return value in self._values

    def add(self, value: onnx_ir.Value) -> None:
        """Take in an initialiser that was made later."""
        self._values.add(value)

    def _outermost(self, value: onnx_ir.Value) -> onnx_ir.Value:
        while value in self._carried:
            value = self._carried[value]
        return value

    def source(self, value: onnx_ir.Value) -> Source:
        """Walk a constant `value` back to its largest root."""
        through: list[str] = []
        roots: list[onnx_ir.Value] = []
        seen: set[onnx_ir.Value] = set()
        stack = [value]
        while stack:
            current = self._outermost(stack.pop())
            if current in seen:
                continue
            seen.add(current)
            node = current.producer()
            if node is None or node.op_type == "Constant":
                roots.append(current)
                continue
            through.append(node.op_type)
            stack.extend(each for each in reversed(node.inputs) if each is not None)
        return Source(max(roots, key=_size, default=value), tuple(reversed(through)))

    def describe(self, value: onnx_ir.Value) -> tuple[onnx_ir.DataType, tuple[int, ...]] | None:
        """Return the dtype and shape of a constant; None where it is computed inside a body.

        Raises:
            ModelError: ONNX Runtime cannot compute the constant.
        """
        value = self._outermost(value)
        if value not in self._known:
            tensor = stored_tensor(value)
            if tensor is None and value.graph is self._model.graph:
                tensor = self.tensor(value)
            self._known[value] = None if tensor is None else (tensor.dtype, tuple(tensor.shape.numpy()))
        return self._known[value]

    def tensor(self, value: onnx_ir.Value) -> onnx_ir.TensorProtocol:
        """Return the numbers of a constant of the main graph; an expression is computed by ONNX Runtime.

        Raises:
            ModelError: ONNX Runtime cannot compute the expression.
        """
        if (tensor := stored_tensor(value)) is not None:
            return tensor
        graph = onnx_ir.convenience.extract(self._model.graph, inputs=[], outputs=[value])
        piece = onnx_ir.Model(graph, ir_version=self._model.ir_version)
        load_weights(piece)
        result = OrtSession(to_bytes(piece), f"the constant {value.name!r}").run(None, {})[0]
        if not isinstance(result, np.ndarray):
            raise ModelError(f"the constant {value.name!r} is a {type(result).__name__}, not a tensor")
        return onnx_ir.tensor(result, name=value.name)


def stored_tensor(value: onnx_ir.Value) -> onnx_ir.TensorProtocol | None:
    """Return the tensor of an initialiser or `Constant` node, None for anything else."""
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        # onnx_ir's own reader would rename this tensor, which the user's model shares with ours.
        return node.attributes["value"].as_tensor()
    return onnx_ir.convenience.get_const_tensor(value)


def bodies(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    """List the graphs that `node` holds, as If, Loop and Scan do."""
    found: list[onnx_ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def carried_values(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value, onnx_ir.Value]]:
    """Yield (value inside, value outside) of a Loop or Scan for each state that its body hands on unchanged."""
    if node.op_type not in ("Loop", "Scan") or not bodies(node):
        return
    body = bodies(node)[0]
    first = 1 if node.op_type == "Loop" else 0  # a Loop's body takes the iteration number and gives no such output
    for index, (outer, inner) in enumerate(zip(node.inputs, body.inputs, strict=False)):
        if outer is not None and first <= index < len(body.outputs) + first:
            result = body.outputs[index - first]
            producer = result.producer()
            if producer is not None and producer.op_type == "Identity":
                result = producer.inputs[0]  # type: ignore[assignment]  # Identity always has its input
            if result is inner:
                yield inner, outer


def _folds(node: onnx_ir.Node) -> bool:
    if node.op_type == "Constant":
        return True
    if node.domain not in STANDARD_DOMAINS or not node.inputs or node.op_type in _NOT_REPEATABLE:
        return False
    return not bodies(node)


def _size(value: onnx_ir.Value) -> int:
    tensor = stored_tensor(value)
    return tensor.size if tensor is not None else 0
