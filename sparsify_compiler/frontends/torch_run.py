"""Run parts of a torch.fx graph: node by node, values freed after their last use, weights swapped on demand."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.frontends.torch_causal import attend_causally, is_masked
from sparsify_compiler.frontends.torch_sites import Product
from sparsify_compiler.graph import Values
from sparsify_compiler.precision import Precision, products

Fetch = Callable[[str], Any]
See = Callable[[Product, Tensor], None]

WEIGHT_NAMES = ("weight", "mat2", "other")


class Runner:
    """Execute nodes of one graph. `fetch` returns the tensor or module behind a dotted name, on the right device.

    Products of the nodes run in `precision`; those of `see` and `made` do not.
    """

    def __init__(self, found: Mapping[fx.Node, Product], fetch: Fetch, precision: Precision, at: torch.device) -> None:
        self._products = found
        self._fetch = fetch
        self._precision: Precision = precision
        self._device = at

    def run(
        self,
        nodes: Sequence[fx.Node],
        values: Values,
        keep: frozenset[str],
        weights: Mapping[str, Tensor],
        see: See | None = None,
        made: See | None = None,
    ) -> Values:
        """Run `nodes` in order from `values` (by node name) and return the values named in `keep`.

        `weights` maps parameter names to tensors used in their place. `see` is called with every product and its
        input before the product runs, `made` with every product and its output after it.
        """
        env = dict(values)
        last = self._last_uses(nodes)
        for index, node in enumerate(nodes):
            product = self._products.get(node)
            if see is not None and product is not None and product.input_node is not None:
                see(product, env[product.input_node.name])
            with products(self._precision, self._device):
                env[node.name] = self._execute(node, env, weights)
            if made is not None and product is not None:
                made(product, env[node.name])
            for name in last.get(index, ()):
                if name not in keep:
                    env.pop(name, None)
        return {name: env[name] for name in keep if name in env}

    def _execute(self, node: fx.Node, env: Values, weights: Mapping[str, Tensor]) -> Any:
        def load(source: fx.Node) -> Any:
            if source.op == "get_attr":
                name = str(source.target)
                return weights[name] if name in weights else self._fetch(name)
            return env[source.name]

        args = fx.node.map_arg(node.args, load)
        kwargs = fx.node.map_arg(node.kwargs, load)
        if node.op == "call_function":
            if is_masked(args, kwargs):
                return attend_causally(node, args, kwargs)
            function: Callable[..., Any] = node.target  # type: ignore[assignment]  # fx: a callable here
            return function(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        module: nn.Module = self._fetch(str(node.target))
        swapped = {
            name: weights[f"{node.target}.{name}"]
            for name, _ in module.named_parameters()
            if f"{node.target}.{name}" in weights
        }
        if swapped:
            return torch.func.functional_call(module, swapped, args, kwargs)
        return module(*args, **kwargs)

    @staticmethod
    def _last_uses(nodes: Sequence[fx.Node]) -> dict[int, list[str]]:
        """Per position, the values no later node of `nodes` reads (a value nobody reads ends where it is made)."""
        last: dict[str, int] = {}
        for index, node in enumerate(nodes):
            last[node.name] = index
            for source in node.all_input_nodes:
                last[source.name] = index
        ends: dict[int, list[str]] = {}
        for name, index in last.items():
            ends.setdefault(index, []).append(name)
        return ends


def dotted(root: nn.Module, name: str) -> Any:
    """Return the attribute behind a dotted name."""
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part)
    return value


def replace_parameter(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a new parameter in the place of the one behind a dotted name; the old tensor is not written."""
    owner_name, _, leaf = name.rpartition(".")
    owner = dotted(root, owner_name) if owner_name else root
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point()))
    else:
        setattr(owner, leaf, value)


def move_constants(module: fx.GraphModule, device: torch.device) -> None:
    """Rewrite the devices that tracing wrote into the nodes (of arange, zeros, to), nested graphs included."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for graph_module in module.modules():
        if isinstance(graph_module, fx.GraphModule):
            for node in graph_module.graph.nodes:
                node.args = tuple(moved(value) for value in node.args)
                node.kwargs = {name: moved(value) for name, value in node.kwargs.items()}
            graph_module.recompile()
