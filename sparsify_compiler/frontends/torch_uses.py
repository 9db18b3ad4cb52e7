"""Who reads a parameter or a result in a torch.fx graph: tied names, other readers, the output head."""

from collections.abc import Iterable

import torch
from torch import fx, nn

from sparsify_compiler.frontends.torch_run import dotted
from sparsify_compiler.frontends.torch_sites import SAME, TRANSPOSES, Product

RECORDED = frozenset(
    (
        *("linear", "addmm", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention", "softmax"),
        *("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"),
        *("relu", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh"),
        *("leaky_relu", "elu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    )
)
"""Operations that count as one step of a slice; the rest (views, sums, casts) come along uncounted."""

RESHAPING = frozenset(
    (
        *("view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "slice", "select"),
        *("to", "to_copy", "clone", "contiguous", "alias", "detach", "float", "half", "expand", "getitem"),
        *("softmax", "log_softmax", "sigmoid", "argmax"),
    )
)
"""Operations between an output head and the model's output."""


def operation_name(node: fx.Node) -> str:
    """Return the bare name of the operation, `linear` for aten.linear.default and for a Linear module."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        kind = type(dotted(owner, str(node.target))).__name__ if owner is not None else str(node.target)
        return {"Linear": "linear", "BatchNorm2d": "batch_norm", "LayerNorm": "layer_norm"}.get(kind, kind.lower())
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket).rpartition(".")[2].strip("_")
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def parameter_aliases(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map every parameter and buffer name to all names of the same storage, itself among them."""
    by_place: dict[tuple[object, ...], list[str]] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (id(tensor),)
        by_place.setdefault(place, []).append(name)
    return {name: tuple(names) for names in by_place.values() for name in names}


def other_readers(
    module: fx.GraphModule, products: dict[fx.Node, Product], aliases: dict[str, tuple[str, ...]]
) -> dict[str, set[str]]:
    """Per parameter, the operations other than products that read it, seen through transposes and casts."""
    readers: dict[str, set[str]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) in aliases:
            canonical = aliases[str(node.target)][0]
            for user in _through(node):
                product = products.get(user)
                if product is None or aliases.get(product.parameter, ("",))[0] != canonical:
                    readers.setdefault(canonical, set()).add(operation_name(user))
        elif node.op == "call_module" and isinstance(dotted(module, str(node.target)), nn.Embedding):
            name = f"{node.target}.weight"
            if name in aliases:
                readers.setdefault(aliases[name][0], set()).add("embedding")
    return readers


def _through(node: fx.Node) -> Iterable[fx.Node]:
    for user in node.users:
        if user.target in SAME or user.target in TRANSPOSES or operation_name(user) in ("t", "transpose", "permute"):
            yield from _through(user)
        elif user.op != "output":
            yield user


def is_head(node: fx.Node) -> bool:
    """Say whether the node's result reaches the model's outputs through reshaping and softmax alone."""
    stack: list[fx.Node] = [node]
    while stack:
        current = stack.pop()
        if not current.users:
            return False
        for user in current.users:
            if user.op == "output":
                continue
            if operation_name(user) not in RESHAPING:
                return False
            stack.append(user)
    return True
