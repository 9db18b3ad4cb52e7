"""Bring kernels to the start line: checked on the real weight, loaded into the stopwatch, their variants sorted out."""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError, first_line
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.oracle import Expected, expected
from sparsify_compiler.runtime.tuning.cold import cold_copies, prepared_bytes, release
from sparsify_compiler.runtime.tuning.timing import Call, Measure, Stopwatch
from sparsify_compiler.runtime.variants import write_variants

CHECKED_ROWS = 64


@dataclass(frozen=True)
class Budget:
    """How long to measure one specification.

    Rounds go on until `seconds` are spent, but at least `least_rounds` and at most `most_rounds`. After
    `look_rounds` a candidate whose total is still below `hopeless` times dense in every round is timed no further, but
    at the token counts where it is not: there a routed kernel may want it. Checking and warming up come before the
    clock starts.

    Before that the variants of each kernel compete at each token count: all are timed for `variant_rounds` rounds and
    the faster half goes on, until one is left. After `variant_seconds` in one kernel no further variants are loaded
    (the kernel's own choice always is), and where that choice takes more than 1 / `hopeless_variant` times as long as
    dense no others are tried.
    """

    seconds: float = 0.5
    least_rounds: int = 5
    most_rounds: int = 30
    look_rounds: int = 3
    hopeless: float = 0.5
    variant_rounds: int = 3
    variant_seconds: float = 20.0
    hopeless_variant: float = 0.25


@dataclass(frozen=True)
class Job:
    """One weight to tune: by token count its inputs (tokens, in) and their float64 results at the checked rows."""

    packed: Packed
    spec: MatmulSpec
    inputs: Mapping[int, Tensor]
    expected: Mapping[int, Expected]
    bias: Tensor | None
    activation: Activation | None
    watch: Stopwatch
    budget: Budget


@dataclass(frozen=True)
class Candidate:
    """A kernel ready to be measured: by token count its measure and the variant that it runs ("" its own choice)."""

    measures: Mapping[int, Measure]
    variants: Mapping[int, str]
    size_bytes: int
    note: str


@dataclass(frozen=True)
class Refusal:
    """Why a kernel may not run. `lasting` False: it may be otherwise next time."""

    reason: str
    lasting: bool = True


def job_for(
    packed: Packed,
    spec: MatmulSpec,
    bias: Tensor | None,
    activation: Activation | None,
    watch: Stopwatch,
    budget: Budget,
) -> Job:
    """Draw the inputs on the CPU from a fixed seed, so that all machines tune on the same numbers.

    Raises:
        KernelError: they do not fit into memory.
    """
    generator = torch.Generator().manual_seed(0)
    weight = unpack(packed).to(spec.device)
    inputs, results = {}, {}
    for tokens in dict.fromkeys(spec.tokens):
        try:
            x = torch.randn(tokens, spec.in_, generator=generator).to(spec.device, spec.dtype)
            inputs[tokens], results[tokens] = x, expected(x[checked_rows(tokens)], weight, bias, activation)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise KernelError(
                f"cannot tune ({spec.out}, {spec.in_}) at {tokens} tokens: inputs of {tokens * spec.in_} {spec.dtype} "
                f"do not fit into memory ({first_line(error)}); ask for fewer tokens"
            ) from None
    return Job(packed, spec, inputs, results, bias, activation, watch, budget)


