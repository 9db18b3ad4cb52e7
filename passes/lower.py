"""Swap pruned linear layers and convolutions for sparse modules where a measured verdict says so.

    Given:   %y = linear(%x, weight=%w)          # %w (768, 3072), 90 % of its entries zero
    Result:  %y = sparse_linear(%x, packed=%w1)  # where a kernel beat dense at the user's token counts

What is measured and what is built are arguments: this pass knows neither kernels nor timers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sparsify_compiler.frontends.layout import to_problem
from sparsify_compiler.graph import ConvLayout, Site


class Verdict(Protocol):
    """What a tuner says of one weight."""

    @property
    def kernel(self) -> str:
        """The kernel that won, "dense" where none beat it."""
        ...

    @property
    def reason(self) -> str:
        """Why, in words."""
        ...


@dataclass(frozen=True)
class Lowerable:
    """A pruned site with its weight (out, in), keep mask (out, in) bool and bias (out,), as the module holds them.

    A convolution's rows are tap-major, (groups * out, in), those of the first group first.
    """

    site: Site
    weight: Tensor
    keep: Tensor
    bias: Tensor | None


Measure = Callable[[Lowerable], Verdict]
Build = Callable[[Lowerable, str], nn.Module]


def lowerable(module: nn.Module, site: Site, keep: Tensor) -> Lowerable | str:
    """Say whether a pruned site may run a sparse kernel in the torch module; else the reason in words.

    `keep` is (groups, out, in) bool. The site's module must be a Linear (or a Hugging Face Conv1D) or a Conv2d of its
    own.
    """
    if isinstance(site.layout, ConvLayout) and len(site.layout.kernel) != 2:
        return f"{site.kind} runs dense: only 2-d convolutions have a sparse layer"
    if site.calls != 1:
        return f"the weight is used at {site.calls} places"
    owner = dict(module.named_modules()).get(site.name)
    convolution = isinstance(site.layout, ConvLayout)
    if convolution and not isinstance(owner, nn.Conv2d):
        return "the convolution is not a Conv2d module of its own, so there is nothing to swap"
    if not convolution and not isinstance(owner, nn.Linear) and type(owner).__name__ != "Conv1D":
        return "the product is not a Linear module of its own, so there is nothing to swap"
    parent = module.get_submodule(site.name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{type(parent).__name__} reads the weight itself at inference, past the Linear module"
    assert site.layout is not None
    weight = to_problem(owner.weight.detach(), site.layout)  # type: ignore[union-attr]  # all kinds hold a tensor
    bias = owner.bias  # type: ignore[union-attr]
    rows, kept = weight.reshape(-1, site.in_), keep.reshape(-1, site.in_).to(weight.device)
    return Lowerable(site, rows, kept, bias if isinstance(bias, Tensor) else None)


def lower(module: nn.Module, chosen: Mapping[str, str], parts: Mapping[str, Lowerable], build: Build) -> int:
    """Swap the sites in `chosen` (name to kernel) in `module`, in place; "dense" ones stay. Returns how many."""
    swapped = 0
    for name, kernel in chosen.items():
        if kernel == "dense":
            continue
        owner_name, _, leaf = name.rpartition(".")
        sparse = build(parts[name], kernel)
        sparse.train(module.training)
        setattr(module.get_submodule(owner_name), leaf, sparse)
        swapped += 1
    return swapped
