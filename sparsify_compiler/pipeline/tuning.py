"""Measure kernels for pruned sites: equal weights are measured once, and every site gets its own verdict in words."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, call
from sparsify_compiler.frontends.torch_trace import inference
from sparsify_compiler.graph import ConvLayout, Site
from sparsify_compiler.kernel import Packed
from sparsify_compiler.passes.lower import Lowerable
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.layers.conv import SparseConv2d
from sparsify_compiler.runtime.layers.conv_windows import ConvGeometry, is_channels_last
from sparsify_compiler.runtime.layers.modules import SparseLinear
from sparsify_compiler.runtime.tuning.cache import DiskCache, Key, layer_key
from sparsify_compiler.runtime.tuning.candidates import Budget
from sparsify_compiler.runtime.tuning.selftest import SelfTest, Tester
from sparsify_compiler.runtime.tuning.tune import tune
from sparsify_compiler.runtime.tuning.tune_conv import ConvInput, ConvProblem, tune_conv
from sparsify_compiler.runtime.tuning.verdicts import Verdict


@dataclass
class Tuner:
    """Tune at `tokens` rows in `dtype` on `device`; verdicts are remembered by what decides them.

    `cache` is the folder that keeps verdicts and self-tests for later runs (`runtime.tuning.cache.default_folder` is
    the user's own), None for none. `tester` tries kernels before they run here, None trusts them; its child process
    ends with `close` or the `with` that holds the tuner. `budget` bounds the time for one specification, `dense_copy`
    lets a layer keep its dense weight beside the sparse one for the token counts where dense wins.
    """

    tokens: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    progress: Progress = silent
    cache: Path | None = None
    budget: Budget = field(default_factory=Budget)
    dense_copy: bool = False
    tester: Tester | None = field(default_factory=SelfTest)
    _known: dict[str, Verdict] = field(default_factory=dict)

    def __enter__(self) -> "Tuner":
        """Return itself."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End the self-tests' child process; a later measurement starts another."""
        if isinstance(self.tester, SelfTest):
            self.tester.close()

    def verdicts(
        self,
        parts: Mapping[str, Lowerable],
        patterns: Mapping[str, Pattern],
        inputs: Mapping[str, ConvInput] | None = None,
    ) -> dict[str, Verdict]:
        """Return the verdict for every pruned weight by site name, and tell `progress` after each.

        `inputs` are what the convolutions among them are fed.
        """
        found = {}
        for number, (name, part) in enumerate(parts.items()):
            self.progress("tune", number, len(parts))
            fed = (inputs or {}).get(name)
            found[name] = self.verdict(part, patterns[name]) if fed is None else self.conv(part, patterns[name], fed)
        self.progress("tune", len(parts), len(parts))
        return found

    def verdict(self, part: Lowerable, pattern: Pattern) -> Verdict:
        """Return the verdict for one pruned weight, measured now or known from an equal one."""
        (packed,) = self.pack(part, pattern)
        spec = spec_for(packed, self.tokens, self.device)
        bias = self._bias(part)
        key = _text(layer_key(spec, bias is not None, None))
        if key not in self._known:
            self._known[key] = tune(
                packed,
                spec,
                kernels(),
                bias,
                budget=self.budget,
                tester=self.tester,
                cache=self._disk(),
                dense_copy=self.dense_copy,
            )
        return self._known[key]

    def conv(self, part: Lowerable, pattern: Pattern, fed: ConvInput) -> Verdict:
        """Return the verdict for one pruned convolution on the input it is fed, measured now or known."""
        problem = ConvProblem(self.pack(part, pattern), conv_geometry(part.site), fed, self._bias(part))
        key = _text(problem.key())
        if key not in self._known:
            self._known[key] = tune_conv(problem, kernels(), self.budget, tester=self.tester, cache=self._disk())
        return self._known[key]

    def pack(self, part: Lowerable, pattern: Pattern) -> tuple[Packed, ...]:
        """Pack the weight in the dtype and on the device it is measured in, one a group."""
        site = part.site
        weights = part.weight.to(self.device, self.dtype).reshape(site.groups, -1, site.in_)
        keeps = part.keep.to(self.device).reshape(weights.shape)
        form = format_for(pattern)
        return tuple(form.pack(w, k, pattern, site.run) for w, k in zip(weights, keeps, strict=True))

    def build(self, part: Lowerable, pattern: Pattern, kernel: str, variants: str = "") -> nn.Module:
        """Make the module that runs the weight on `kernel` and its `variants`, on the device it was measured on."""
        packed, bias = self.pack(part, pattern), self._bias(part)
        if part.bias is not None and bias is not None:
            bias.requires_grad_(part.bias.requires_grad)
        if isinstance(part.site.layout, ConvLayout):
            geometry = conv_geometry(part.site)
            return SparseConv2d(packed, geometry, bias, kernel, self.tokens, variants, offload=True)
        return SparseLinear(packed[0], bias, kernel, self.tokens, variants, offload=True)

    def _disk(self) -> DiskCache | None:
        return None if self.cache is None else DiskCache(self.cache)

    def _bias(self, part: Lowerable) -> Tensor | None:
        return None if part.bias is None else part.bias.detach().to(self.device, self.dtype)


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def conv_geometry(site: Site) -> ConvGeometry:
    """Describe a site's 2-d convolution to the runtime; sites pad with zeros, or are refused before."""
    layout = site.layout
    assert isinstance(layout, ConvLayout)
    pairs = [(values[0], values[1]) for values in (layout.kernel, layout.stride, layout.dilation)]
    padding = (layout.padding[0], layout.padding[1])
    return ConvGeometry(site.run * site.groups, pairs[0], pairs[1], padding, pairs[2], site.groups)


def conv_inputs(module: nn.Module, names: Collection[str], batch: Batch) -> dict[str, ConvInput]:
    """Run one batch through `module` and return what its convolutions are fed; those it does not reach are missing."""
    found: dict[str, ConvInput] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(conv: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = inputs[0] if inputs else named["input"]
            x = given if given.dim() == 4 else given.unsqueeze(0)
            found[name] = ConvInput((x.shape[0], x.shape[1], x.shape[2], x.shape[3]), is_channels_last(x))

        return note

    hooks = [module.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in names]
    try:
        with inference(module):
            call(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def words(verdicts: Mapping[str, Verdict]) -> str:
    """Count for the report's notes where sparse kernels won; why is told site by site."""
    sparse = sum(verdict.kernel != "dense" for verdict in verdicts.values())
    if sparse == len(verdicts):
        return f"all {sparse} measured sites run a sparse kernel"
    return f"a sparse kernel won at {sparse} of {len(verdicts)} measured sites; the others run dense"
