"""Kernels that are dense products under other names, and a stopwatch that reads its times from a script."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.tuning.timing import Measure
from sparsify_compiler.runtime.tuning.tune import Budget, Verdict, tune
from sparsify_compiler.runtime.variants import variant_for

Times = Mapping[tuple[str, int], Sequence[float]]


@dataclass(frozen=True)
class Fake:
    """A dense product under another name, wrong by `offset`, or failing with `error`.

    `choices` are its variants by token count; the one called "wrong" is off by one.
    """

    name: str
    offset: float = 0.0
    refusal: str | None = None
    error: Exception | None = None
    choices: Mapping[int, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def rejects(self, spec: MatmulSpec) -> str | None:
        return self.refusal

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        return self.choices.get(tokens, ("",))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        return Prepared(self.name, packed.shape, (unpack(packed),))

    def run(
        self,
        prepared: Prepared,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        if self.error:
            raise self.error
        off = self.offset + (variant_for(prepared.variants, x.shape[0]) == "wrong")
        return torch.nn.functional.linear(x, prepared.tensors[0], bias) + off


@dataclass
class Script:
    """A stopwatch that reads microseconds from a script by (kernel, tokens), round after round.

    A variant is part of the name: ("kernel variant", tokens). `notes` are what it says of a kernel.
    """

    times: Times
    notes: Mapping[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    captured: dict[str, bool] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    spent: float = 0.0

    def load(self, label: str, calls: Sequence[Callable[[], object]], capture: bool = True) -> Measure:
        name, tokens = label.rsplit(" ", 1)
        self.captured[name] = capture
        self.calls[label] = len(calls)
        calls[-1]()
        following = itertools.cycle(self.times[name, int(tokens)])

        def measure() -> float:
            self.order.append(label)
            value = next(following)
            self.spent += value / 1e6
            return value

        return Measure(measure, self.notes.get(name, ""))

    def now(self) -> float:
        return self.spent


def packed() -> Packed:
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    return format_for(NM(2, 4)).pack(weight, NM(2, 4).select(weight.abs(), 0.5), NM(2, 4))


def decide(
    times: Times, *fakes: Fake, tokens: tuple[int, ...] = (1,), dense_copy: bool = False, **budget: float
) -> tuple[Verdict, Script]:
    """Tune the fakes against a fake dense by a script."""
    script = Script(times)
    limits = dataclasses.replace(Budget(most_rounds=8), **budget)
    spec = spec_for(packed(), tokens)
    kernels = (*fakes, Fake("dense"))
    return tune(packed(), spec, kernels, budget=limits, stopwatch=script, dense_copy=dense_copy), script
