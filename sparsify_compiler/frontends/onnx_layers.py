"""ONNX layers in PyTorch, differentiable: products, convolutions, pooling, normalisation, softmax."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify_compiler.frontends.onnx_operators import Call, Operator
from sparsify_compiler.frontends.onnx_products import same_sides


def _gemm(call: Call) -> Tensor:
    left = call.x.t() if call.get("transA", 0) else call.x
    right = call.given(1).t() if call.get("transB", 0) else call.given(1)
    y = left @ right
    y = y if call.get("alpha", 1.0) == 1 else y * call.get("alpha", 1.0)
    bias = call.maybe(2)
    return y if bias is None else y + (bias if call.get("beta", 1.0) == 1 else bias * call.get("beta", 1.0))


def _einsum(call: Call) -> Tensor:
    found: Tensor = torch.einsum(call.attributes["equation"], *(each for each in call.inputs if each is not None))
    return found


def _window(call: Call, kernel: Sequence[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Return strides, dilations, and (begin, end) of the padding of every axis."""
    axes = len(kernel)
    strides, dilations = list(call.get("strides", [1] * axes)), list(call.get("dilations", [1] * axes))
    mode = call.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        flat = list(call.get("pads", [0] * (2 * axes)))
        return strides, dilations, list(zip(flat[:axes], flat[axes:], strict=True))
    if mode == "VALID":
        return strides, dilations, [(0, 0)] * axes
    sizes = zip(call.x.shape[2:], kernel, strides, dilations, strict=True)
    totals = [max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0) for size, k, s, d in sizes]
    return strides, dilations, [same_sides(total, mode) for total in totals]


def _padded(x: Tensor, sides: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [side for pair in reversed(sides) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(call: Call) -> Tensor:
    weight = call.given(1)
    strides, dilations, sides = _window(call, weight.shape[2:])
    run: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return run(_padded(call.x, sides), weight, call.maybe(2), strides, 0, dilations, call.get("group", 1))


def _conv_transpose(call: Call) -> Tensor:
    weight = call.given(1)
    axes = weight.dim() - 2
    if call.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in call.attributes:
        raise NotImplementedError("ConvTranspose with auto_pad or output_shape")
    flat = list(call.get("pads", [0] * (2 * axes)))
    extra = list(call.get("output_padding", [0] * axes))
    strides, dilations = call.get("strides", [1] * axes), call.get("dilations", [1] * axes)
    run: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    y = run(call.x, weight, call.maybe(2), strides, 0, 0, call.get("group", 1), dilations)
    return _padded(y, [(-begin, more - end) for begin, end, more in zip(flat[:axes], flat[axes:], extra, strict=True)])


def _ceiled(call: Call, kernel: Sequence[int]) -> tuple[list[int], list[int], list[tuple[int, int]], list[int]]:
    """Return strides, dilations, padding, and what `ceil_mode` adds behind each axis."""
    strides, dilations, sides = _window(call, kernel)
    if not call.get("ceil_mode", 0):
        return strides, dilations, sides, [0] * len(kernel)
    more = []
    for size, k, s, d, (begin, end) in zip(call.x.shape[2:], kernel, strides, dilations, sides, strict=True):
        span = size + begin + end - d * (k - 1) - 1
        count = -(-span // s)
        count -= count * s >= size + begin  # a window must begin inside
        more.append(max(count * s - span, 0))
    return strides, dilations, sides, more


def _max_pool(call: Call) -> Tensor:
    kernel = call.attributes["kernel_shape"]
    if call.outputs > 1 or call.get("storage_order", 0):
        raise NotImplementedError("MaxPool with indices")
    strides, dilations, sides, more = _ceiled(call, kernel)
    run: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    whole = [(begin, end + extra) for (begin, end), extra in zip(sides, more, strict=True)]
    return run(_padded(call.x, whole, -math.inf), tuple(kernel), tuple(strides), 0, tuple(dilations))


def _average_pool(call: Call) -> Tensor:
    kernel = call.attributes["kernel_shape"]
    strides, dilations, sides, more = _ceiled(call, kernel)
    if any(dilation != 1 for dilation in dilations):
        raise NotImplementedError("AveragePool with dilations")
    run: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    ends = [(0, extra) for extra in more]
    counted = torch.ones_like(call.x[:1, :1])
    x, ones = _padded(call.x, sides), _padded(counted, sides, float(call.get("count_include_pad", 0)))
    sums, counts = (run(_padded(each, ends), tuple(kernel), tuple(strides), 0) for each in (x, ones))
    return sums / counts


def _layer_norm(call: Call) -> tuple[Tensor, ...]:
    axis, epsilon = call.get("axis", -1) % call.x.dim(), call.get("epsilon", 1e-5)
    bias = call.maybe(2)
    y = F.layer_norm(call.x, call.x.shape[axis:], None, None, epsilon) * call.given(1)
    y = y if bias is None else y + bias
    if call.outputs == 1:
        return (y,)
    axes = tuple(range(axis, call.x.dim()))
    variance, mean = torch.var_mean(call.x, axes, correction=0, keepdim=True)
    return y, mean, (variance + epsilon).rsqrt()


def _rms_norm(call: Call) -> Tensor:
    axis = call.get("axis", -1) % call.x.dim()
    return F.rms_norm(call.x, call.x.shape[axis:], None, call.get("epsilon", 1e-5)) * call.given(1)


def _batch_norm(call: Call) -> Tensor:
    if call.outputs > 1 or call.get("training_mode", 0):
        raise NotImplementedError("BatchNormalization in training mode")
    scale, bias, mean, variance = (call.given(index) for index in range(1, 5))
    return F.batch_norm(call.x, mean, variance, scale, bias, False, 0.0, call.get("epsilon", 1e-5))


def _instance_norm(call: Call) -> Tensor:
    return F.instance_norm(call.x, None, None, call.given(1), call.given(2), True, 0.0, call.get("epsilon", 1e-5))


def _group_norm(call: Call) -> Tensor:
    groups, scale, bias = call.attributes["num_groups"], call.given(1), call.given(2)
    if call.opset < 21:  # one value a group, not a channel
        scale, bias = (each.repeat_interleave(call.x.shape[1] // groups) for each in (scale, bias))
    return F.group_norm(call.x, groups, scale, bias, call.get("epsilon", 1e-5))


def _response_norm(call: Call) -> Tensor:
    size = call.attributes["size"]
    if size % 2 == 0:
        raise NotImplementedError("LRN over an even number of channels")
    alpha, beta, bias = call.get("alpha", 1e-4), call.get("beta", 0.75), call.get("bias", 1.0)
    return F.local_response_norm(call.x, size, alpha, beta, bias)


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        if call.opset >= 13:
            return function(call.x, call.get("axis", -1))
        axis = call.get("axis", 1) % max(call.x.dim(), 1)
        return function(call.x.flatten(axis), axis).reshape(call.x.shape)  # older versions take all axes from `axis` on

    return run


def _pool_all(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    return lambda call: function(call.x, tuple(range(2, call.x.dim())), True)


LAYERS: Mapping[str, Operator] = {
    "MatMul": lambda call: call.x @ call.given(1),
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _pool_all(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "GlobalMaxPool": _pool_all(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LRN": _response_norm,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
}
"""Operators of the standard domain by name."""
