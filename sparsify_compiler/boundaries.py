"""What is alive between two segments of a graph, batch by batch: a model walked front to back.

Values wait for the next segment on the GPU that made them while they take a modest part of it, else on the host: up and
down again, the 128 windows of 2,048 tokens of a model of 576 channels are 1.8 GB of copies for every segment.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.device_memory import free_bytes
from sparsify_compiler.errors import CalibrationError, first_line
from sparsify_compiler.graph import Graph, Observer, Values

GPU_SHARE = 4
"""Of its free memory a GPU gives one part in so many to waiting values; the rest is for segments and statistics."""


class Boundaries:
    """The `values` of every calibration batch before the segment that comes next; at first, the model's inputs.

    `host_bytes` is the most that a GPU's values took on the host at one cut, for want of room; 0 without a GPU.
    """

    def __init__(self, graph: Graph, batches: Sequence[Batch]) -> None:
        self._graph = graph
        room = _Room(())
        self.values = [room.hold(graph.enter(batch)) for batch in batches]
        self.host_bytes = room.host_bytes

    def __copy__(self) -> "Boundaries":
        """Return boundaries of their own that share the tensors of now: none is ever written."""
        other = Boundaries(self._graph, ())
        other.values, other.host_bytes = list(self.values), self.host_bytes
        return other

    def run(
        self, index: int, number: int, observe: Observer | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> Values:
        """Run segment `index` on what batch `number` left before it, without gradients, and return what is alive after.

        `observe` and `weights` as in `Graph.run_segment`.

        Raises:
            CalibrationError: the batch does not fit the model.
        """
        try:
            with torch.no_grad():
                return self._graph.run_segment(index, self.values[number], observe, weights)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:  # what torch raises for sizes and ids that do not fit
            raise CalibrationError(
                f"calibration batch {number} cannot be run through {self._graph.segments[index].name}: "
                f"{first_line(error)}; every batch must fit the model, in sizes and in vocabulary"
            ) from error

    def advance(
        self,
        index: int,
        weights: Mapping[str, Tensor] | None = None,
        observe: Callable[[int], Observer] | None = None,
    ) -> None:
        """Replace every batch's values by those after segment `index`, through `weights` or those of now.

        `observe` makes an observer for the batch of a number.
        """
        room = _Room(self.values)
        for number in range(len(self.values)):
            watch = observe(number) if observe is not None else None
            self.values[number] = room.hold(self.run(index, number, watch, weights))
        self.host_bytes = max(self.host_bytes, room.host_bytes)


def run_graph(graph: Graph, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
    """Run the whole graph on one batch, on its own device, and return its outputs.

    `weights` (groups, out, in) by site name stand in for the graph's own. Gradients are recorded as the caller says.
    """
    values = graph.enter(batch)
    for segment in graph.segments:
        own = {name: weights[name] for name in segment.sites if name in weights} if weights else None
        values = graph.run_segment(segment.index, values, weights=own)
    return graph.outputs(values)


def boundary_bytes(graph: Graph, batch: Batch) -> int:
    """Return the most bytes alive before or after the first segment; later boundaries of a deep network are alike."""
    first = Boundaries(graph, [batch])
    sizes = [values_bytes(first.values[0])]
    if len(graph.segments) > 1:
        first.advance(0)
        sizes.append(values_bytes(first.values[0]))
    return max(sizes)


def values_bytes(values: Values) -> int:
    """Count the bytes of the tensors among `values`."""
    return sum(v.numel() * v.element_size() for v in values.values() if isinstance(v, Tensor))


class _Room:
    """Where the values of one cut wait. What a GPU may hold is asked once a cut; `held` is freed as they come in.

    `host_bytes` counts what found no room on its GPU.
    """

    def __init__(self, held: Iterable[Values]) -> None:
        self._held: dict[torch.device, int] = {}
        for value in (value for values in held for value in values.values() if isinstance(value, Tensor)):
            self._held[value.device] = self._held.get(value.device, 0) + value.nbytes
        self._left: dict[torch.device, int | None] = {}
        self.host_bytes = 0

    def hold(self, values: Values) -> Values:
        return {name: self._hold(value) if isinstance(value, Tensor) else value for name, value in values.items()}

    def _hold(self, value: Tensor) -> Tensor:
        device = value.device
        if device not in self._left:
            free = free_bytes(device)
            self._left[device] = None if free is None else (free + self._held.get(device, 0)) // GPU_SHARE
        left = self._left[device]
        if left is None:
            return value.cpu()
        if value.nbytes <= left:
            self._left[device] = left - value.nbytes
            # A view would keep all of what it is a part of.
            return value if value.untyped_storage().nbytes() <= value.nbytes else value.clone()
        self.host_bytes += value.nbytes
        return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value)
