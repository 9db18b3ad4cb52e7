"""The thin protocol over a traced model: its sites, its segments, running one, reading and writing weights.

Two implementations: `frontends.torch.TorchGraph` over torch.fx and `frontends.onnx.OnnxGraph` over onnx_ir.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparsify_compiler.channels import ChannelMap, Channels

Values = dict[str, Any]
"""Live values by name: tensors, and the integers that symbolic sizes became."""

Observer = Callable[[str, Tensor], None]
"""Called with (`Site.reads`, the tensor read) each time a segment run reaches a prunable site's input."""


@dataclass(frozen=True)
class MatmulLayout:
    """A product with a constant. `transposed`: stored (in, out). `input_axis`: the axis of x that is reduced."""

    transposed: bool
    input_axis: int = -1


@dataclass(frozen=True)
class ConvLayout:
    """A convolution, 1 to 3 spatial axes, channels first. `padding` is (begin, end) per axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


Layout = MatmulLayout | ConvLayout


@dataclass(frozen=True)
class Site:
    """One weight of the graph that a product reads, prunable or not.

    `name` is the user's; `kind` the user's word (Linear, Conv2d, MatMul, Gemm, ...); `parameter` the weight's own
    name in the model. The pruning problem is `groups` times (out, in); `run` columns share one kernel tap.
    `reads` is equal for sites that see the same input rows, so that they share one Gram matrix.
    `refusal` says why it cannot be pruned; `dense_by_default` why it is only pruned when a rule names it.
    `calls` counts the places that use the weight; `shape` is the weight's own shape in the model.
    """

    name: str
    kind: str
    parameter: str
    shape: tuple[int, ...]
    out: int
    in_: int
    groups: int
    run: int
    layout: Layout | None
    reads: str
    segment: int
    refusal: str | None = None
    dense_by_default: str | None = None
    calls: int = 1

    def problem_names(self) -> tuple[str, ...]:
        """Name the site's pruning problems, one a group."""
        if self.groups == 1:
            return (self.name,)
        return tuple(f"{self.name}[group {group}]" for group in range(self.groups))


@dataclass(frozen=True)
class Segment:
    """A run of nodes between two cuts. `needs` are the values that must be alive to run it."""

    index: int
    name: str
    sites: tuple[str, ...]
    needs: tuple[str, ...]


