"""An ONNX model as a `graph.Graph`: sites and segments of the user's own graph, run by ONNX Runtime.

>>> graph = load_onnx(Path("model.onnx"))                                    # doctest: +SKIP
>>> values = graph.run_segment(0, graph.enter({"input_ids": ids}))           # doctest: +SKIP
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
from torch import Tensor

from sparsify_compiler.channels import ChannelMap, Channels
from sparsify_compiler.errors import ExportError, ModelError
from sparsify_compiler.frontends.layout import to_problem
from sparsify_compiler.frontends.onnx_constants import Constants
from sparsify_compiler.frontends.onnx_file import read_model, write_model
from sparsify_compiler.frontends.onnx_inputs import Input, check_batch, list_inputs
from sparsify_compiler.frontends.onnx_rewrite import conv_bias, put_problem, shift_conv
from sparsify_compiler.frontends.onnx_runner import PieceRunner, open_model
from sparsify_compiler.frontends.onnx_segments import Piece, read_rows, split, to_numpy, to_torch
from sparsify_compiler.frontends.onnx_session import OrtSession
from sparsify_compiler.frontends.onnx_sites import FoundSite, find_sites, stored_weight
from sparsify_compiler.graph import Observer, Segment, Site, Values


def load_onnx(path: Path) -> "OnnxGraph":
    """Read an ONNX file as a graph. Nothing in it is executed; external data is read from its own folder only.

    Raises:
        ModelError: the file is missing, truncated or not ONNX, or its external data is absent or outside its folder.
    """
    return OnnxGraph(read_model(Path(path)), source=Path(path))


class OnnxGraph:
    """A `graph.Graph` over `onnx_ir.Model`. The given model and the file it came from are never modified.

    A segment is extracted from the graph with the weights it has now, and runs in its own ONNX Runtime session on the
    CPU provider; one such session is alive at a time. An initialiser that is also a graph input is a weight like any
    other and is not asked for (`enter`), as IR version 3 lists them all.
    """

    def __init__(self, model: onnx_ir.Model, source: Path | None = None) -> None:
        self._model = model.clone()
        self._source = source
        self._constants = Constants(self._model)
        found = find_sites(self._model, self._constants)
        self._pieces = split(self._model.graph, self._constants, found)
        segment_of = {node: piece.index for piece in self._pieces for node in piece.nodes}
        self._found = {
            each.site.name: replace(each, site=replace(each.site, segment=segment_of[each.owner])) for each in found
        }
        self._inputs = list_inputs(self._model.graph, self._constants)
        self._runner = PieceRunner(self._model, self._constants)
        self._whole: OrtSession | None = None

    @property
    def model(self) -> onnx_ir.Model:
        """The model with its current weights; a copy of the one that was given."""
        return self._model

    @property
    def constants(self) -> Constants:
        """The values of `model` that no run changes."""
        return self._constants

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The nodes of every segment."""
        return tuple(self._pieces)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What a batch must hold."""
        return self._inputs

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site in execution order, refused ones included."""
        return tuple(each.site for each in self._found.values())

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in execution order; together they are the whole graph."""
        return tuple(
            Segment(piece.index, piece.name, tuple(each.site.name for each in piece.sites), piece.needs)
            for piece in self._pieces
        )

    def notes(self, site: Site) -> tuple[str, ...]:
        """Say what a reader should know about pruning `site`: that it was stored quantised, or computed."""
        return self._found[site.name].notes

    def products(self, site_name: str) -> tuple[tuple[onnx_ir.Node, int], ...]:
        """Return the nodes of `model` that multiply by the site's weight, each with the weight's input index."""
        return tuple((product.node, product.index) for product in self._found[site_name].products)

    def weight_value(self, site: Site) -> onnx_ir.Value:
        """Return what the site's first product reads as its weight: after `set_weight`, an initialiser."""
        return self._found[site.name].products[0].weight

    def weight(self, site: Site) -> Tensor:
        """Return a float32 copy of the weight, (groups, out, in).

        Raises:
            ModelError: the site is refused.
        """
        product = self._prunable(site).products[0]
        assert product.layout is not None
        return to_problem(stored_weight(product, self._constants), product.layout).contiguous()

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Replace the weight by `weight` (groups, out, in), cast to the model's dtype.

        Whoever else reads the old value (an embedding, a body) keeps it; the products of the site get the new one.

        Raises:
            ModelError: the site is refused, or `weight` has another shape.
        """
        for value in put_problem(self._model, self._prunable(site), weight, self._constants):
            self._constants.add(value)
        self._forget()

    def bias(self, site: Site) -> Tensor | None:
        """Return a copy of what a convolution adds to its output channels, float32; None where a run computes it."""
        return conv_bias(self._prunable(site).products[0].node, self._constants)

    def shift(self, site: Site, amount: Tensor) -> str:
        """Add `amount` (output channels) to what a convolution computes, and say where it was put.

        In its bias; without one, in the mean of a BatchNormalization that alone reads it; else in a new bias.

        Raises:
            ModelError: the site is refused, or its bias is computed by the run.
        """
        where, value = shift_conv(self._model, self._prunable(site).products[0].node, amount, self._constants)
        self._constants.add(value)
        self._forget()
        return where

    def enter(self, batch: Any) -> Values:
        """Turn one batch (a mapping by input name, a sequence in their order, or the only tensor) into live values.

        Raises:
            DataError: names, ranks, sizes or dtypes do not fit the model's inputs.
        """
        return check_batch(batch, self._inputs)

    def run_segment(
        self,
        index: int,
        values: Values,
        observe: Observer | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Values:
        """Run one segment in ONNX Runtime and return the values alive after it. `values` is not modified.

        `weights` maps site names to (groups, out, in) tensors used instead of the model's own, without gradient; the
        session built for them lasts as long as the same tensors are given.

        Raises:
            ModelError: ONNX Runtime cannot load or run the segment.
        """
        piece = self._pieces[index]
        made = self._runner.run(piece, values, observe is not None, weights)
        if observe is not None:
            for watched in piece.watched:
                x = made[watched.value] if watched.value in made else values[watched.value]
                observe(watched.reads, read_rows(watched, x))
        return {name: value for name, value in {**values, **made}.items() if name in piece.alive_after}

    def peek(self, index: int, values: Values, names: Sequence[str]) -> tuple[Values, dict[str, Tensor]]:
        """Run one segment and return the values alive after it, and the values called `names` made inside it.

        Raises:
            ModelError: ONNX Runtime cannot load or run the segment.
        """
        piece = self._pieces[index]
        made = self._runner.run(piece, values, inner=names)
        after = {name: value for name, value in {**values, **made}.items() if name in piece.alive_after}
        return after, {name: made[name] for name in names}

    def outputs(self, values: Values) -> tuple[Tensor, ...]:
        """Return the model's output tensors in order; a sequence gives its tensors, strings are left out."""
        found: list[Any] = []
        for output in self._model.graph.outputs:
            if output in self._constants:
                value = to_torch(self._constants.tensor(output).numpy().copy())
            else:
                value = values[output.name or ""]
            found.extend(value if isinstance(value, list) else [value])
        return tuple(value for value in found if isinstance(value, Tensor))

    def run(self, batch: Any) -> tuple[Tensor, ...]:
        """Run the whole model and return its output tensors. Its session is held until a weight changes.

        Raises:
            ModelError: ONNX Runtime cannot load or run the model.
        """
        values = self.enter(batch)
        outputs = [value.name or "" for value in self._model.graph.outputs if value not in self._constants]
        names = [name for name in dict.fromkeys(outputs) if name not in values]
        if names:
            if self._whole is None:
                self._forget()
                self._whole = open_model(self._model, "the model")
            made = self._whole.run(names, {name: to_numpy(value) for name, value in values.items()})
            values |= {name: to_torch(value) for name, value in zip(names, made, strict=True)}
        return self.outputs(values)

    def exact_outputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Run the whole model in the types that the file has."""
        return self.run(batch)

    def channels(self) -> ChannelMap:
        """Say that every site's inputs stay in order: which operations the order passes through is not read yet."""
        return ChannelMap((), dict.fromkeys(self._found, "channels of ONNX graphs are not traced in this release"))

    def reorder(self, channels: Channels, orders: Tensor) -> None:
        """Refuse: `channels` finds none."""
        raise ModelError("channels of an ONNX graph cannot be put in another order in this release")

    def contents(self) -> Iterator[object]:
        """Yield the printed graph, then every initialiser's name and bytes."""
        yield self.text()
        for name, value in self._model.graph.initializers.items():
            yield name
            if value.const_value is not None:
                yield value.const_value.tobytes()

    def text(self) -> str:
        """Print the graph: segments, nodes, sites."""
        lines = [f"graph {self._model.graph.name}({', '.join(each.name for each in self._inputs)})"]
        for piece in self._pieces:
            lines.append(f"segment {piece.index} {piece.name}: needs {', '.join(piece.needs)}")
            weights = {p.node: each.site for each in piece.sites for p in each.products}
            for node in piece.nodes:
                made = ", ".join(value.name or "_" for value in node.outputs)
                read = ", ".join((value.name or "_") if value is not None else "_" for value in node.inputs)
                lines.append(f"  {made} = {node.op_type}({read}){_remark(weights.get(node))}")
        lines.append(f"return {', '.join(value.name or '_' for value in self._model.graph.outputs)}")
        return "\n".join(lines)

    def save(self, path: Path, external_data: bool | None = None) -> tuple[Path, ...]:
        """Write the model with its current weights and return the files written, whole or not at all.

        `external_data`: weights in a file beside it; None: only above 1.5 GB.

        Raises:
            ExportError: `path` is the file the model came from, or it could not be written.
        """
        if self._source is not None and path.resolve() == self._source.resolve():
            raise ExportError(f"{str(path)!r} is the input itself, which is never modified; give another name")
        return write_model(self._model, path, external_data)

    def _forget(self) -> None:
        """Release the sessions: they hold weights that are no longer the model's, or are in the way of another."""
        self._runner.forget()
        self._whole = None

    def _prunable(self, site: Site) -> FoundSite:
        found = self._found[site.name]
        if found.site.refusal is not None:
            raise ModelError(f"layer {site.name!r} cannot be pruned: {found.site.refusal}")
        return found


def _remark(site: Site | None) -> str:
    if site is None:
        return ""
    why = site.refusal or site.dense_by_default
    return f"  # site {site.name}{f': {why}' if why else ''}"
