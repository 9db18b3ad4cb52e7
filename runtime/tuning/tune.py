"""Which kernel runs a weight: every candidate is tried, checked, then timed against dense in the same rounds.

Design rule 1, measured, never assumed: a kernel wins only when its gain over dense exceeds the spread of the
measurement. In this order, and each step may refuse a kernel with its reason in words:

    rejects         the kernel's own word on the specification (runtime/tuning/gate.py)
    self-test       a child process, so that a crash or a hang takes nothing down (runtime/tuning/selftest.py)
    check           its result on the real weight against float64, at every token count
    variants        those it names compete at each token count (runtime/tuning/candidates.py)
    rounds          all candidates and dense in turn (A B A B ...), weights cold (runtime/tuning/cold.py)
    verdict         medians and spreads (runtime/tuning/verdicts.py), kept on disk (runtime/tuning/cache.py)
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError, first_line
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed
from sparsify_compiler.runtime.routed import Routed
from sparsify_compiler.runtime.tuning.cache import DiskCache, layer_key, verdict_key
from sparsify_compiler.runtime.tuning.candidates import (
    Budget,
    Candidate,
    Job,
    Refusal,
    checked_rows,
    is_out_of_memory,
    job_for,
    load,
)
from sparsify_compiler.runtime.tuning.cold import prepared_bytes, release
from sparsify_compiler.runtime.tuning.gate import Gate
from sparsify_compiler.runtime.tuning.selftest import Tester
from sparsify_compiler.runtime.tuning.timing import Stopwatch, stopwatch_for
from sparsify_compiler.runtime.tuning.verdicts import (
    DENSE,
    Choice,
    Measured,
    Times,
    Timing,
    Verdict,
    choose,
    runs,
    single,
    timing,
)
from sparsify_compiler.runtime.variants import write_variants

__all__ = ["DENSE", "Budget", "Timing", "Verdict", "tune"]


def tune(
    packed: Packed,
    spec: MatmulSpec,
    kernels: Sequence[Kernel],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    budget: Budget | None = None,
    stopwatch: Stopwatch | None = None,
    tester: Tester | None = None,
    cache: DiskCache | None = None,
    dense_copy: bool = False,
) -> Verdict:
    """Time `kernels` (one of them named "dense") on standard normal inputs of `spec.tokens` rows; see the module.

    Weights are rotated through copies larger than twice the last-level cache, so every call reads them from memory; a
    candidate whose copies would not fit says so in the reason. `tester` tries every kernel but dense first, None
    trusts them. `cache` gives and keeps verdicts and self-tests. `dense_copy` lets dense be a part of a routed kernel,
    which costs the memory of the dense weight; without it the reason says what that would give.

    Raises:
        KernelError: no kernel is named "dense", dense itself cannot run, the inputs do not fit into memory, or
            `spec.tokens` is empty or holds a count below 1.
    """
    dense = next((kernel for kernel in kernels if kernel.name == DENSE), None)
    if dense is None or not spec.tokens or min(spec.tokens) < 1:
        names = ", ".join(kernel.name for kernel in kernels) or "none"
        raise KernelError(
            f"cannot tune ({spec.out}, {spec.in_}): needs a kernel named dense and token counts of at least 1; "
            f"found kernels {names} and tokens {spec.tokens}"
        )
    budget = budget or Budget()
    how = {**dataclasses.asdict(budget), "dense_copy": dense_copy, "self-tested": tester is not None}
    layer = layer_key(spec, bias is not None, activation)
    key = verdict_key(layer, kernels, spec.device, how) if cache else {}
    if cache and (known := cache.verdict(key)):
        return known
    watch = stopwatch or stopwatch_for(spec.device)
    gate = Gate(spec, bias is not None, activation, tester, cache)
    others = [kernel for kernel in kernels if kernel is not dense]
    with torch.no_grad(), torch.autocast(spec.device.type, enabled=False):  # as the layers run their kernels
        job = job_for(packed, spec, bias, activation, watch, budget)
        verdict, lasting = _tune(job, dense, others, gate, dense_copy)
    release(spec.device)
    if cache and lasting:
        cache.keep_verdict(key, verdict)
    return verdict


def _tune(job: Job, dense: Kernel, others: Sequence[Kernel], gate: Gate, dense_copy: bool) -> tuple[Verdict, bool]:
    """Return the verdict, and whether it would be the same next time as far as refusals go."""
    spec = job.spec
    first = load(dense, job)
    if isinstance(first, Refusal):
        raise KernelError(f"dense cannot run ({spec.out}, {spec.in_}) {spec.dtype}: {first.reason}")
    ready, refusals = {DENSE: first}, {}
    for kernel in others:
        found = _admit(kernel, job, gate, first)
        if isinstance(found, Refusal):
            refusals[kernel.name] = found
        else:
            ready[kernel.name] = found
    lasting = all(refusal.lasting for refusal in refusals.values())
    refused = {name: refusal.reason for name, refusal in refusals.items()}
    if len(ready) == 1:
        return Verdict(DENSE, "dense: no sparse kernel can run this weight", (), refused), lasting
    measured = Measured(
        _measure(ready, job),
        {name: found.variants for name, found in ready.items()},
        {name: found.size_bytes for name, found in ready.items()},
        {name: found.note for name, found in ready.items()},
    )
    choice = choose(measured, dense_copy)
    if len(choice.parts) > 1:
        size = _routed_bytes(choice, job, [dense, *others], measured)
        if isinstance(size, Refusal):
            refused[choice.name] = size.reason
            choice, lasting = choose(measured, routes=False), lasting and size.lasting
        else:
            measured = dataclasses.replace(measured, size_bytes={**measured.size_bytes, choice.name: size})
    return _verdict(choice, measured, refused), lasting


def _admit(kernel: Kernel, job: Job, gate: Gate, dense: Candidate) -> Candidate | Refusal:
    outcome = gate.ask(kernel)
    if outcome.refused is not None:
        return Refusal(outcome.refused, outcome.lasting)
    return load(kernel, job, dense.measures, capture=outcome.uncapturable is None)


def _measure(ready: Mapping[str, Candidate], job: Job) -> Times:
    """Measure everything once a round, kernel after kernel at each token count (A B A B ...)."""
    budget, counts = job.budget, tuple(job.inputs)
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in counts} for name in ready}
    active = {n: list(ready) for n in counts}
    start = job.watch.now()
    for done in range(budget.most_rounds):
        if done >= budget.least_rounds and job.watch.now() - start > budget.seconds:
            break
        if done == budget.look_rounds:
            hopeless = {name for name in ready if name != DENSE and _hopeless(times, name, counts, budget)}
            lost = {(name, n) for name in hopeless for n in counts if _hopeless(times, name, (n,), budget)}
            active = {n: [name for name in names if (name, n) not in lost] for n, names in active.items()}
        if all(names == [DENSE] for names in active.values()):
            break
        for tokens, names in active.items():
            for name in names:
                times[name][tokens].append(ready[name].measures[tokens]())
    return times


def _hopeless(times: Times, name: str, counts: Sequence[int], budget: Budget) -> bool:
    """Say whether a kernel's total over `counts` was hopeless in every round."""
    rounds = zip(*(zip(times[DENSE][n], times[name][n], strict=True) for n in counts), strict=True)
    return all(sum(d for d, _ in pairs) < budget.hopeless * sum(s for _, s in pairs) for pairs in rounds)


