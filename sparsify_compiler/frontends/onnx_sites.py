"""Every weight that an ONNX graph multiplies by, in order: its name, its uses, and why it may not be pruned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from sparsify_compiler.frontends.layout import problem_shape, to_problem
from sparsify_compiler.frontends.onnx_constants import STANDARD_DOMAINS, Constants, bodies
from sparsify_compiler.frontends.onnx_names import name_of, unique
from sparsify_compiler.frontends.onnx_products import EMBEDDING, Product, find_products, stored_shape
from sparsify_compiler.graph import ConvLayout, Layout, Site

_AFTER_HEAD = frozenset(
    (
        "Add",
        "Reshape",
        "Softmax",
        "LogSoftmax",
        "Sigmoid",
        "Cast",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Slice",
        "Transpose",
        "ArgMax",
    )
)

_QUANTISERS = ("DequantizeLinear", "QuantizeLinear")


@dataclass(frozen=True)
class FoundSite:
    """A site, the products that use its weight, and the node of the main graph it stands in (a body's owner)."""

    site: Site
    products: tuple[Product, ...]
    owner: onnx_ir.Node
    notes: tuple[str, ...] = ()


def find_sites(model: onnx_ir.Model, constants: Constants) -> list[FoundSite]:
    """List every site of `model` in execution order, refused ones included; `Site.segment` is still 0."""
    functions = {function.identifier() for function in model.functions.values()}
    found: list[tuple[Product, onnx_ir.Node]] = []
    for node in model.graph:
        found += [(product, node) for product in find_products(node, constants, functions)]
        found += [(product, node) for product in _nested(node, constants, functions)]
        if function := model.functions.get(node.op_identifier()):
            found += [(product, node) for product in _in_function(function, node)]
    looked_up = {constants.source(p.weight).root for p, _ in found if p.refusal == EMBEDDING}
    taken: set[str] = set()
    sites = []
    for products, owner in _tied(found, constants):
        sites.append(_describe(products, owner, constants, looked_up, taken))
    if sum(each.site.refusal is None for each in sites) > 1:
        sites = [_mark_head(each, constants) for each in sites]
    return sites


def stored_weight(product: Product, constants: Constants) -> Tensor:
    """Return the weight as `product` reads it, float32 in its own shape (a copy)."""
    array = constants.tensor(product.weight).numpy()
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _nested(node: onnx_ir.Node, constants: Constants, functions: set[tuple[str, str, str]]) -> Iterator[Product]:
    where = f"inside the body of {node.op_type} {node.name!r}, which is not pruned"
    for body in bodies(node):
        for inner in body.all_nodes():
            for product in find_products(inner, constants, functions):
                yield replace(product, refusal=where, layout=None)


def _in_function(function: onnx_ir.Function, call: onnx_ir.Node) -> Iterator[Product]:
    where = f"inside the function {function.name!r}, which is not pruned; inline the model's functions first"
    for node in function.all_nodes():
        if node.domain in STANDARD_DOMAINS and node.op_type in ("MatMul", "Gemm", "Conv"):
            weight = node.inputs[1]
            maker = weight.producer() if weight is not None else None
            if weight is not None and (maker is None or maker.op_type == "Constant"):
                yield Product(node, 1, refusal=where)


def _tied(
    found: list[tuple[Product, onnx_ir.Node]], constants: Constants
) -> list[tuple[tuple[Product, ...], onnx_ir.Node]]:
    """Join products whose weight is the same matrix of the same root, in the order of the first use."""
    joined: list[tuple[list[Product], onnx_ir.Node]] = []
    by_root: dict[onnx_ir.Value, list[list[Product]]] = {}
    for product, owner in found:
        same_root = by_root.setdefault(constants.source(product.weight).root, []) if product.layout else []
        uses = next((uses for uses in same_root if _same_weight(uses[0], product, constants)), None)
        if uses is None:
            uses = []
            joined.append((uses, owner))
            same_root.append(uses)
        uses.append(product)
    return [(tuple(uses), owner) for uses, owner in joined]


def _same_weight(first: Product, second: Product, constants: Constants) -> bool:
    if first.weight is second.weight:
        return True
    shapes = [stored_shape(p.weight, constants) for p in (first, second)]
    layouts = [p.layout for p in (first, second)]
    assert layouts[0] is not None
    assert layouts[1] is not None
    if type(layouts[0]) is not type(layouts[1]):
        return False
    if problem_shape(shapes[0], layouts[0]) != problem_shape(shapes[1], layouts[1]):
        return False
    one, other = (to_problem(stored_weight(p, constants), p.layout) for p in (first, second) if p.layout)
    return torch.equal(one, other)


def _describe(
    products: tuple[Product, ...],
    owner: onnx_ir.Node,
    constants: Constants,
    looked_up: set[onnx_ir.Value],
    taken: set[str],
) -> FoundSite:
    first = products[0]
    source = constants.source(first.weight)
    shape = stored_shape(first.weight, constants)
    layout, refusal = first.layout, first.refusal
    if layout is not None and (reason := _mixed_geometry(products)):
        layout, refusal = None, reason
    groups, out, in_, run = problem_shape(shape, layout) if layout else _rough_shape(shape)
    parameter = source.root.name or ""
    site = Site(
        name=unique(name_of(first.node, parameter), taken),
        kind=first.node.op_type,
        parameter=parameter,
        shape=shape,
        out=out,
        in_=in_,
        groups=groups,
        run=run,
        layout=layout,
        reads=_reads(products, layout),
        segment=0,
        refusal=refusal,
        dense_by_default="an embedding reads the same weight" if source.root in looked_up and layout else None,
        calls=len(products),
    )
    return FoundSite(site, products, owner, _notes(source.through) if layout else ())


def _notes(through: tuple[str, ...]) -> tuple[str, ...]:
    if any(op in _QUANTISERS for op in through):
        return (
            "the weight was stored quantised; pruned, it is stored as float: the file grows, and ONNX Runtime no "
            "longer fuses this product into a quantised one",
        )
    if through:
        return (f"the weight was computed through {', '.join(through)}; pruned, its result is stored instead",)
    return ()


def _mixed_geometry(products: tuple[Product, ...]) -> str | None:
    """Say why products of one weight cannot share a pruning problem, or None."""
    if len({(*_geometry(product.layout), product.same_padding) for product in products}) > 1:
        return "the weight is shared by products that read their inputs in different ways"
    return None


def _geometry(layout: Layout | None) -> tuple[object, ...]:
    if isinstance(layout, ConvLayout):
        return (layout.kernel, layout.stride, layout.padding, layout.dilation, layout.groups)
    return (layout.input_axis,) if layout else ()


def _reads(products: tuple[Product, ...], layout: Layout | None) -> str:
    names = "+".join(dict.fromkeys((p.data.name or "") if p.data else "" for p in products))
    if isinstance(layout, ConvLayout):
        words = ("x".join(map(str, values)) for values in (layout.kernel, layout.stride, layout.dilation))
        kernel, stride, dilation = words
        padding = products[0].same_padding or ",".join(f"{begin}:{end}" for begin, end in layout.padding)
        return f"{names} (conv {kernel} stride {stride} padding {padding} dilation {dilation} groups {layout.groups})"
    return f"{names} (axis -2)" if layout and layout.input_axis == -2 else names


def _rough_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Give a refused weight numbers to print: the first axis as outputs, the rest as inputs."""
    if not shape:
        return 1, 0, 0, 0
    in_ = int(np.prod(shape[1:]))
    return 1, shape[0], in_, in_


def _mark_head(found: FoundSite, constants: Constants) -> FoundSite:
    site = found.site
    if site.refusal is None and site.dense_by_default is None and all(_ends(p.node, constants) for p in found.products):
        return replace(found, site=replace(site, dense_by_default="output head"))
    return found


def _ends(node: onnx_ir.Node, constants: Constants) -> bool:
    """Tell whether the results of `node` only become outputs of the model, through shape changes and activations."""
    reached = False
    seen: set[onnx_ir.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for value in current.outputs:
            reached |= value.is_graph_output()
            stack.extend(value.consumers())
        if current is node:
            continue
        live = [value for value in current.inputs if value is not None and value not in constants]
        if current.op_type not in _AFTER_HEAD or current.domain not in STANDARD_DOMAINS or len(live) != 1:
            return False
    return reached
