"""What improves a segment between its pruning and the next one's: what it is given and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.checkpoint import SavedSite
from sparsify_compiler.graph import Graph, Values


@dataclass(frozen=True)
class PrunedSegment:
    """Segment `index` when its sites were pruned: the graph has their weights, and those of the segments before.

    `inputs` are the values alive before it in the pruned model, `targets` those after it in the dense one, for every
    batch, where `boundaries` left them.
    """

    graph: Graph
    index: int
    sites: Mapping[str, SavedSite]
    batches: Sequence[Batch]
    inputs: Sequence[Values]
    targets: Sequence[Values]


@dataclass(frozen=True)
class Refined:
    """Weights (groups, out, in) float32 of sites of a segment, zero where they were, and what to record of it."""

    weights: Mapping[str, Tensor]
    record: Mapping[str, Any]


Refine = Callable[[PrunedSegment], Refined]
"""Improves the kept weights of a segment before the next one is pruned through it."""
