"""Cut an ONNX graph into segments and run one in ONNX Runtime: extracted, with the current weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify_compiler.frontends.onnx_constants import Constants, bodies
from sparsify_compiler.frontends.onnx_names import block_of
from sparsify_compiler.frontends.onnx_products import Product, same_sides
from sparsify_compiler.frontends.onnx_sites import FoundSite
from sparsify_compiler.graph import ConvLayout, MatmulLayout, Step, cut

_NOT_TENSORS = frozenset(
    (
        "SequenceConstruct",
        "SequenceEmpty",
        "SplitToSequence",
        "SequenceInsert",
        "SequenceErase",
        "SequenceMap",
        "Optional",
    )
)


@dataclass(frozen=True)
class Watched:
    """One tensor that sites read: `value` is its name in the graph, `reads` the sites' word for it."""

    reads: str
    value: str
    product: Product


@dataclass(frozen=True)
class Piece:
    """A run of nodes: the values it `needs` from before, those it `makes` for later, and what its sites read."""

    index: int
    name: str
    nodes: tuple[onnx_ir.Node, ...]
    sites: tuple[FoundSite, ...]
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    alive_after: frozenset[str]
    inside: frozenset[str]
    watched: tuple[Watched, ...]


def split(graph: onnx_ir.Graph, constants: Constants, found: Sequence[FoundSite]) -> list[Piece]:
    """Cut the nodes that depend on the run's inputs into pieces; constant ones go with whoever reads them."""
    nodes = [node for node in graph if not all(value in constants for value in node.outputs)]
    parameter = {product.node: each.site.parameter for each in found for product in each.products if product.layout}
    reads = {node: tuple(dict.fromkeys(_live_reads(node, graph, constants))) for node in nodes}
    steps = [
        Step(reads[node], tuple(v.name for v in node.outputs if v.name), parameter.get(node), block_of(node))
        for node in nodes
    ]
    outputs = {value.name for value in graph.outputs}
    last_read = {name: index for index, step in enumerate(steps) for name in step.reads}
    unfit = _never_crossed(nodes, last_read)
    cuts = [position for position in cut(steps) if position not in unfit]
    bounds = list(zip([0, *cuts], [*cuts, len(nodes)], strict=True)) if nodes else []
    before = [value.name for value in graph.inputs if value not in constants]
    pieces = []
    for index, (start, stop) in enumerate(bounds):
        written = [name for step in steps[start:stop] for name in step.writes]
        read = dict.fromkeys(name for step in steps[start:stop] for name in step.reads)
        alive = [n for n in (*before, *written) if n in outputs or last_read.get(n or "", -1) >= stop]
        owned = set(nodes[start:stop])
        sites = tuple(each for each in found if each.owner in owned)
        pieces.append(
            Piece(
                index=index,
                name=next((step.block for step in steps[start:stop] if step.block), None) or f"segment {index}",
                nodes=tuple(nodes[start:stop]),
                sites=sites,
                needs=tuple(name for name in read if name not in set(written)),
                makes=tuple(name for name in written if name in set(alive)),
                alive_after=frozenset(name for name in alive if name),
                inside=frozenset(written),
                watched=tuple(_watched(found, owned)),
            )
        )
        before = alive
    return pieces


def read_rows(watched: Watched, x: Tensor) -> Tensor:
    """Bring the input of a product into the form its layout speaks of: SAME padding applied, vectors as matrices."""
    product = watched.product
    if isinstance(product.layout, MatmulLayout) and x.dim() == 1:
        return x.unsqueeze(0 if product.layout.input_axis == -1 else 1)
    if product.same_padding and isinstance(product.layout, ConvLayout):
        layout, sides = product.layout, []
        for size, kernel, stride, dilation in zip(
            x.shape[2:], layout.kernel, layout.stride, layout.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            sides.append(same_sides(total, product.same_padding))
        return F.pad(x, [side for pair in reversed(sides) for side in pair])
    return x


def extract_piece(
    model: onnx_ir.Model, piece: Piece, values: Mapping[str, Any], inner: Sequence[str] = ()
) -> onnx_ir.Model:
    """Return `piece` as a model of its own: same operator sets, functions and names, tensors shared with `model`.

    Its inputs have the types of `values`; its outputs are what the piece makes, what its sites
    read, and the `inner` values.
    """
    seen = [each.value for each in piece.watched if each.value in piece.inside]
    outputs = dict.fromkeys((*piece.makes, *seen, *inner))
    graph = onnx_ir.convenience.extract(model.graph, inputs=list(piece.needs), outputs=list(outputs))
    for value in graph.inputs:
        assert value.name is not None
        value.type, value.shape = _type_of(values[value.name])
    return onnx_ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))


def signature(piece: Piece, values: Mapping[str, Any]) -> tuple[object, ...]:
    """Return the dtypes and ranks for which a session on `piece` was built."""
    return tuple((name, values[name].dtype, values[name].ndim) for name in piece.needs)


def to_torch(value: Any) -> Any:
    """Turn what ONNX Runtime returned into tensors without a copy; strings stay numpy, sequences lists."""
    if isinstance(value, list):
        return [to_torch(each) for each in value]
    if value is None or isinstance(value, dict) or value.dtype.kind in "OUS":
        return value
    return torch.from_numpy(value)


def to_numpy(value: Any) -> Any:
    """Turn a live value into what ONNX Runtime takes, without a copy where it is contiguous and on the host."""
    return value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value


def _type_of(value: Any) -> tuple[onnx_ir.TensorType, onnx_ir.Shape]:
    shape = onnx_ir.Shape([None] * value.ndim)
    if isinstance(value, Tensor):
        return onnx_ir.TensorType(onnx_ir.tensor(value.new_zeros(0).cpu().numpy()).dtype), shape
    return onnx_ir.TensorType(onnx_ir.DataType.STRING), shape


def _live_reads(node: onnx_ir.Node, graph: onnx_ir.Graph, constants: Constants) -> Iterator[str]:
    """Yield the names of the main graph's values that `node` or its bodies read and that change from run to run."""
    found: list[onnx_ir.Value | None] = list(node.inputs)
    for body in bodies(node):
        for inner in body.all_nodes():
            found += [*inner.inputs, *(value for deeper in bodies(inner) for value in deeper.outputs)]
        found += list(body.outputs)
    for value in found:
        if value is not None and value.graph is graph and value not in constants and value.name:
            yield value.name


def _never_crossed(nodes: Sequence[onnx_ir.Node], last_read: Mapping[str, int]) -> set[int]:
    """Find the positions where a sequence or optional is alive: only tensors can be handed to a segment."""
    positions: set[int] = set()
    for index, node in enumerate(nodes):
        for value in node.outputs:
            declared = isinstance(value.type, onnx_ir.SequenceType | onnx_ir.OptionalType)
            if declared or node.op_type in _NOT_TENSORS:
                positions.update(range(index + 1, last_read.get(value.name or "", index) + 1))
    return positions


def _watched(found: Sequence[FoundSite], nodes: set[onnx_ir.Node]) -> Iterator[Watched]:
    """List what the prunable sites of `nodes` read, each tensor once per word for it."""
    seen: set[tuple[str, str]] = set()
    for each in found:
        if each.site.refusal is not None:
            continue
        for product in each.products:
            name = product.data.name if product.data is not None else None
            if product.node in nodes and name and (each.site.reads, name) not in seen:
                seen.add((each.site.reads, name))
                yield Watched(each.site.reads, name, product)
