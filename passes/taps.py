"""Watch the sites of a graph while it is differentiated: what each reads, and the gradient by what it makes of it."""

from collections.abc import Callable, Mapping

from torch import Tensor

from sparsify_compiler.graph import Site

Tap = Callable[[str, Tensor, Tensor], None]
"""Called with a site's name, what it read, and the gradient by its product's output, both as the graph has them."""


class Taps:
    """The observers of one `backpropagate`: `read` is its `observe`, `made` its `emit`. Only `sites` are watched.

    `tap` is called once a use of a site's weight, never where no gradient arrives. What sites read is let go when the
    gradients of their segment begin to arrive, so that one segment's is held at a time.
    """

    def __init__(self, sites: Mapping[str, Site], tap: Tap) -> None:
        self._sites = sites
        self._tap = tap
        self._read: dict[str, Tensor] = {}

    def read(self, reads: str, x: Tensor) -> None:
        """See `graph.Observer`."""
        self._read[reads] = x.detach()

    def made(self, name: str, y: Tensor) -> None:
        """See `graph.DifferentiableGraph`."""
        if name not in self._sites:
            return
        x = self._read[self._sites[name].reads]

        def arrived(gradient: Tensor) -> None:
            self._read.clear()
            self._tap(name, x, gradient.detach())

        y.register_hook(arrived)  # type: ignore[no-untyped-call]
