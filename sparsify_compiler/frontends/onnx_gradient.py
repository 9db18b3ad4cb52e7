"""An ONNX graph run by PyTorch instead of ONNX Runtime, so that gradients flow through its segments.

>>> graph = load_onnx(Path("model.onnx"))                                    # doctest: +SKIP
>>> after = DifferentiableOnnx(graph).run_segment(0, values, weights=tuned)  # doctest: +SKIP
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor

from sparsify_compiler.channels import ChannelMap, Channels
from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends.layout import from_problem
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.frontends.onnx_constants import STANDARD_DOMAINS
from sparsify_compiler.frontends.onnx_layers import LAYERS
from sparsify_compiler.frontends.onnx_operators import OPERATORS, Call, Operator
from sparsify_compiler.frontends.onnx_segments import Piece, read_rows
from sparsify_compiler.frontends.onnx_shapes import DTYPES, SHAPES
from sparsify_compiler.graph import Observer, Segment, Site, Values

TABLES: Mapping[str, Operator] = {**OPERATORS, **SHAPES, **LAYERS}
"""Every operator of the standard domain that PyTorch can take the place of."""

OLDEST = 7
"""The first opset whose operators broadcast as all later ones do."""


class DifferentiableOnnx:
    """A `graph.DifferentiableGraph` over an `OnnxGraph`: the same sites, segments and weights, run by PyTorch.

    It runs on the CPU; numbers differ from ONNX Runtime's by rounding. Constants are held as tensors for one segment.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        """Look at every operator first.

        Raises:
            ModelError: an operator has no counterpart in PyTorch here; the message names it.
        """
        self._graph = graph
        self._opset = graph.model.opset_imports.get("", 0)
        missing = {_word(n) for piece in graph.pieces for n in piece.nodes if not _known(n)}
        if missing or self._opset < OLDEST:
            what = f"opset {self._opset}" if self._opset < OLDEST else f"the operators {', '.join(sorted(missing))}"
            raise ModelError(
                f"this ONNX file uses {what}, through which no gradient can be taken here; compile the PyTorch model, "
                "or leave out woodtaylor and the steps that train"
            )
        self._segment = -1
        self._held: dict[onnx_ir.Value, tuple[object, Tensor]] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        """See `OnnxGraph`."""
        return self._graph.sites

    @property
    def segments(self) -> tuple[Segment, ...]:
        """See `OnnxGraph`."""
        return self._graph.segments

    def weight(self, site: Site) -> Tensor:
        """See `OnnxGraph`."""
        return self._graph.weight(site)

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """See `OnnxGraph`: the weight of both."""
        self._graph.set_weight(site, weight)

    def enter(self, batch: Any) -> Values:
        """See `OnnxGraph`."""
        return self._graph.enter(batch)

    def outputs(self, values: Values) -> tuple[Tensor, ...]:
        """See `OnnxGraph`."""
        return self._graph.outputs(values)

    def exact_outputs(self, batch: Any) -> tuple[Tensor, ...]:
        """See `OnnxGraph`."""
        return self._graph.exact_outputs(batch)

    def channels(self) -> ChannelMap:
        """See `OnnxGraph`."""
        return self._graph.channels()

    def reorder(self, channels: Channels, orders: Tensor) -> None:
        """See `OnnxGraph`."""
        self._graph.reorder(channels, orders)

    def contents(self) -> Iterator[object]:
        """See `OnnxGraph`."""
        return self._graph.contents()

    def text(self) -> str:
        """See `OnnxGraph`."""
        return self._graph.text()

    def run_segment(
        self,
        index: int,
        values: Values,
        observe: Observer | None = None,
        weights: Mapping[str, Tensor] | None = None,
        emit: Observer | None = None,
    ) -> Values:
        """Run one segment; see `graph.DifferentiableGraph`.

        Raises:
            ModelError: a node cannot be run; the message names it.
        """
        piece = self._graph.pieces[index]
        if self._segment != index:
            self._segment, self._held = index, {}
        swapped = {
            (product.node, product.index): self._native(weight, each.site, product.weight)
            for each in piece.sites
            if (weight := (weights or {}).get(each.site.name)) is not None
            for product in each.products
        }
        site_of = {product.node: each.site.name for each in piece.sites for product in each.products}
        watched = {each.product.node: each for each in piece.watched}
        dead = _last_reads(piece, piece.alive_after)
        env: dict[str, Any] = dict(values)
        for node in piece.nodes:
            if observe is not None and node in watched:
                observe(watched[node].reads, read_rows(watched[node], env[watched[node].value]))
            made = self._run(node, env, swapped)
            env.update((value.name or "", y) for value, y in zip(node.outputs, made, strict=False))
            if emit is not None and node in site_of:
                emit(site_of[node], made[0])
            for name in dead.get(node, ()):
                env.pop(name, None)
        return {name: value for name, value in env.items() if name in piece.alive_after}

    def _run(
        self, node: onnx_ir.Node, env: Mapping[str, Any], swapped: Mapping[tuple[onnx_ir.Node, int], Tensor]
    ) -> Sequence[Tensor]:
        inputs = tuple(
            None if value is None else swapped[node, index] if (node, index) in swapped else self._read(value, env)
            for index, value in enumerate(node.inputs)
        )
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        call = Call(inputs, attributes, self._opset, len(node.outputs))
        try:
            made = TABLES[node.op_type](call)
        except (RuntimeError, IndexError, NotImplementedError) as error:  # what torch raises for sizes that do not fit
            raise ModelError(f"{_word(node)} {node.name!r} cannot be run with gradients: {error}") from error
        return made if isinstance(made, tuple) else (made,)

    def _read(self, value: onnx_ir.Value, env: Mapping[str, Any]) -> Tensor:
        if value not in self._graph.constants:
            found: Tensor = env[value.name or ""]
            return found
        stored, held = self._held.get(value, (None, None))
        if held is None or stored is not value.const_value:  # a weight that was replaced has another tensor
            held = _tensor(self._graph.constants.tensor(value))
            self._held[value] = (value.const_value, held)
        return held

    def _native(self, weight: Tensor, site: Site, value: onnx_ir.Value) -> Tensor:
        known = self._graph.constants.describe(value)
        assert known is not None
        assert site.layout is not None
        return from_problem(weight, site.layout, known[1]).to(DTYPES[known[0]])


def _last_reads(piece: Piece, keep: frozenset[str] | set[str]) -> dict[onnx_ir.Node, list[str]]:
    """Name per node the values that no later node reads, but for those in `keep`."""
    last = {value.name: node for node in piece.nodes for value in (*node.inputs, *node.outputs) if value is not None}
    found: dict[onnx_ir.Node, list[str]] = {}
    for name, node in last.items():
        if name and name not in keep:
            found.setdefault(node, []).append(name)
    return found


def _tensor(stored: onnx_ir.TensorProtocol) -> Tensor:
    if stored.dtype == onnx_ir.DataType.BFLOAT16:  # a dtype that PyTorch does not read from NumPy
        return torch.from_numpy(stored.numpy().astype("float32")).to(torch.bfloat16)
    return torch.from_numpy(stored.numpy().copy())


def _known(node: onnx_ir.Node) -> bool:
    return node.domain in STANDARD_DOMAINS and node.op_type in TABLES


def _word(node: onnx_ir.Node) -> str:
    return node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}::{node.op_type}"
