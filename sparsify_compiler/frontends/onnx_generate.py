"""Make up a batch that an ONNX model accepts, for methods that read no data and for checking a written file."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.frontends.onnx_constants import Constants
from sparsify_compiler.frontends.onnx_inputs import Input
from sparsify_compiler.frontends.onnx_products import stored_shape
from sparsify_compiler.frontends.onnx_runner import open_model
from sparsify_compiler.frontends.onnx_segments import to_numpy

IMAGE_SIZES = (64, 224, 48, 32, 320, 640)
OTHER_SIZES = (32, 512, 576, 64, 128, 256, 1024, 48, 1)
SAMPLE_RATE = 16000

_ON_THE_WAY = frozenset(
    (
        "Cast",
        "Identity",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Transpose",
        "Flatten",
        "Clip",
        "Mul",
        "Mod",
    )
)


def generate_inputs(graph: OnnxGraph, seed: int = 0, batch: int = 2, tokens: int = 16) -> dict[str, Any]:
    """Return a batch by input name that ONNX Runtime runs, the same for the same arguments.

    Floats are standard normal, indices lie below the size of the table they look up, masks are ones, booleans False,
    strings "text". A first axis of unknown size becomes `batch`, or 1 where the model insists; other unknown sizes
    become `tokens` (48 to 640 for images), or the first common size that runs; sizes with one name are equal.

    Raises:
        DataError: no size that was tried runs; the message says what ONNX Runtime said last.
    """
    constants = Constants(graph.model)
    limits = {value.name: _limit(value, constants) for value in graph.model.graph.inputs}
    session = open_model(graph.model, "the whole model")
    names = [value.name or "" for value in graph.model.graph.outputs]
    said = ""
    for rows, size in _plans(graph.inputs, batch, tokens):
        generator = torch.Generator().manual_seed(seed)
        made = {each.name: _make(each, rows, size, limits.get(each.name), generator) for each in graph.inputs}
        try:
            session.run(names, {name: to_numpy(value) for name, value in made.items()})
        except ModelError as error:
            said = str(error)
            continue
        return made
    raise DataError(f"no made-up input runs through the model; give data. {said}")


def _plans(inputs: tuple[Input, ...], batch: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (first axis, other axes) to try; one plan where every size is fixed."""
    image = any(each.shape is not None and len(each.shape) >= 4 for each in inputs)
    sizes = dict.fromkeys((*IMAGE_SIZES, tokens) if image else (tokens, *OTHER_SIZES))
    if all(each.shape is not None and all(isinstance(size, int) for size in each.shape) for each in inputs):
        sizes = dict.fromkeys([tokens])
    for rows in dict.fromkeys((batch, 1)):
        for size in sizes:
            yield rows, size


def _make(each: Input, rows: int, size: int, limit: int | None, generator: torch.Generator) -> Any:
    shape = [_pick(each, axis, rows, size) for axis in range(len(each.shape or ()))]
    name = each.name.lower()
    if each.kind == "string":
        return np.full(shape, "text", dtype=object)
    if each.dtype is None:
        raise DataError(f"input {each.name!r} is a {each.kind}; no value can be made up for it, give data")
    if each.dtype == torch.bool:
        return torch.zeros(shape, dtype=torch.bool)
    if "mask" in name:
        return torch.ones(shape, dtype=each.dtype)
    if limit is not None:
        return torch.randint(0, limit, shape, generator=generator).to(each.dtype)
    if each.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(each.dtype)
    if not shape or "rate" in name or name == "sr":
        return torch.full(shape, SAMPLE_RATE, dtype=each.dtype)
    if "position" in name:
        return torch.arange(shape[-1]).expand(shape).to(each.dtype).contiguous()
    if "len" in name:
        return torch.full(shape, size, dtype=each.dtype)
    return _integers(each.dtype, shape, generator)


def _integers(dtype: torch.dtype, shape: list[int], generator: torch.Generator) -> Tensor:
    high = 256 if dtype == torch.uint8 else 2  # bytes are pixels; other unknown integers stay small
    return torch.randint(0, high, shape, generator=generator).to(dtype)


def _pick(each: Input, axis: int, rows: int, size: int) -> int:
    """Choose the size of one axis; (fixed, unknown, fixed) is a recurrent state, whose middle axis is the batch."""
    assert each.shape is not None
    wanted = each.shape[axis]
    if isinstance(wanted, int):
        return wanted
    if isinstance(wanted, str) and "batch" in wanted.lower():
        return rows
    state = len(each.shape) == 3 and isinstance(each.shape[0], int) and isinstance(each.shape[2], int)
    if axis == 0 and not (isinstance(wanted, str) and any(word in wanted.lower() for word in ("seq", "len", "time"))):
        return rows
    return rows if state and axis == 1 else size


def _limit(value: onnx_ir.Value, constants: Constants) -> int | None:
    """Return the size of the smallest table that `value` indexes, or None where it is no index."""
    found: list[int] = []
    seen: set[onnx_ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            first = node.inputs[0]
            if node.op_type == "Gather" and index == 1 and first in constants and first is not None:
                found += stored_shape(first, constants)[:1]
            elif node.op_type == "OneHot" and index == 0 and node.inputs[1] in constants and node.inputs[1] is not None:
                found.append(int(constants.tensor(node.inputs[1]).numpy().reshape(-1)[0]))
            elif node.op_type in _ON_THE_WAY and index == 0:
                stack.extend(node.outputs)
    return min((size for size in found if size > 0), default=None)
