"""ONNX operators in PyTorch, differentiable: those that move, select and cast values, and those that make shapes."""

import math
from collections.abc import Mapping

import onnx_ir
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify_compiler.frontends.onnx_operators import Call, Operator

DTYPES = {
    onnx_ir.DataType.FLOAT: torch.float32,
    onnx_ir.DataType.DOUBLE: torch.float64,
    onnx_ir.DataType.FLOAT16: torch.float16,
    onnx_ir.DataType.BFLOAT16: torch.bfloat16,
    onnx_ir.DataType.INT64: torch.int64,
    onnx_ir.DataType.INT32: torch.int32,
    onnx_ir.DataType.INT16: torch.int16,
    onnx_ir.DataType.INT8: torch.int8,
    onnx_ir.DataType.UINT8: torch.uint8,
    onnx_ir.DataType.BOOL: torch.bool,
}
"""What tensors of a type are in PyTorch; through other types no gradient flows."""


def _reshape(call: Call) -> Tensor:
    sizes = call.list("shape", 1) or []
    if not call.get("allowzero", 0):
        sizes = [call.x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return call.x.reshape(sizes)


def _flatten(call: Call) -> Tensor:
    axis = call.get("axis", 1)
    first = math.prod(call.x.shape[: axis + call.x.dim() if axis < 0 else axis])
    return call.x.reshape(first, -1) if call.x.numel() else call.x.reshape(first, 0)


def _transpose(call: Call) -> Tensor:
    return call.x.permute(*call.get("perm", reversed(range(call.x.dim()))))


def _squeeze(call: Call) -> Tensor:
    axes = call.list("axes", 1)
    return call.x.squeeze() if axes is None else call.x.squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    axes = call.list("axes", 1) or []
    x, rank = call.x, call.x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(call: Call) -> Tensor:
    return torch.cat([call.given(index) for index in range(len(call.inputs))], call.attributes["axis"])


def _split(call: Call) -> tuple[Tensor, ...]:
    axis, sizes = call.get("axis", 0), call.list("split", 1)
    if sizes is None:
        each = -(-call.x.shape[axis] // call.get("num_outputs", call.outputs))
        return torch.split(call.x, each, axis)
    return torch.split(call.x, sizes, axis)


def _slice(call: Call) -> Tensor:
    starts, ends = call.list("starts", 1) or [], call.list("ends", 2) or []
    axes = call.list("axes", 3) or list(range(len(starts)))
    steps = call.list("steps", 4) or [1] * len(starts)
    x = call.x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(x.shape[axis])[start:end:step]
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def _gather(call: Call) -> Tensor:
    axis, places = call.get("axis", 0) % call.x.dim(), call.given(1).long()
    size = call.x.shape[axis]
    found = call.x.index_select(axis, torch.where(places < 0, places + size, places).flatten())
    return found.reshape(*call.x.shape[:axis], *places.shape, *call.x.shape[axis + 1 :])


def _gather_elements(call: Call) -> Tensor:
    axis, places = call.get("axis", 0), call.given(1).long()
    return call.x.gather(axis, torch.where(places < 0, places + call.x.shape[axis], places))


def _gather_places(call: Call) -> Tensor:
    x, places, batch = call.x, call.given(1).long(), call.get("batch_dims", 0)
    shape = places.shape[:batch]
    ahead = [
        torch.arange(size, device=x.device).reshape([size if other == axis else 1 for other in range(places.dim() - 1)])
        for axis, size in enumerate(shape)
    ]
    return x[(*ahead, *places.unbind(-1))]


def _expand(call: Call) -> Tensor:
    asked = call.x.new_empty(1).expand(call.list("shape", 1) or [])  # takes part in broadcasting by its shape alone
    return torch.broadcast_tensors(call.x, asked)[0]  # type: ignore[no-untyped-call, no-any-return]


def _pad(call: Call) -> Tensor:
    sides, rank = call.list("pads", 1) or [], call.x.dim()
    axes = [axis % rank for axis in call.list("axes", 3) or range(rank)]
    value = call.get("value", 0.0) if call.maybe(2) is None else call.given(2).item()
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        call.get("mode", "constant")
    ]
    begin = dict(zip(axes, sides[: len(axes)], strict=True))
    end = dict(zip(axes, sides[len(axes) :], strict=True))
    flat = [side for axis in reversed(range(rank)) for side in (begin.get(axis, 0), end.get(axis, 0))]
    if mode == "constant":
        return F.pad(call.x, flat, value=value)
    while flat and flat[-2:] == [0, 0] and len(flat) > 2 * max(rank - 2, 1):
        flat = flat[:-2]  # PyTorch's other modes take the last axes only
    return F.pad(call.x, flat, mode=mode)


def _to_depth(call: Call) -> Tensor:
    size, (n, c, h, w) = call.attributes["blocksize"], call.x.shape
    x = call.x.reshape(n, c, h // size, size, w // size, size)
    order = (0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.permute(order).reshape(n, c * size * size, h // size, w // size)


def _to_space(call: Call) -> Tensor:
    size, (n, c, h, w) = call.attributes["blocksize"], call.x.shape
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(call.x, size)
    x = call.x.reshape(n, size, size, c // size**2, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(n, c // size**2, h * size, w * size)


def _shape(call: Call) -> Tensor:
    return torch.tensor(list(call.x.shape)[call.get("start", 0) : call.get("end", None)], dtype=torch.int64)


def _constant_of_shape(call: Call) -> Tensor:
    value = call.get("value", None)
    filler = torch.zeros(1) if value is None else torch.from_numpy(value.numpy().copy())
    return filler.reshape(()).expand([int(size) for size in call.x.tolist()])


def _range(call: Call) -> Tensor:
    start, end, step = (call.given(index).item() for index in range(3))
    return torch.arange(start, end, step, dtype=call.x.dtype, device=call.x.device)


def _trilu(call: Call) -> Tensor:
    k = 0 if call.maybe(1) is None else int(call.given(1).item())
    return call.x.triu(k) if call.get("upper", 1) else call.x.tril(k)


def _cumulate(call: Call) -> Tensor:
    axis, x = int(call.given(1).item()), call.x
    x = x.flip(axis) if call.get("reverse", 0) else x
    total = x.cumsum(axis, dtype=x.dtype)
    total = total - x if call.get("exclusive", 0) else total
    return total.flip(axis) if call.get("reverse", 0) else total


def _cast(call: Call) -> Tensor:
    wanted = onnx_ir.DataType(call.attributes["to"])
    if wanted not in DTYPES:
        raise NotImplementedError(f"Cast to {wanted.name}")
    return call.x.to(DTYPES[wanted])


SHAPES: Mapping[str, Operator] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_places,
    "Expand": _expand,
    "Tile": lambda call: call.x.repeat([int(times) for times in call.given(1).tolist()]),
    "Pad": _pad,
    "SpaceToDepth": _to_depth,
    "DepthToSpace": _to_space,
    "Shape": _shape,
    "Size": lambda call: torch.tensor(call.x.numel(), dtype=torch.int64),
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Trilu": _trilu,
    "CumSum": _cumulate,
    "Cast": _cast,
    "CastLike": lambda call: call.x.to(call.given(1).dtype),
}
"""Operators of the standard domain by name."""
