"""Which pruned weights TensorRT's sparse tactics can take (builder flag SPARSE_WEIGHTS).

NVIDIA's developer guide asks for two zeros among every four consecutive input channels, for every output channel and
kernel tap; group convolutions have no sparse tactic. A tactic still has to win TensorRT's own timing to be used.
"""

from torch import Tensor

from sparsify_compiler.graph import ConvLayout, Layout

GROUP = 4
MOST_KEPT = 2
ALIGNMENT = 32
"""Sparse tensor cores reduce over 32 float16 inputs in one instruction; a shorter reduction is padded or refused."""

ELIGIBLE = "eligible for TensorRT sparse tactics"


def tensorrt_refusal(keep: Tensor, run: int, layout: Layout | None) -> str | None:
    """Say why TensorRT cannot take the zeros of `keep` (groups, out, in) bool, or None.

    `run` columns share one kernel tap.
    """
    if isinstance(layout, ConvLayout) and layout.groups > 1:
        return f"TensorRT has no sparse tactic for convolutions in {layout.groups} groups"
    if run % ALIGNMENT:
        return f"TensorRT's sparse tactics need input channels in multiples of {ALIGNMENT}; found {run}"
    broken = int((keep.reshape(-1, GROUP).sum(dim=1) > MOST_KEPT).sum())
    if broken:
        return (
            f"not 2:4 along the input channels: {broken} of {keep.numel() // GROUP} groups keep more than {MOST_KEPT}"
        )
    return None