def checked_rows(tokens: int) -> list[int]:
    """Return the first and last rows of a result: comparing all would cost more than the measurement."""
    if tokens <= CHECKED_ROWS:
        return list(range(tokens))
    return [*range(CHECKED_ROWS // 2), *range(tokens - CHECKED_ROWS // 2, tokens)]


def load(
    kernel: Kernel, job: Job, dense: Mapping[int, Measure] | None = None, capture: bool = True
) -> Candidate | Refusal:
    """Check a kernel at every token count, find its best variants and load it, or say why it cannot be used.

    `dense` are the measures to compare with; None takes the kernel's own choice of variant. `capture` False keeps
    its calls out of CUDA graphs.
    """
    if reason := kernel.rejects(job.spec):
        return Refusal(reason)
    try:
        found = _Loader(kernel, job, capture).load(dense)
    except (RuntimeError, MemoryError, KernelError) as error:  # what PyTorch and kernels raise for what they cannot run
        lasting = not is_out_of_memory(error)
        found = Refusal(f"{'failed' if lasting else 'out of memory'}: {first_line(error)}", lasting)
    if isinstance(found, Refusal):
        release(job.spec.device)
    return found


class _Loader:
    """Load one kernel: its copies serve all token counts and variants."""

    def __init__(self, kernel: Kernel, job: Job, capture: bool) -> None:
        self.kernel, self.job, self.capture = kernel, job, capture
        self.prepared = kernel.prepare(job.packed, job.spec)
        self.copies, note = cold_copies(self.prepared, job.spec.device)
        self.notes = [note]
        self.deadline = job.watch.now() + job.budget.variant_seconds

    def load(self, dense: Mapping[int, Measure] | None) -> Candidate | Refusal:
        measures: dict[int, Measure] = {}
        variants: dict[int, str] = {}
        for tokens in self.job.inputs:
            names = self.kernel.variants(self.job.spec, tokens) or ("",)
            if wrong := self.wrong(names[0], tokens):
                return Refusal(wrong)
            own = self.measure(names[0], tokens)
            variants[tokens], measures[tokens] = names[0], own
            if dense is not None and len(names) > 1 and self._hopeful(own, dense[tokens]):
                best, measures[tokens] = self._best(names, own, tokens)
                if best != names[0] and (wrong := self.wrong(best, tokens)):
                    return Refusal(wrong)
                variants[tokens] = best
            self.notes.append(measures[tokens].note)
        note = "; ".join(dict.fromkeys(filter(None, self.notes)))
        return Candidate(measures, variants, prepared_bytes(self.prepared), note)

    def measure(self, variant: str, tokens: int) -> Measure:
        label = f"{self.kernel.name} {variant} {tokens}" if variant else f"{self.kernel.name} {tokens}"
        x = self.job.inputs[tokens]
        chosen = (self._chosen(copy, variant, tokens) for copy in self.copies)
        return self.job.watch.load(label, [self._call(copy, x) for copy in chosen], self.capture)

    def wrong(self, variant: str, tokens: int) -> str | None:
        """Compare the kernel's result on the real weight with float64; None, or what is wrong."""
        chosen = self._chosen(self.prepared, variant, tokens)
        y = self.kernel.run(chosen, self.job.inputs[tokens], self.job.bias, self.job.activation)
        rows = checked_rows(tokens)
        wrong = self.job.expected[tokens].difference(y[rows] if y.shape[0] == tokens else y)
        called = f" by variant {variant}" if variant else ""
        return f"wrong result for {tokens} tokens{called}: {wrong}" if wrong else None

    def _hopeful(self, own: Measure, dense: Measure) -> bool:
        return dense() >= self.job.budget.hopeless_variant * own()

    def _best(self, names: tuple[str, ...], own: Measure, tokens: int) -> tuple[str, Measure]:
        """Halve the variants by their medians until one is left."""
        alive = {names[0]: own}
        for name in names[1:]:
            if self.job.watch.now() > self.deadline:
                self.notes.append(f"{len(names) - len(alive)} variants not tried at {tokens} tokens for lack of time")
                break
            alive[name] = self.measure(name, tokens)
        times: dict[str, list[float]] = {name: [] for name in alive}
        while len(alive) > 1:
            for _ in range(self.job.budget.variant_rounds):
                for name, measure in alive.items():
                    times[name].append(measure())
            order = sorted(alive, key=lambda name: statistics.median(times[name]))
            alive = {name: alive[name] for name in order[: (len(order) + 1) // 2]}
        return next(iter(alive.items()))

    def _chosen(self, prepared: Prepared, variant: str, tokens: int) -> Prepared:
        return dataclasses.replace(prepared, variants=write_variants({tokens: variant}))

    def _call(self, prepared: Prepared, x: Tensor) -> Call:
        return lambda: self.kernel.run(prepared, x, self.job.bias, self.job.activation)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is about memory: CUDA's, Python's, or the RuntimeError of PyTorch's CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
