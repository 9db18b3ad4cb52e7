"""Find the channels of a traced torch model whose order is free."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod

from torch import Tensor, fx

from sparsify_compiler.channels import ChannelMap, Channels, Member
from sparsify_compiler.frontends.torch_axes import Axes, Factors
from sparsify_compiler.frontends.torch_label_rules import RULES, pointwise
from sparsify_compiler.frontends.torch_labels import Attribute, Labels
from sparsify_compiler.frontends.torch_run import dotted
from sparsify_compiler.graph import ConvLayout, Site


def find_channels(
    module: fx.GraphModule, sites: Sequence[Site], aliases: Mapping[str, tuple[str, ...]], how: str
) -> ChannelMap:
    """Find the input channels of every site of `module`, and whether their order is free. Nothing is run.

    Every axis of every value is labelled with its factors, front to back, and what an operation pairs is made one. A
    factor is free where all operations that meet it, from the model's inputs to its outputs, are known to give the same
    result in another order. `how` names the tracer: only torch.export gives operations and sizes in full.

    Given:   %h = silu(linear(%x, %gate)) * linear(%x, %up);  %y = linear(%h, %down)
    Result:  rows of %gate, rows of %up and columns of %down are one factor; its order is free
    """
    if not how.startswith("torch.export"):
        return ChannelMap((), {site.name: f"the model was traced by {how}, without sizes" for site in sites})
    labels = Labels(Axes(), _Lookup(module, aliases), RULES, pointwise)
    labels.walk(module.graph)
    found: dict[int, list[str]] = {}
    fixed: dict[str, str] = {}
    for site in sites:
        leaf = _fastest(labels, site)
        reason = leaf if isinstance(leaf, str) else labels.axes.reason(leaf)
        if reason is not None:
            fixed[site.name] = reason
        elif isinstance(leaf, int):
            found.setdefault(leaf, []).append(site.name)
    blocks = _Blocks(labels)
    return ChannelMap(tuple(_channels(labels, leaf, names, blocks.of(leaf)) for leaf, names in found.items()), fixed)


class _Lookup:
    """Look up the tensors of a traced module."""

    def __init__(self, module: fx.GraphModule, aliases: Mapping[str, tuple[str, ...]]) -> None:
        self._module = module
        self._aliases = aliases
        self._stored = frozenset(module.state_dict())
        firsts = {names[0] for names in aliases.values()}
        places = Counter(dotted(module, name).untyped_storage().data_ptr() for name in firsts)
        self._shared = {place for place, count in places.items() if count > 1}

    def __call__(self, name: str) -> Attribute | None:
        """Return what the name stands for; None where it is no tensor. A part of another's storage cannot move."""
        value = dotted(self._module, name)
        if not isinstance(value, Tensor):
            return None
        first = self._aliases.get(name, (name,))[0]
        kept = first in self._stored and value.untyped_storage().data_ptr() not in self._shared
        return Attribute(first, tuple(value.shape), kept)


def _fastest(labels: Labels, site: Site) -> int | str:
    """Return the factor along which a site's neighbouring inputs lie, or why it has none."""
    if site.layout is None or site.parameter not in labels.parameters:
        return site.refusal or "its inputs are not seen in the trace"
    transposed = not isinstance(site.layout, ConvLayout) and site.layout.transposed
    leaves = labels.axes.leaves(labels.parameters[site.parameter][0 if transposed else 1])
    return leaves[-1] if leaves else "it has one input"


class _Blocks:
    """Which factors may number blocks whose channels are each ordered by themselves.

    An order of `leaf` that depends on the position along another factor needs that factor wherever `leaf` is, once
    each, and no operation that mixes positions along it while `leaf` stays.
    """

    def __init__(self, labels: Labels) -> None:
        axes = labels.axes
        self._together: dict[int, set[int]] = {}
        self._first: dict[int, Factors] = {}
        for label in (*labels.parameters.values(), *labels.values):
            leaves = axes.leaves(factor for axis in label for factor in axis)
            counts = Counter(leaves)
            once = {leaf for leaf, count in counts.items() if count == 1}
            for leaf in counts:
                beside = once - {leaf} if leaf in once else set()
                self._together[leaf] = self._together.get(leaf, beside) & beside
                self._first.setdefault(leaf, leaves)
        for mixed, label in labels.mixed:
            along = set(axes.leaves(mixed))
            for leaf in set(axes.leaves(factor for axis in label for factor in axis)) - along:
                self._together[leaf] -= along
        self._numbers = {leaf for leaf in self._together if not axes.size(leaf).free}

    def of(self, leaf: int) -> Factors:
        """Return the factors that number the blocks of `leaf`, in the order of the first parameter that has it."""
        return tuple(other for other in self._first[leaf] if other in self._together[leaf] & self._numbers)


def _channels(labels: Labels, leaf: int, sites: Sequence[str], blocks: Factors) -> Channels:
    sizes = {factor: _length(labels, factor) for factor in (leaf, *blocks)}
    members = []
    for name, label in labels.parameters.items():
        leaves = labels.axes.leaves(factor for axis in label for factor in axis)
        if leaf in leaves:
            shape = tuple(_length(labels, factor) for factor in leaves)
            channels = tuple(at for at, factor in enumerate(leaves) if factor == leaf)
            ends = tuple(accumulate(len(labels.axes.leaves(axis)) for axis in label))
            members.append(Member(name, shape, ends, channels, tuple(leaves.index(block) for block in blocks)))
    return Channels(sizes[leaf], prod(sizes[block] for block in blocks), tuple(members), tuple(sites))


def _length(labels: Labels, leaf: int) -> int:
    size = labels.axes.size(leaf)
    assert not size.free, "the axes of parameters have fixed lengths"
    return size.number
