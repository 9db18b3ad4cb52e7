"""Which kernel runs a convolution: SparseConv2d as a whole, windows included, against `functional.conv2d`.

The order of tune.py: the kernel's own word, a self-test of the product in a child process, a check against
float64, then rounds in turn with dense. What differs: inputs are images, there is one size of them, the one the model
was seen to feed the layer, and weights stay warm for both, for a convolution reads far more of its input.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.errors import KernelError, first_line
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.layers.conv import SparseConv2d
from sparsify_compiler.runtime.layers.conv_windows import ConvGeometry
from sparsify_compiler.runtime.oracle import Expected, expected
from sparsify_compiler.runtime.tuning.cache import DiskCache, Key, layer_key, verdict_key
from sparsify_compiler.runtime.tuning.candidates import Budget, Refusal, checked_rows, is_out_of_memory
from sparsify_compiler.runtime.tuning.cold import release
from sparsify_compiler.runtime.tuning.gate import Gate
from sparsify_compiler.runtime.tuning.selftest import Tester
from sparsify_compiler.runtime.tuning.timing import Measure, Stopwatch, stopwatch_for
from sparsify_compiler.runtime.tuning.verdicts import DENSE, Measured, Verdict, choose, timing
from sparsify_compiler.runtime.variants import write_variants


@dataclass(frozen=True)
class ConvInput:
    """What the model feeds a convolution: (images, channels, height, width), and whether channels lie last."""

    shape: tuple[int, int, int, int]
    channels_last: bool = False


@dataclass(frozen=True)
class ConvProblem:
    """One pruned convolution: its weight, packed once a group, on the device to measure on, and its input."""

    packed: tuple[Packed, ...]
    geometry: ConvGeometry
    input: ConvInput
    bias: Tensor | None = None
    activation: Activation | None = None

    @property
    def tokens(self) -> int:
        """Output positions of all images: the rows of each product."""
        high, wide = self.geometry.out_size(*self.input.shape[2:])
        return self.input.shape[0] * high * wide

    def spec(self) -> MatmulSpec:
        """Describe the product of one group."""
        run = self.geometry.run if self.geometry.run != self.geometry.columns else None
        return spec_for(self.packed[0], (self.tokens,), run=run)

    def key(self) -> Key:
        """Return what decides the verdict on one machine: that of the product, the geometry and the input."""
        whole = {"geometry": asdict(self.geometry), "input": asdict(self.input)}
        return {**layer_key(self.spec(), self.bias is not None, self.activation), **whole}

    def module(self, kernel: str, variants: str = "") -> SparseConv2d:
        """Build the layer on a kernel. Raises KernelError where it cannot run."""
        bias = None if self.bias is None else self.bias.detach()
        return SparseConv2d(self.packed, self.geometry, bias, kernel, (self.tokens,), variants, self.activation)


def tune_conv(
    problem: ConvProblem,
    kernels: Sequence[Kernel],
    budget: Budget | None = None,
    stopwatch: Stopwatch | None = None,
    tester: Tester | None = None,
    cache: DiskCache | None = None,
) -> Verdict:
    """Time `kernels` on standard normal images of the problem's size; "dense" among them stands for conv2d itself.

    `tester` tries every kernel first, None trusts them. `cache` gives and keeps verdicts and self-tests.

    Raises:
        KernelError: the input is too small for the kernel, or does not fit into memory.
    """
    spec, budget = problem.spec(), budget or Budget()
    how = {**asdict(budget), "self-tested": tester is not None}
    key = verdict_key(problem.key(), kernels, spec.device, how) if cache else {}
    if cache and (known := cache.verdict(key)):
        return known
    gate = Gate(spec, problem.bias is not None, problem.activation, tester, cache)
    with torch.no_grad(), torch.autocast(spec.device.type, enabled=False):  # as the layers run their kernels
        rivals = _start(problem, budget, stopwatch or stopwatch_for(spec.device))
        asked = (kernel for kernel in kernels if kernel.name != DENSE)
        found = {kernel.name: refusal for kernel in asked if (refusal := rivals.admit(kernel, gate))}
        verdict = rivals.verdict({name: refusal.reason for name, refusal in found.items()})
    release(spec.device)
    images = "x".join(str(side) for side in problem.input.shape)
    verdict = replace(verdict, reason=f"{verdict.reason} (the whole convolution, at input {images})")
    if cache and all(refusal.lasting for refusal in found.values()):
        cache.keep_verdict(key, verdict)
    return verdict


def _start(problem: ConvProblem, budget: Budget, watch: Stopwatch) -> "_Rivals":
    try:
        return _Rivals(problem, budget, watch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        images = "x".join(str(side) for side in problem.input.shape)
        raise KernelError(
            f"cannot tune a convolution at input {images}: it does not fit into memory ({first_line(error)}); "
            f"calibrate with smaller batches"
        ) from None


class _Rivals:
    """The dense convolution and the layers that were let in, ready to be measured."""

    def __init__(self, problem: ConvProblem, budget: Budget, watch: Stopwatch) -> None:
        self.problem, self.budget, self.watch = problem, budget, watch
        self.x = _images(problem)
        self.some = [0, -1] if self.x.shape[0] > 1 else [0]  # the results of all would cost more than the measurement
        self.expected = _expected(problem, self.x[self.some])
        self.measures = {DENSE: self._load(DENSE, DenseConv(problem))}
        self.variants = {DENSE: ""}
        self.bytes = {DENSE: sum(part.shape[0] * part.shape[1] for part in problem.packed) * self.x.element_size()}
        self.notes: dict[str, str] = {}

    def admit(self, kernel: Kernel, gate: Gate) -> Refusal | None:
        """Check every variant of a kernel and load the fastest, or say why it cannot be used."""
        outcome = gate.ask(kernel)
        if outcome.refused is not None:
            return Refusal(outcome.refused, outcome.lasting)
        try:
            return self._race(kernel, gate.spec, outcome.uncapturable is None)
        except (RuntimeError, MemoryError, KernelError) as error:  # what PyTorch and kernels raise for what they cannot
            lasting = not is_out_of_memory(error)
            return Refusal(f"{'failed' if lasting else 'out of memory'}: {first_line(error)}", lasting)

    def _race(self, kernel: Kernel, spec: MatmulSpec, capture: bool) -> Refusal | None:
        tokens, deadline = spec.tokens[0], self.watch.now() + self.budget.variant_seconds
        found: dict[str, Measure] = {}
        untried = ""
        names = kernel.variants(spec, tokens) or ("",)
        for variant in names:
            if found and self.watch.now() > deadline:
                untried = f"{len(names) - len(found)} variants not tried for lack of time"
                break
            layer = self.problem.module(kernel.name, write_variants({tokens: variant}))
            if wrong := self._wrong(layer(self.x)):
                return Refusal(f"wrong result{f' by variant {variant}' if variant else ''}: {wrong}")
            found[variant] = self._load(f"{kernel.name} {variant}".rstrip(), layer, capture)
        times = {name: statistics.median(m() for _ in range(self.budget.variant_rounds)) for name, m in found.items()}
        best = min(times, key=lambda name: times[name])
        self.variants[kernel.name], self.measures[kernel.name] = best, found[best]
        self.notes[kernel.name] = "; ".join(filter(None, (untried, found[best].note)))
        self.bytes[kernel.name] = sum(t.numel() * t.element_size() for part in layer.parts for t in part.prepared)
        return None

    def verdict(self, refused: Mapping[str, str]) -> Verdict:
        """Measure in rounds and choose."""
        if len(self.measures) == 1:
            return Verdict(DENSE, "dense: no sparse kernel can run this convolution", (), refused)
        tokens = self.problem.tokens
        times = {name: {tokens: found} for name, found in self._rounds().items()}
        variants = {name: {tokens: variant} for name, variant in self.variants.items()}
        measured = Measured(times, variants, self.bytes, self.notes)
        choice = choose(measured, routes=False)
        rows = tuple(timing(name, tokens, measured) for name in times if name != DENSE)
        written = write_variants(variants[choice.name])
        rounds = len(times[DENSE][tokens])
        return Verdict(choice.name, choice.reason, rows, refused, rounds, written, self.bytes, choice.busy)

    def _rounds(self) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in self.measures}
        active, start = list(self.measures), self.watch.now()
        for done in range(self.budget.most_rounds):
            if done >= self.budget.least_rounds and self.watch.now() - start > self.budget.seconds:
                break
            if done == self.budget.look_rounds:
                pairs = {name: zip(times[DENSE], times[name], strict=True) for name in active}
                active = [n for n in active if n == DENSE or any(d >= self.budget.hopeless * s for d, s in pairs[n])]
            if active == [DENSE]:
                break
            for name in active:
                times[name].append(self.measures[name]())
        return times

    def _load(self, name: str, layer: torch.nn.Module, capture: bool = True) -> Measure:
        return self.watch.load(f"{name} {self.problem.tokens}", [lambda: layer(self.x)], capture)

    def _wrong(self, y: Tensor) -> str | None:
        positions = y[self.some].permute(0, 2, 3, 1).reshape(-1, y.shape[1])
        groups = positions[checked_rows(len(positions))].chunk(len(self.expected), dim=1)
        found = (known.difference(rows) for known, rows in zip(self.expected, groups, strict=True))
        return next((wrong for wrong in found if wrong), None)


class DenseConv(torch.nn.Module):
    """The convolution that a user would run: `functional.conv2d` on the dense weight in the input's own order."""

    def __init__(self, problem: ConvProblem) -> None:
        """Unpack the weight."""
        super().__init__()
        self.geometry, self.bias, self.activation = problem.geometry, problem.bias, problem.activation
        order = torch.channels_last if problem.input.channels_last else torch.contiguous_format
        self.weight = problem.module(DENSE).weight.contiguous(memory_format=order)

    def forward(self, x: Tensor) -> Tensor:
        """Return (images, out, height, width)."""
        geometry = self.geometry
        symmetric = all(begin == end for begin, end in geometry.padding) and geometry.padding_mode == "zeros"
        padding = tuple(begin for begin, _ in geometry.padding) if symmetric else (0, 0)
        x = x if symmetric else geometry.pad(x)
        y = functional.conv2d(x, self.weight, self.bias, geometry.stride, padding, geometry.dilation, geometry.groups)
        return activate(y, self.activation)


def _expected(problem: ConvProblem, x: Tensor) -> tuple[Expected, ...]:
    """Compute the results for `x` in float64 at the checked ones of its positions, (rows, out / groups) a group."""
    whole = [torch.cat(parts) for parts in zip(*problem.geometry.rows(x), strict=True)]
    rows = [part[checked_rows(len(part))] for part in whole]
    bias = problem.bias
    biases = [None] * len(rows) if bias is None else list(bias.detach().chunk(len(rows)))
    weights = [unpack(part) for part in problem.packed]
    return tuple(expected(*part, problem.activation) for part in zip(rows, weights, biases, strict=True))


def _images(problem: ConvProblem) -> Tensor:
    """Draw the input on the CPU from a fixed seed, so that all machines tune on the same numbers."""
    values = problem.packed[0].tensors["values"]
    x = torch.randn(problem.input.shape, generator=torch.Generator().manual_seed(0)).to(values.device, values.dtype)
    return x.contiguous(memory_format=torch.channels_last if problem.input.channels_last else torch.contiguous_format)
