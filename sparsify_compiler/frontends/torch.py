"""The graph protocol over a torch.fx graph traced from a torch module."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sparsify_compiler.batches import Batch, home
from sparsify_compiler.channels import ChannelMap, Channels
from sparsify_compiler.errors import DataError
from sparsify_compiler.frontends.layout import from_problem, to_problem
from sparsify_compiler.frontends.torch_causal import causal_masks, drop_causal_masks
from sparsify_compiler.frontends.torch_channels import find_channels
from sparsify_compiler.frontends.torch_float32 import InFloat32
from sparsify_compiler.frontends.torch_inputs import arrange, check_input
from sparsify_compiler.frontends.torch_parts import Parts, divide
from sparsify_compiler.frontends.torch_run import Runner, dotted, move_constants, replace_parameter
from sparsify_compiler.frontends.torch_sites import Product
from sparsify_compiler.frontends.torch_slice import Slice
from sparsify_compiler.frontends.torch_trace import Traced, from_program, trace
from sparsify_compiler.graph import Observer, Segment, Site, Values
from sparsify_compiler.precision import Precision

MOST_SHAPES = 8
"""Input shapes whose masks and rotary tables are remembered at a time."""


def trace_module(
    module: nn.Module, batch: Batch, device: torch.device | None = None, precision: Precision = "float32"
) -> "TorchGraph":
    """Trace `module` on an example batch; see `torch_trace.trace`. The module is not modified, its weights are shared.

    `device` is where segments run (default: where the weights are); weights are brought there a segment at a time.
    Products run in `precision`.
    """
    return TorchGraph(trace(module, batch), device, precision)


def trace_program(
    program: ExportedProgram, device: torch.device | None = None, precision: Precision = "float32"
) -> "TorchGraph":
    """Take a saved torch.export program as a graph."""
    return TorchGraph(from_program(program), device, precision)


class TorchGraph:
    """A traced torch model. The weights start as the user's own and are replaced, never written in place.

    `reordered` names the parameters and buffers that `reorder` replaced, each by all of its names; of those with one
    axis it says where the entries stood before.
    """

    def __init__(self, traced: Traced, device: torch.device | None = None, precision: Precision = "float32") -> None:
        self.traced = traced
        self.module = traced.graph_module
        self._parts: Parts = divide(self.module)
        at = home(self.module)
        self._device = device or at
        if self._device != at:
            move_constants(self.module, self._device)
        self._runner = Runner(self._parts.products, self._fetch, precision, self._device)
        self._traced_inputs = {n.name: n.meta.get("val") for n in self.module.graph.nodes if n.op == "placeholder"}
        self._masks = causal_masks(self.module, frozenset(node.name for node in self._parts.constant_nodes))
        self._by_name = {site.name: site for site in self._parts.sites}
        self._site_names = {node: name for name, nodes in self._parts.site_products.items() for node in nodes}
        self._resident: dict[str, Any] = {}
        self._resident_segment = -1
        self._constants: dict[tuple[Any, ...], Values] = {}
        self.reordered: dict[tuple[str, ...], Tensor | None] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site in execution order, refused ones included."""
        return self._parts.sites

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in execution order."""
        return self._parts.segments

    def weight(self, site: Site) -> Tensor:
        """Return a float32 copy of the weight, (groups, out, in)."""
        if site.layout is None:
            raise DataError(f"site {site.name!r} cannot be read as a matrix: {site.refusal}")
        native = dotted(self.module, site.parameter).detach()
        return to_problem(native, site.layout).to(torch.float32, copy=True).contiguous()

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Replace the weight by `weight` (groups, out, in), under every name it is tied to."""
        old = dotted(self.module, site.parameter)
        self._replace(site.parameter, self._native(site, weight.detach()).to(device=old.device, dtype=old.dtype))

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Replace what the model calls `name`, under every name it is tied to."""
        old = dotted(self.module, name)
        self._replace(name, value.detach().to(device=old.device, dtype=old.dtype, copy=True))

    def channels(self) -> ChannelMap:
        """Find the sites' input channels whose order is free."""
        return find_channels(self.module, self.sites, self._parts.aliases, self.traced.how)

    def reorder(self, channels: Channels, orders: Tensor) -> None:
        """Put channels in another order, in every parameter and buffer that counts them."""
        for member in channels.members:
            old = dotted(self.module, member.parameter).detach()
            self._replace(member.parameter, member.reordered(old, orders).contiguous())
            names = self._parts.aliases[member.parameter]
            stood = self.reordered.get(names)
            stood = torch.arange(old.numel()) if stood is None else stood
            self.reordered[names] = member.reordered(stood, orders) if old.dim() == 1 else None
        self._constants.clear()

    def _replace(self, parameter: str, native: Tensor) -> None:
        """Put a new tensor in the place of a parameter or buffer, under every name it is tied to."""
        names = self._parts.aliases[parameter]
        for name in names:
            replace_parameter(self.module, name, native)
        first = dotted(self.module, names[0])
        for name in names[1:]:  # tied names share one Parameter again
            owner, _, leaf = name.rpartition(".")
            setattr(dotted(self.module, owner) if owner else self.module, leaf, first)
        self._resident.clear()

    def aliases(self, site: Site) -> tuple[str, ...]:
        """Return every name the site's parameter has in the model."""
        return self._parts.aliases[site.parameter]

    def enter(self, batch: Batch) -> Values:
        """Turn one user batch into the values alive before segment 0."""
        inputs = arrange(self.traced, batch)
        placeholders = self._parts.placeholders
        if len(inputs) != len(placeholders):
            raise DataError(
                f"the model takes {len(placeholders)} inputs ({', '.join(placeholders)}); got {len(inputs)}"
            )
        values: Values = {}
        for name, value in zip(placeholders, inputs, strict=True):
            check_input(name, value, self._traced_inputs.get(name))
            values[name] = value
        sizes = [node for node in self._parts.constant_nodes if node.name in self._parts.size_names]
        loaded = {name: self._place(value) for name, value in values.items()}
        known = self._runner.run(sizes, loaded, frozenset(self._parts.size_names), {})
        return {name: value for name, value in {**values, **known}.items() if name in self._parts.alive_first}

    def run_segment(
        self,
        index: int,
        values: Values,
        observe: Observer | None = None,
        weights: Mapping[str, Tensor] | None = None,
        emit: Observer | None = None,
    ) -> Values:
        """Run one segment, on the graph's device; see `graph.DifferentiableGraph`."""
        if index != self._resident_segment:
            self._resident.clear()
            self._resident_segment = index
        env = {name: self._place(value) for name, value in values.items()}
        seen: set[tuple[str, str]] = set()

        def see(product: Product, x: Tensor) -> None:
            key = self._parts.reads[product.node]
            once = (key, product.input_node.name if product.input_node else "")
            if observe is not None and once not in seen:
                seen.add(once)
                observe(key, x)

        made = (lambda product, y: emit(self._site_names[product.node], y)) if emit is not None else None
        keep = frozenset(self._parts.alive_after[index])
        env = {**self._constant_values(env), **env}
        nodes, swapped = self._parts.segment_nodes[index], self._overrides(weights)
        return self._runner.run(nodes, env, keep, swapped, see if observe else None, made)

    def outputs(self, values: Values) -> tuple[Tensor, ...]:
        """Return the model's output tensors from the values alive after the last segment."""
        named = [value for value in self._parts.outputs if isinstance(value, fx.Node)]
        found = [values[node.name] if node.op != "get_attr" else self._fetch(str(node.target)) for node in named]
        return tuple(value for value in found if isinstance(value, Tensor))

    def exact_outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the outputs for one batch, computed in float32 where the model has half precision.

        Of a graph by torch.export: modules that another tracer calls as a whole run as they are.
        """
        return InFloat32(self.module, self._device).outputs(*map(self._place, arrange(self.traced, batch)))

    def record(
        self, index: int, values: Values, names: Iterable[str], weights: Mapping[str, Tensor] | None = None
    ) -> Values:
        """Run from the start of segment `index` until every value in `names` was made, and return those values."""
        wanted = set(names)
        nodes: list[fx.Node] = [node for part in self._parts.segment_nodes[index:] for node in part]
        last = max((i for i, node in enumerate(nodes) if node.name in wanted), default=-1)
        env = {name: self._place(value) for name, value in values.items()}
        env = {**self._constant_values(env), **env}
        return self._runner.run(nodes[: last + 1], env, frozenset(wanted), self._overrides(weights)) | {
            name: env[name] for name in wanted if name in env
        }

    def slice(self, site: Site, operations: int) -> Slice:
        """Cut out what follows `site`: itself and the next `operations` recorded operations that depend on it.

        Recorded are linear, convolution, normalisation, activation, pooling and attention nodes, not views and sums.
        """
        if site.calls != 1 or site.layout is None:
            raise DataError(
                f"site {site.name!r}: a slice needs a weight that is used once; it is used {site.calls} times"
            )
        nodes, inputs, records = self._parts.downstream(site, operations)

        def evaluate(weight: Tensor, values: Values) -> tuple[Tensor, ...]:
            env = {name: self._place(value) for name, value in values.items()}
            done = self._runner.run(nodes, env, frozenset(records), self._overrides({site.name: weight}))
            return tuple(done[name] for name in records)

        return Slice(site, inputs, records, evaluate)

    def contents(self) -> Iterator[object]:
        """Yield the printed graph, then every parameter and buffer with its name."""
        yield self.text()
        for name, tensor in self.module.state_dict().items():
            yield name
            yield tensor

    def text(self) -> str:
        """Print the graph: a line per segment and node, sites marked with what they are."""
        lines = [f"# traced by {self.traced.how}"]
        names = {node: site for site in self.sites for node in self._parts.site_products[site.name]}
        for segment, nodes in zip(self.segments, self._parts.segment_nodes, strict=True):
            lines.append(f"segment {segment.index} {segment.name}:  # reads {', '.join(segment.needs)}")
            for node in nodes:
                site = names.get(node)
                mark = f"  # site {site.name} ({site.out}, {site.in_})" if site else ""
                lines.append(f"  %{node.name} = {node.target}({', '.join(s.name for s in node.all_input_nodes)}){mark}")
        return "\n".join(lines)

    def _native(self, site: Site, weight: Tensor) -> Tensor:
        if site.layout is None:
            raise DataError(f"site {site.name!r} cannot be written as a matrix: {site.refusal}")
        return from_problem(weight, site.layout, site.shape)

    def _overrides(self, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Bring weights of problems into the model's own form, dtype and device, by parameter name."""
        found: dict[str, Tensor] = {}
        for site, weight in (weights or {}).items():
            parameter = self._by_name[site].parameter
            dtype = dotted(self.module, parameter).dtype
            native = self._native(self._by_name[site], weight).to(self._device, dtype)
            found.update(dict.fromkeys(self._parts.aliases[parameter], native))
        return found

    def _constant_values(self, env: Values) -> Values:
        """Compute what depends on input sizes alone (masks, rotary tables), once per distinct sizes."""
        key = tuple(env[name] for name in self._parts.size_names)
        if key not in self._constants:
            if len(self._constants) >= MOST_SHAPES:
                self._constants.pop(next(iter(self._constants)))
            nodes = [node for node in self._parts.constant_nodes if node.name not in self._parts.size_names]
            known = {name: env[name] for name in self._parts.size_names}
            with torch.no_grad():
                made = self._runner.run(nodes, known, self._parts.constant_names, {})
                self._constants[key] = drop_causal_masks(made, self._masks)
        return self._constants[key]

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        placed = value.to(self._device, non_blocking=True)
        return placed.clone() if placed is value and self.traced.in_place else placed

    def _fetch(self, name: str) -> Any:
        value = dotted(self.module, name)
        if not isinstance(value, Tensor | nn.Module):
            return value
        held = (value,) if isinstance(value, Tensor) else (*value.parameters(), *value.buffers())
        if all(tensor.device == self._device for tensor in held):
            return value
        if name not in self._resident:  # a module that the graph calls is the user's own: a copy moves
            self._resident[name] = (value if isinstance(value, Tensor) else copy.deepcopy(value)).to(self._device)
        return self._resident[name]