class Graph(Protocol):
    """A traced model. Weights are replaced, never written in place: the user's model stays as it was."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site in execution order, refused ones included."""
        ...

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in execution order; together they are the whole graph."""
        ...

    def weight(self, site: Site) -> Tensor:
        """Return a float32 copy of the weight, (groups, out, in)."""
        ...

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Replace the weight by `weight` (groups, out, in), cast to the model's dtype."""
        ...

    def enter(self, batch: Any) -> Values:
        """Turn one user batch into the values alive before segment 0.

        Raises:
            DataError: names, shapes or dtypes do not fit the model's inputs.
        """
        ...

    def run_segment(
        self,
        index: int,
        values: Values,
        observe: Observer | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Values:
        """Run one segment and return the values alive after it. `values` is not modified.

        `weights` maps site names to (groups, out, in) tensors used instead of the model's own, differentiably.
        """
        ...

    def outputs(self, values: Values) -> tuple[Tensor, ...]:
        """Return the model's output tensors from the values alive after the last segment."""
        ...

    def exact_outputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the output tensors for one batch, computed in float32 where the model has half precision.

        For what rounding must not hide; not what the model returns. An ONNX file runs as it is.
        """
        ...

    def channels(self) -> ChannelMap:
        """Find the sites' input channels whose order is free; see `channels`."""
        ...

    def reorder(self, channels: Channels, orders: Tensor) -> None:
        """Put channels in another order, `Member.reordered` in all of their parameters; the function stays the same."""
        ...

    def contents(self) -> Iterator[object]:
        """Yield all that decides what the graph computes: names and current tensors or bytes, one at a time."""
        ...

    def text(self) -> str:
        """Print the graph: segments, nodes, sites."""
        ...


class DifferentiableGraph(Graph, Protocol):
    """A graph whose segments PyTorch runs, so that gradients flow through them."""

    def run_segment(
        self,
        index: int,
        values: Values,
        observe: Observer | None = None,
        weights: Mapping[str, Tensor] | None = None,
        emit: Observer | None = None,
    ) -> Values:
        """See `Graph.run_segment`. `emit` is called with (`Site.name`, the product's output) after every product."""
        ...


@dataclass(frozen=True)
class Step:
    """One node as the cutter sees it: values read and written, the weight it holds, the repeated module it is in.

    `block` is the outermost numbered module of the node, such as "model.layers.3", or None outside all of them.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    parameter: str | None = None
    block: str | None = None


def cut(steps: Sequence[Step], most_live: int = 2) -> list[int]:
    """Choose where to cut a list of steps into segments: positions p such that a segment ends before step p.

    A cut needs few live values: at most `most_live` may cross, not counting values from before the first site
    (masks, rotary tables, the model's inputs). Between numbered modules where the names tell them, else wherever the
    crossing is least and a site lies on either side. A weight used twice never has a cut between its uses.
    """
    with_site = [i for i, step in enumerate(steps) if step.parameter is not None]
    if not with_site:
        return []
    first_site = with_site[0]
    crossing = _crossing(steps, first_site)
    forbidden = _inside_shared(steps)
    named = len({step.block for step in steps if step.block}) >= 2
    cuts: list[int] = []
    allowed = [p for p in range(1, len(steps)) if p not in forbidden and crossing[p] <= most_live]
    if named:
        allowed = [p for p in allowed if _leaves_block(steps, p)]
    else:
        between = [p for p in allowed if first_site < p <= with_site[-1]]
        least = min((crossing[p] for p in between), default=0)
        allowed = [p for p in between if crossing[p] <= least]
    start = 0
    for p in allowed:
        if any(start <= i < p for i in with_site) and any(i >= p for i in with_site):
            cuts.append(p)
            start = p
    return cuts


def number_blocks(paths: Sequence[str | None], has_site: Sequence[bool]) -> list[str | None]:
    """Name the repeated module each node is in: its dotted path up to a number, such as "model.layers.3".

    The shallowest numbering that divides the sites is used: a wrapper whose one numbered child holds nearly every
    site ("0.encoder.layer.3") is looked through. None for nodes outside every numbered module.
    """
    depth = 1
    while True:
        named = [_to_number(path, depth) for path in paths]
        of_sites = [name for name, site in zip(named, has_site, strict=True) if site and name is not None]
        largest = max((of_sites.count(name) for name in set(of_sites)), default=0)
        deeper = [_to_number(path, depth + 1) for path in paths]
        if largest <= len(of_sites) * 0.6 or deeper == named:
            return named
        depth += 1


def _to_number(path: str | None, depth: int) -> str | None:
    """Cut a dotted path after its `depth`-th number, or after its last where there are fewer."""
    parts = (path or "").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[min(depth, len(numbers)) - 1] + 1]) if numbers else None


def _leaves_block(steps: Sequence[Step], position: int) -> bool:
    before = next((s.block for s in reversed(steps[:position]) if s.block), None)
    return steps[position].block != before and before is not None


def _crossing(steps: Sequence[Step], first_site: int) -> list[int]:
    """Count per position the values written from the first site on before it and read at or after it."""
    last_read: dict[str, int] = {}
    for i, step in enumerate(steps):
        for name in step.reads:
            last_read[name] = i
    change = [0] * (len(steps) + 2)
    for i, step in enumerate(steps):
        if i >= first_site:
            for name in step.writes:
                change[i + 1] += 1
                change[max(last_read.get(name, i), i) + 1] -= 1
    crossing, live = [], 0
    for i in range(len(steps) + 1):
        live += change[i]
        crossing.append(live)
    return crossing


def _inside_shared(steps: Sequence[Step]) -> set[int]:
    first: dict[str, int] = {}
    forbidden: set[int] = set()
    for i, step in enumerate(steps):
        if step.parameter is not None:
            forbidden.update(range(first.setdefault(step.parameter, i) + 1, i + 1))
    return forbidden
