"""ONNX operators in PyTorch, differentiable: arithmetic and reductions. `onnx_shapes` and `onnx_layers` have the rest.

Written from the operators' specification (onnx.ai/onnx/operators), for opset 7 and later; where versions differ in
form (axes as an attribute or an input) both are read. An operator that is not in the tables gives no gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One node when it runs: its inputs (None where one is left out), attributes, opset, and its number of outputs."""

    inputs: tuple[Tensor | None, ...]
    attributes: Mapping[str, Any]
    opset: int
    outputs: int

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.given(0)

    def given(self, index: int) -> Tensor:
        """Return an input that must be there."""
        found = self.maybe(index)
        assert found is not None
        return found

    def maybe(self, index: int) -> Tensor | None:
        """Return an input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def list(self, name: str, index: int) -> list[int] | None:
        """Return whole numbers that are an attribute, or input number `index` in later opsets."""
        if name in self.attributes:
            return [int(value) for value in self.attributes[name]]
        found = self.maybe(index)
        return None if found is None else [int(value) for value in found.flatten().tolist()]

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)


Operator = Callable[[Call], Tensor | tuple[Tensor, ...]]


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call.x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call: function(call.x, call.given(1))


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        total = call.x
        for index in range(1, len(call.inputs)):
            total = function(total, call.given(index))
        return total

    return run


def _mean(call: Call) -> Tensor:
    total = _variadic(torch.add)(call)
    assert isinstance(total, Tensor)
    return total / len(call.inputs)


def _divide(call: Call) -> Tensor:
    exact = call.x.is_floating_point()
    return call.x / call.given(1) if exact else torch.div(call.x, call.given(1), rounding_mode="trunc")


def _modulo(call: Call) -> Tensor:
    return (torch.fmod if call.get("fmod", 0) else torch.remainder)(call.x, call.given(1))


def _clip(call: Call) -> Tensor:
    low, high = (call.get(name, call.maybe(index)) for index, name in ((1, "min"), (2, "max")))
    return call.x if low is None and high is None else torch.clamp(call.x, low, high)


def _gelu(call: Call) -> Tensor:
    y: Tensor = F.gelu(call.x, approximate=call.get("approximate", "none"))
    return y


def _prelu(call: Call) -> Tensor:
    return torch.where(call.x < 0, call.x * call.given(1), call.x)


def _selu(call: Call) -> Tensor:
    alpha: float = call.get("alpha", 1.6732632423543772)
    gamma: float = call.get("gamma", 1.0507009873554805)
    return gamma * torch.where(call.x > 0, call.x, alpha * call.x.expm1())


def _hard_sigmoid(call: Call) -> Tensor:
    alpha: float = call.get("alpha", 0.2)
    beta: float = call.get("beta", 0.5)
    return (call.x * alpha + beta).clamp(0, 1)


def _is_infinite(call: Call) -> Tensor:
    above = torch.isposinf(call.x) if call.get("detect_positive", 1) else torch.zeros_like(call.x, dtype=torch.bool)
    return above | torch.isneginf(call.x) if call.get("detect_negative", 1) else above


def _dropout(call: Call) -> Tensor:
    training = call.maybe(2)
    if training is not None and bool(training):
        raise NotImplementedError("Dropout in training mode")
    return call.x


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        axes, keep = call.list("axes", 1), bool(call.get("keepdims", 1))
        if not axes and call.get("noop_with_empty_axes", 0):
            return call.x
        return function(call.x, axes or list(range(call.x.dim())), keep)

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _extreme(largest: bool) -> Operator:
    def run(call: Call) -> Tensor:
        axis = call.get("axis", 0)
        x = call.x.flip(axis) if call.get("select_last_index", 0) else call.x
        found = (x.argmax if largest else x.argmin)(axis, keepdim=bool(call.get("keepdims", 1)))
        return x.shape[axis] - 1 - found if call.get("select_last_index", 0) else found

    return run


OPERATORS: Mapping[str, Operator] = {
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _divide,
    "Mod": _modulo,
    "Pow": lambda call: torch.pow(call.x, call.given(1)).to(call.x.dtype),
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Sum": _variadic(torch.add),
    "Mean": _mean,
    "Equal": _binary(torch.eq),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Xor": _binary(torch.logical_xor),
    "Not": _unary(torch.logical_not),
    "IsNaN": _unary(torch.isnan),
    "IsInf": _is_infinite,
    "Where": lambda call: torch.where(call.x, call.given(1), call.given(2)),
    "Identity": _unary(lambda x: x),
    "Dropout": _dropout,
    "Abs": _unary(torch.abs),
    "Ceil": _unary(torch.ceil),
    "Cos": _unary(torch.cos),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Log": _unary(torch.log),
    "Neg": _unary(torch.neg),
    "Reciprocal": _unary(torch.reciprocal),
    "Round": _unary(torch.round),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Sqrt": _unary(torch.sqrt),
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Tanh": _unary(torch.tanh),
    "Mish": _unary(F.mish),
    "HardSwish": _unary(F.hardswish),
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "LeakyRelu": lambda call: F.leaky_relu(call.x, call.get("alpha", 0.01)),
    "Elu": lambda call: F.elu(call.x, call.get("alpha", 1.0)),
    "Celu": lambda call: F.celu(call.x, call.get("alpha", 1.0)),
    "Selu": _selu,
    "PRelu": _prelu,
    "Clip": _clip,
    "ReduceMean": _reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keep)),
    "ArgMax": _extreme(largest=True),
    "ArgMin": _extreme(largest=False),
}
"""Operators of the standard domain by name."""