def _routed_bytes(choice: Choice, job: Job, kernels: Sequence[Kernel], measured: Measured) -> int | Refusal:
    """Check a routed kernel as it will run, on the real weight at every token count; return the bytes it keeps."""
    by_name = {kernel.name: kernel for kernel in kernels}
    routed = Routed(tuple((bound, by_name[name]) for bound, name in choice.parts))
    try:
        prepared = dataclasses.replace(routed.prepare(job.packed, job.spec), variants=_variants(choice, measured))
        for tokens, x in job.inputs.items():
            y = routed.run(prepared, x, job.bias, job.activation)
            if wrong := job.expected[tokens].difference(y[checked_rows(tokens)]):
                return Refusal(f"wrong result for {tokens} tokens: {wrong}")
    except (RuntimeError, MemoryError, KernelError) as error:
        lasting = not is_out_of_memory(error)
        return Refusal(f"{'failed' if lasting else 'out of memory'}: {first_line(error)}", lasting)
    return prepared_bytes(prepared)


def _verdict(choice: Choice, measured: Measured, refused: Mapping[str, str]) -> Verdict:
    rows = [timing(name, n, measured) for name in measured.times if name != DENSE for n in measured.tokens]
    if len(choice.parts) > 1:
        rows += [timing(runs(choice.parts, n), n, measured, choice.name) for n in measured.tokens]
    return Verdict(
        kernel=choice.name,
        reason=choice.reason,
        timings=tuple(rows),
        refused=refused,
        rounds=len(measured.totals(single(DENSE))),
        variants=_variants(choice, measured),
        size_bytes=measured.size_bytes,
        busy=choice.busy,
    )


def _variants(choice: Choice, measured: Measured) -> str:
    return write_variants({n: measured.variants[runs(choice.parts, n)][n] for n in measured.tokens})
