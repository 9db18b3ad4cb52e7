"""Recognise attention under a causal mask by the mask's values, and run it without the mask.

Tracing turns a model's causal attention into attention under a tensor of booleans. Kernels that are told `is_causal`
skip the half of the products that such a mask hides, which a tensor does not let them do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from sparsify_compiler.graph import Values

ATTENTION = (functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
"""The operations that know the word; the signature of the second is that of the first."""

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""What stands at their first places."""


class Causal:
    """Stands among a graph's values for a mask that shows every query its own place and those before it."""


CAUSAL = Causal()
"""The only one."""


def causal_masks(module: fx.GraphModule, constants: frozenset[str]) -> frozenset[str]:
    """Return which of the nodes named in `constants` are read by others of the graph, and only as attention's mask."""
    found = set()
    for node in module.graph.nodes:
        if node.name in constants:
            readers = [user for user in node.users if user.name not in constants]
            if readers and all(_is_mask_of(node, user) for user in readers):
                found.add(node.name)
    return frozenset(found)


def drop_causal_masks(values: Values, masks: frozenset[str]) -> Values:
    """Return `values` with `CAUSAL` for those named in `masks` that are causal."""
    return {name: CAUSAL if name in masks and is_causal(value) else value for name, value in values.items()}


def is_causal(mask: object) -> bool:
    """Say whether `mask` (..., queries, keys) shows query i the keys 0 to i, as many keys as queries, and those alone.

    A mask is bool, True where a key is seen, or of floating point and added to the scores: 0 where a key is seen, and
    where it is not, minus infinity or the least number of its dtype, after either of which softmax gives exactly 0.
    """
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    earlier = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == earlier).all())
    least = torch.finfo(mask.dtype).min
    return bool(torch.where(earlier, mask == 0, mask <= least).all())


def is_masked(arguments: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Say whether `CAUSAL` is the mask among the arguments of a call."""
    return any(value is CAUSAL for value in (*arguments, *named.values()))


def attend_causally(node: fx.Node, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Run the attention of `node` with `is_causal` in the place of the mask `CAUSAL`."""
    given = {**dict(zip(ARGUMENTS, arguments, strict=False)), **named, "attn_mask": None, "is_causal": True}
    return node.target(**given)  # type: ignore[operator]  # fx: a callable here


def _is_mask_of(source: fx.Node, node: fx.Node) -> bool:
    """Say whether `node` is an attention, not causal by its own word, with `source` as its mask and nowhere else."""
    if node.op != "call_function" or node.target not in ATTENTION or len(node.args) > len(ARGUMENTS):
        return False
    given = {**dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}
    alone = list(given.values()).count(source) == 1
    return given.get("attn_mask") is source and alone and not given.get("is_causal", False)
