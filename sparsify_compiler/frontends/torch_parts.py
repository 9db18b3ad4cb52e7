"""Divide a torch.fx graph: its sites, what depends on input sizes alone, and the segments with their live values."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx, nn

from sparsify_compiler.frontends.layout import problem_shape
from sparsify_compiler.frontends.torch_run import dotted
from sparsify_compiler.frontends.torch_sites import Product, find_products
from sparsify_compiler.frontends.torch_uses import RECORDED, is_head, operation_name, other_readers, parameter_aliases
from sparsify_compiler.graph import Layout, MatmulLayout, Segment, Site, Step, cut, number_blocks


@dataclass(frozen=True)
class Parts:
    """A divided graph. Values are named as their fx nodes are.

    `constant_nodes` depend on the sizes in `size_names` and on buffers alone; other nodes read those in
    `constant_names`. `alive_first` is alive before segment 0, `alive_after[i]` after segment i.
    """

    products: dict[fx.Node, Product]
    sites: tuple[Site, ...]
    site_products: dict[str, tuple[fx.Node, ...]]
    reads: dict[fx.Node, str]
    aliases: dict[str, tuple[str, ...]]
    placeholders: tuple[str, ...]
    size_names: tuple[str, ...]
    constant_nodes: tuple[fx.Node, ...]
    constant_names: frozenset[str]
    segments: tuple[Segment, ...]
    segment_nodes: tuple[tuple[fx.Node, ...], ...]
    alive_first: frozenset[str]
    alive_after: tuple[frozenset[str], ...]
    outputs: tuple[object, ...]

    def downstream(self, site: Site, operations: int) -> tuple[list[fx.Node], tuple[str, ...], tuple[str, ...]]:
        """Return the nodes of a slice, the values it reads from outside, and the values it records."""
        start = self.site_products[site.name][0]
        order = [node for nodes in self.segment_nodes for node in nodes]
        taken, records = [start], [start.name]
        reached = {start}
        for node in order[order.index(start) + 1 :]:
            if len(records) > operations:
                break
            if not reached & set(node.all_input_nodes):
                continue
            reached.add(node)
            taken.append(node)
            if operation_name(node) in RECORDED:
                records.append(node.name)
        outside = dict.fromkeys(
            source.name
            for node in taken
            for source in node.all_input_nodes
            if source not in reached and source.op != "get_attr"
        )
        return taken, tuple(outside), tuple(records)


def divide(module: fx.GraphModule) -> Parts:
    """Divide the graph of `module`; nothing is run and the module is not modified."""

    def lookup(name: str) -> object:
        return dotted(module, name)

    aliases = parameter_aliases(module)
    products = {product.node: product for product in find_products(module, lookup)}
    constants, sizes = _constant_nodes(module)
    main = [
        node
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method", "call_module") and node not in constants
    ]
    blocks = number_blocks([_module_path(node) for node in main], [node in products for node in main])
    steps = [
        Step(
            reads=tuple(s.name for s in node.all_input_nodes if s.op != "get_attr" and s not in constants),
            writes=(node.name,),
            parameter=aliases[products[node].parameter][0] if _prunable(products.get(node), aliases) else None,
            block=block,
        )
        for node, block in zip(main, blocks, strict=True)
    ]
    edges = [0, *cut(steps), len(main)]
    ranges = list(pairwise(edges)) if main else [(0, 0)]
    segment_nodes = tuple(tuple(main[start:stop]) for start, stop in ranges)
    segment_of = {node: index for index, nodes in enumerate(segment_nodes) for node in nodes}
    sites, site_products, reads = _sites(module, products, aliases, segment_of)
    outputs = _flat_outputs(module)
    first, after = _alive(module, segment_nodes, constants, sizes, outputs)
    segments = tuple(
        Segment(
            index,
            next((block for block in blocks[start:stop] if block), f"segment {index}"),
            tuple(site.name for site in sites if site.segment == index),
            tuple(sorted((first if index == 0 else after[index - 1]) - set(sizes))),
        )
        for index, (start, stop) in enumerate(ranges)
    )
    read_outside = {s.name for node in main for s in node.all_input_nodes if s in constants}
    read_outside |= {value.name for value in outputs if isinstance(value, fx.Node) and value in constants}
    return Parts(
        products=products,
        sites=sites,
        site_products=site_products,
        reads=reads,
        aliases=aliases,
        placeholders=tuple(node.name for node in module.graph.nodes if node.op == "placeholder"),
        size_names=sizes,
        constant_nodes=tuple(node for node in module.graph.nodes if node in constants),
        constant_names=frozenset(read_outside),
        segments=segments,
        segment_nodes=segment_nodes,
        alive_first=first,
        alive_after=after,
        outputs=outputs,
    )


def _prunable(product: Product | None, aliases: dict[str, tuple[str, ...]]) -> bool:
    return product is not None and product.refusal is None and product.parameter in aliases


def _constant_nodes(module: fx.GraphModule) -> tuple[set[fx.Node], tuple[str, ...]]:
    """Find the nodes whose value depends on input sizes and buffers alone; and which of them are those sizes."""
    constants: set[fx.Node] = set()
    sizes = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes
        if node.target is torch.ops.aten.sym_size.int and sources[0].op == "placeholder":
            constants.add(node)
            sizes.append(node.name)
        elif all(source in constants or _is_buffer(module, source) for source in sources):
            constants.add(node)
    return constants, tuple(sizes)


def _is_buffer(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and not isinstance(dotted(module, str(node.target)), nn.Parameter)


def _module_path(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.target) if node.op == "call_module" else None
    path = next(reversed(stack.values()))[0]
    return str(path) if not str(path).startswith("_empty") else None


def _sites(
    module: fx.GraphModule,
    products: dict[fx.Node, Product],
    aliases: dict[str, tuple[str, ...]],
    segment_of: dict[fx.Node, int],
) -> tuple[tuple[Site, ...], dict[str, tuple[fx.Node, ...]], dict[fx.Node, str]]:
    uses: dict[str, list[Product]] = {}
    for product in products.values():
        uses.setdefault(aliases.get(product.parameter, (product.parameter,))[0], []).append(product)
    others = other_readers(module, products, aliases)
    stored = module.state_dict()
    sites: list[Site] = []
    site_products: dict[str, tuple[fx.Node, ...]] = {}
    reads: dict[fx.Node, str] = {}
    for canonical, found in uses.items():
        name = _site_name(found[0].parameter)
        layouts = {product.layout for product in found if product.layout is not None}
        layout = found[0].layout
        refusal = next((product.refusal for product in found if product.refusal), None)
        if refusal is None and canonical not in stored:
            refusal = "the weight is not in the model's state dict; make it a parameter or a persistent buffer"
        if refusal is None and len(layouts) > 1:
            refusal = "the weight is used in different ways at different places"
        readers = others.get(canonical, set())
        tied = "embedding" in readers
        if refusal is None and readers - {"embedding"}:
            refusal = f"the weight is also read by {', '.join(sorted(readers - {'embedding'}))}"
        head = any(is_head(product.node) for product in found)
        shape = tuple(dotted(module, found[0].parameter).shape)
        groups, out, in_, run = _problem(shape, layout)
        key = _read_key(found[0], layout) if len(found) == 1 else f"every input of {name}"
        sites.append(
            Site(
                name=name,
                kind=found[0].kind,
                parameter=canonical,
                shape=shape,
                out=out,
                in_=in_,
                groups=groups,
                run=run,
                layout=layout,
                reads=key,
                segment=segment_of.get(found[0].node, 0),
                refusal=refusal,
                dense_by_default=_dense_reason(tied, head),
                calls=len(found),
            )
        )
        site_products[name] = tuple(product.node for product in found)
        reads.update((product.node, key) for product in found)
    return tuple(sites), site_products, reads


def _problem(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, int, int, int]:
    if layout is not None:
        return problem_shape(shape, layout)
    in_ = 1
    for size in shape[1:]:
        in_ *= size
    return 1, shape[0] if shape else 1, in_, in_


def _site_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _read_key(product: Product, layout: Layout | None) -> str:
    source = product.input_node.name if product.input_node is not None else product.node.name
    return f"{source} axis {layout.input_axis}" if isinstance(layout, MatmulLayout) else f"{source} {layout}"


def _dense_reason(tied: bool, head: bool) -> str | None:
    if tied:
        return "output head whose weight is also the embedding" if head else "an embedding reads the same weight"
    return "output head" if head else None


def _flat_outputs(module: fx.GraphModule) -> tuple[object, ...]:
    output = next(node for node in module.graph.nodes if node.op == "output")
    flat: list[object] = []
    fx.node.map_arg(output.args, lambda node: flat.append(node))
    return tuple(flat)


def _alive(
    module: fx.GraphModule,
    segment_nodes: Sequence[Sequence[fx.Node]],
    constants: set[fx.Node],
    sizes: tuple[str, ...],
    outputs: tuple[object, ...],
) -> tuple[frozenset[str], tuple[frozenset[str], ...]]:
    """Return the values alive before segment 0 and after every segment; sizes are alive throughout.

    Of the constants, which every segment has, those that the model returns are alive after the last.
    """
    returned = {v for v in outputs if isinstance(v, fx.Node) and v.op != "get_attr"}
    alive = {v.name for v in returned - constants}
    after = [frozenset({v.name for v in returned} | set(sizes))]
    for nodes in reversed(segment_nodes):
        alive -= {node.name for node in nodes}
        alive |= {
            s.name
            for node in nodes
            for s in node.all_input_nodes
            if s.op != "get_attr" and s not in constants and s not in set(nodes)
        }
        after.append(frozenset(alive | set(sizes)))
    after.reverse()
    return after[0], tuple(after[1:])
