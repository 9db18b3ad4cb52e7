"""Label every axis of a torch.fx graph with its factors: one rule an operation, and what no rule knows is fixed."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.frontends.torch_axes import Axes, Factors, Size, size_of
from sparsify_compiler.frontends.torch_uses import operation_name

Label = tuple[Factors, ...]
"""The factors of every axis of one tensor."""


POSITIONS = "its positions are neighbours to each other"
"""Why the pixels of an image and the tokens of a text stay in order."""


@dataclass(frozen=True)
class Attribute:
    """A tensor of the traced module: its first name and shape. `kept` says that the model's state holds it."""

    name: str
    shape: tuple[int, ...]
    kept: bool


class Labels:
    """Labels of the values of one graph, given out node by node in execution order.

    `attribute` looks up a tensor of the module by any of its names. `rules` holds a rule for operations by their bare
    names, `pointwise` is the rule for all others that torch tags so. `mixed` remembers (factors, label) wherever an
    operation mixes positions along the factors of a tensor and keeps its axes, as a softmax does.
    """

    def __init__(
        self,
        axes: Axes,
        attribute: Callable[[str], Attribute | None],
        rules: Mapping[str, "Rule"],
        pointwise: "Rule",
    ) -> None:
        self.axes = axes
        self.parameters: dict[str, Label] = {}
        self.values: list[Label] = []
        self.mixed: list[tuple[Factors, Label]] = []
        self._attribute_named = attribute
        self._rules = rules
        self._pointwise = pointwise
        self._of: dict[fx.Node, Label | list[Label]] = {}

    def walk(self, graph: fx.Graph) -> None:
        """Label every value of `graph`."""
        for node in graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    self._fix(source, "the model returns it")
                continue
            label = self._label(node)
            if label is None:
                continue
            self._of[node] = label
            self.values.extend(label if isinstance(label, list) else [label])

    def of(self, value: object) -> Label:
        """Return the label of a tensor that a node reads."""
        label = self._of[value] if isinstance(value, fx.Node) else ()
        assert not isinstance(label, list), "a tuple of tensors was read as one tensor"
        return label

    def tensors(self, node: fx.Node) -> Iterator[Label]:
        """Yield the labels of the tensors that a node reads."""
        return (self.of(source) for source in node.all_input_nodes if source in self._of)

    def parts(self, value: fx.Node) -> list[Label]:
        """Return the labels of the tensors of a node that returns several."""
        label = self._of[value]
        return label if isinstance(label, list) else [label]

    def fresh(self, node: fx.Node, reason: str) -> Label | list[Label]:
        """Label the result of a node with factors of its own, fixed."""
        value = node.meta.get("val")
        if isinstance(value, tuple | list):
            return [self._fresh(entry, reason) for entry in value]
        return self._fresh(value, reason)

    def pair(self, labels: Sequence[Label], where: str) -> Label:
        """Match labels as broadcasting does, from the last axis, and return the result's."""
        result: list[Factors] = []
        for back in range(1, max(map(len, labels), default=0) + 1):
            long = [label[-back] for label in labels if len(label) >= back and label[-back]]
            for other in long[1:]:
                self.axes.match(long[0], other, where)
            result.append(long[0] if long else ())
        return tuple(reversed(result))

    def _label(self, node: fx.Node) -> Label | list[Label] | None:
        if node.op == "placeholder":
            return self.fresh(node, "it is an input of the model")
        if node.op == "get_attr":
            return self._attribute(node)
        if node.target is operator.getitem and node.args[0] in self._of:
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            return self.parts(source)[index]
        if not _has_tensor(node.meta.get("val")):
            return None if node.meta.get("val") is not None else self._unknown(node)
        rule = self._rule(node)
        result = rule(self, node) if rule is not None else None
        return self._unknown(node) if result is None else result

    def _rule(self, node: fx.Node) -> "Rule | None":
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        found = self._rules.get(operation_name(node))
        return self._pointwise if found is None and torch.Tag.pointwise in node.target.tags else found

    def _attribute(self, node: fx.Node) -> Label | None:
        found = self._attribute_named(str(node.target))
        if found is None:
            return None
        if found.name not in self.parameters:
            reason = None if found.kept else "a constant that is not in the model's state lies along it"
            self.parameters[found.name] = tuple(self.axes.new(size, reason) for size in found.shape)
        return self.parameters[found.name]

    def _unknown(self, node: fx.Node) -> Label | list[Label]:
        """Fix all that an operation without a rule reads and returns."""
        reason = f"{operation_name(node)} follows, for which the order of channels may matter"
        for source in node.all_input_nodes:
            self._fix(source, reason)
        return self.fresh(node, reason)

    def _fix(self, node: fx.Node, reason: str) -> None:
        for label in self.parts(node) if node in self._of else ():
            for factors in label:
                self.axes.fix(factors, reason)

    def _fresh(self, value: object, reason: str) -> Label:
        if not isinstance(value, Tensor):
            return ()
        return tuple(self.axes.new(size_of(length), reason) for length in value.shape)


Rule = Callable[[Labels, fx.Node], "Label | list[Label] | None"]
"""Label a node's result from its inputs, matching their factors; None where this use of the operation has no rule."""


def _has_tensor(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def fresh(labels: Labels, node: fx.Node, reason: str = POSITIONS) -> Label:
    """Label a node's result with factors of its own, fixed for `reason`."""
    result = labels.fresh(node, reason)
    assert not isinstance(result, list)
    return result


def lengths_of(value: Any) -> list[Size]:
    """Return the lengths of the axes of the tensor that a node makes."""
    return [size_of(length) for length in value.meta["val"].shape]


def whole(size: Size) -> int:
    """Return a length that tracing left no choice."""
    assert not size.free, f"channels and heads are counted by numbers, found {size}"
    return size.number


def integer(value: Any) -> int:
    """Return an argument that is a plain number."""
    assert isinstance(value, int)
    return value


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return a node's argument by its place or its name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
