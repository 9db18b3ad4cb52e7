"""What is alive between two segments of a graph, batch by batch, on the host: a model walked front to back."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import CalibrationError, first_line
from sparsify_compiler.graph import Graph, Observer, Values


class Boundaries:
    """The `values` of every calibration batch before the segment that comes next; at first, the model's inputs."""

    def __init__(self, graph: Graph, batches: Sequence[Batch]) -> None:
        self._graph = graph
        self.values = [_host(graph.enter(batch)) for batch in batches]

    def __copy__(self) -> "Boundaries":
        """Return boundaries of their own that share the tensors of now: none is ever written."""
        other = Boundaries(self._graph, ())
        other.values = list(self.values)
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
        for number in range(len(self.values)):
            watch = observe(number) if observe is not None else None
            self.values[number] = _host(self.run(index, number, watch, weights))


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


def _host(values: Values) -> Values:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
