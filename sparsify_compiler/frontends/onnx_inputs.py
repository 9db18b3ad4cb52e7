"""A model's inputs: what it asks for, whether a batch fits, and a batch made up where the user has none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from sparsify_compiler.errors import DataError
from sparsify_compiler.frontends.onnx_constants import Constants


@dataclass(frozen=True)
class Input:
    """One input that a run must give. `dtype` is None for strings and for what is no tensor (`kind` says what).

    `shape`: an int where the size is fixed, a name where it is a symbol, None where nothing is known; None in whole
    where even the rank is open.
    """

    name: str
    dtype: torch.dtype | None
    kind: str
    shape: tuple[int | str | None, ...] | None


def list_inputs(graph: onnx_ir.Graph, constants: Constants) -> tuple[Input, ...]:
    """List the inputs of `graph` that have no default value."""
    found = []
    for value in graph.inputs:
        if value not in constants:
            tensor = isinstance(value.type, onnx_ir.TensorType)
            kind = value.dtype.name.lower() if tensor and value.dtype else str(value.type)
            shape = None if value.shape is None else tuple(_size(dim) for dim in value.shape)
            found.append(Input(value.name or "", _torch_dtype(value.dtype) if tensor else None, kind, shape))
    return tuple(found)


def check_batch(batch: Any, inputs: Sequence[Input]) -> dict[str, Any]:
    """Return `batch` as tensors by input name: a mapping, a sequence in the order of the inputs, or the only tensor.

    Numpy arrays are wrapped without a copy; string inputs are numpy arrays of str.

    Raises:
        DataError: a name, rank, size or dtype is not what the model asks for.
    """
    asked = ", ".join(_words(each) for each in inputs)
    named = _by_name(batch, inputs, asked)
    if missing := [each.name for each in inputs if each.name not in named]:
        raise DataError(f"the batch lacks input {missing[0]!r}; the model asks for {asked}")
    if unknown := sorted(set(named) - {each.name for each in inputs}):
        raise DataError(f"the batch has {unknown[0]!r}, which the model does not ask for; it asks for {asked}")
    return {each.name: _check(named[each.name], each) for each in inputs}


def _by_name(batch: Any, inputs: Sequence[Input], asked: str) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    if len(parts) != len(inputs):
        raise DataError(f"the batch has {len(parts)} tensors, the model asks for {len(inputs)}: {asked}")
    return {each.name: part for each, part in zip(inputs, parts, strict=True)}


def _check(value: Any, asked: Input) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OUS":
        value = torch.from_numpy(np.ascontiguousarray(value) if value.ndim else value)
    if asked.dtype is None and asked.kind != "string":
        raise DataError(f"input {asked.name!r} is a {asked.kind}; only tensors can be given, export the model anew")
    if not isinstance(value, Tensor if asked.dtype else np.ndarray):
        raise DataError(f"input {asked.name!r}: asked for {_words(asked)}, found a {type(value).__name__}")
    if asked.dtype and value.dtype != asked.dtype:
        found = str(value.dtype).removeprefix("torch.")
        raise DataError(f"input {asked.name!r}: asked for {asked.kind}, found {found}; convert the data")
    shape = tuple(value.shape)
    if asked.shape is not None:
        if len(shape) != len(asked.shape):
            raise DataError(f"input {asked.name!r}: asked for {_words(asked)}, found shape {shape}: another rank")
        for axis, (size, wanted) in enumerate(zip(shape, asked.shape, strict=True)):
            if isinstance(wanted, int) and size != wanted:
                raise DataError(
                    f"input {asked.name!r}: asked for {_words(asked)}, found shape {shape}: "
                    f"axis {axis} must be {wanted}, reshape or crop the data"
                )
    return value


def _words(each: Input) -> str:
    if each.shape is None:
        return f"{each.name}: {each.kind}"
    return f"{each.name}: {each.kind}[{', '.join('?' if size is None else str(size) for size in each.shape)}]"


def _size(dim: int | onnx_ir.SymbolicDim) -> int | str | None:
    """Read one size: non-positive numbers are how some exporters write an unknown one."""
    value = dim if isinstance(dim, int) else dim.value
    if isinstance(value, int):
        return value if value > 0 else None
    text = str(value) if value is not None else ""
    return text if text not in ("", "?", "-1", "None") else None


def _torch_dtype(dtype: onnx_ir.DataType | None) -> torch.dtype | None:
    if dtype is None or dtype == onnx_ir.DataType.STRING:
        return None
    if dtype == onnx_ir.DataType.BFLOAT16:
        return torch.bfloat16
    return torch.from_numpy(np.zeros(0, dtype=dtype.numpy())).dtype
