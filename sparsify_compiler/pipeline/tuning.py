"""Measure kernels for pruned sites: equal weights are measured once, and every site gets its own verdict in words."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sparsify_compiler.export.report import Timing
from sparsify_compiler.kernel import Packed
from sparsify_compiler.passes.lower import Lowerable
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.runtime.cache import DiskCache
from sparsify_compiler.runtime.candidates import Budget
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.modules import SparseLinear
from sparsify_compiler.runtime.selftest import SelfTest, Tester
from sparsify_compiler.runtime.tune import spec_key, tune
from sparsify_compiler.runtime.verdicts import Verdict


@dataclass
class Tuner:
    """Tune at `tokens` rows in `dtype` on `device`; verdicts are remembered by what decides them.

    `cache` is the folder that keeps verdicts and self-tests for later runs (`runtime.cache.default_folder` is the
    user's own), None for none. `tester` tries kernels before they run here, None trusts them; its child process ends
    with `close` or the `with` that holds the tuner. `budget` bounds the time for one specification, `dense_copy`
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
    _known: dict[Hashable, Verdict] = field(default_factory=dict)

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

    def verdicts(self, parts: Mapping[str, Lowerable], patterns: Mapping[str, Pattern]) -> dict[str, Verdict]:
        """Return the verdict for every pruned weight by site name, and tell `progress` after each."""
        found = {}
        for number, (name, part) in enumerate(parts.items()):
            self.progress("tune", number, len(parts))
            found[name] = self.verdict(part, patterns[name])
        self.progress("tune", len(parts), len(parts))
        return found

    def verdict(self, part: Lowerable, pattern: Pattern) -> Verdict:
        """Return the verdict for one pruned weight, measured now or known from an equal one."""
        packed = self.pack(part, pattern)
        spec = spec_for(packed, self.tokens, self.device)
        bias = None if part.bias is None else part.bias.detach().to(self.device, self.dtype)
        key = spec_key(spec, bias is not None)
        if key not in self._known:
            self._known[key] = tune(
                packed,
                spec,
                kernels(),
                bias,
                budget=self.budget,
                tester=self.tester,
                cache=None if self.cache is None else DiskCache(self.cache),
                dense_copy=self.dense_copy,
            )
        return self._known[key]

    def pack(self, part: Lowerable, pattern: Pattern) -> Packed:
        """Pack the weight in the dtype and on the device it is measured in."""
        weight = part.weight.to(self.device, self.dtype)
        return format_for(pattern).pack(weight, part.keep.to(self.device), pattern, part.site.run)

    def build(self, part: Lowerable, pattern: Pattern, kernel: str, variants: str = "") -> nn.Module:
        """Make the module that runs the weight on `kernel` and its `variants`, on the device it was measured on."""
        bias = None if part.bias is None else part.bias.to(self.device, self.dtype)
        return SparseLinear(self.pack(part, pattern), bias, kernel, self.tokens, variants)


def timings(verdict: Verdict) -> tuple[Timing, ...]:
    """Bring a tuner's timings into the report's form."""
    return tuple(Timing(**vars(timing)) for timing in verdict.timings)


def words(verdicts: Mapping[str, Verdict]) -> str:
    """Sum up what the tuner found, for `require_sparse` and the report's notes."""
    dense = sorted(name for name, verdict in verdicts.items() if verdict.kernel == "dense")
    if not dense:
        return f"all {len(verdicts)} measured sites run a sparse kernel"
    first = verdicts[dense[0]]
    return f"{len(dense)} of {len(verdicts)} measured sites stay dense; {dense[0]}: {first.reason}"
