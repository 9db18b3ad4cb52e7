"""The child of selftest.py: read cases, try kernels, answer. Run as a program, never imported by the product.

A kernel is tried on a small weight of odd sides and on one of the asked shape, at the asked token counts, 1 and 0,
with every variant it names there. Whatever it raises ends this process; the parent reads the last words.
"""

import dataclasses
import faulthandler
import functools
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError, first_line
from sparsify_compiler.kernel import Kernel, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM, Block, Pattern, parse_pattern
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import Expected, expected
from sparsify_compiler.runtime.tuning.candidates import checked_rows, is_out_of_memory
from sparsify_compiler.runtime.tuning.selftest import Case, Outcome
from sparsify_compiler.runtime.variants import write_variants

SMALL_TOKENS = (0, 1, 3, 17, 65)
MASK_ROWS = 512

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Trial:
    """One weight to try a kernel on, its float64 results computed once a token count."""

    case: Case
    spec: MatmulSpec
    packed: Packed
    weight: Tensor
    bias: Tensor | None
    say: Say


def main() -> None:
    """Answer one line for every line read until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a kernel prints, C code included, is no answer
    faulthandler.enable()
    passed: set[Case] = set()
    for line in sys.stdin:
        table = json.loads(line)
        case = Case(**{**table, "tokens": tuple(table["tokens"])})
        outcome, usable = answer(case, passed, lambda step, case=case: _step(answers, case, step))  # type: ignore[misc]
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps({**dataclasses.asdict(outcome), "usable": usable}) + "\n")


def answer(case: Case, passed: set[Case], say: Say) -> tuple[Outcome, bool]:
    """Try one kernel; also whether this process may go on: after a CUDA failure it may not.

    `passed` are the small weights that need no second trial; one more is added, in place.
    """
    device = torch.device(case.device)
    try:
        torch.zeros(1, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # a build without CUDA, a GPU that one process has for itself, or one without memory left
        return Outcome(f"its self-test cannot use {device}: {first_line(error)}", lasting=False), False
    try:
        outcome = examine(case, passed, say)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError, KernelError) as error:
        if not is_out_of_memory(error):
            return Outcome(f"failed in its self-test: {first_line(error)}"), device.type != "cuda"
        outcome = Outcome(f"out of memory in its self-test: {first_line(error)}", lasting=False)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome, outcome.uncapturable is None


def examine(case: Case, passed: set[Case], say: Say) -> Outcome:
    """Try a kernel on the small and the true shape; then whether a CUDA graph holds it. `passed` as in `answer`."""
    module, function = case.find.split(":")
    kernel: Kernel = getattr(importlib.import_module(module), function)(case.kernel)
    pattern, dtype = parse_pattern(case.pattern), getattr(torch, case.dtype)
    out, in_, run = _small_shape(case, pattern)
    small = dataclasses.replace(case, out=out, in_=in_, run=run, tokens=SMALL_TOKENS)
    for shape in (case,) if small in passed else (small, case):
        say(f"the packing of {shape.out}x{shape.in_}")
        packed = random_packed(shape, pattern, dtype)
        tokens = tuple(dict.fromkeys((*shape.tokens, 1, 0)))
        spec = dataclasses.replace(spec_for(packed, shape.tokens, torch.device(case.device)), run=shape.run)
        if reason := kernel.rejects(spec):
            if shape is small:
                continue  # a kernel may ask for sizes that only the true shape has
            return Outcome(f"refuses the weight of its self-test: {reason}")
        weight = unpack(packed)
        bias = _draw(1, shape.out, dtype, spec.device)[0] if shape.bias else None
        trial = _Trial(shape, spec, packed, weight, bias, say)
        prepared = kernel.prepare(packed, spec)
        for count in tokens:
            if wrong := _wrong(kernel, prepared, trial, count):
                return Outcome(wrong)
        passed |= {small}
    return Outcome(uncapturable=_uncapturable(kernel, prepared, trial) if spec.device.type == "cuda" else None)


def random_packed(case: Case, pattern: Pattern, dtype: torch.dtype) -> Packed:
    """Draw a weight of the case's shape, pattern and density. Rows share few masks, so that large ones are quick."""
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(case.out + case.in_)
    rows, columns = case.out, case.in_
    if isinstance(pattern, Block):
        tiles = torch.rand(-(-rows // pattern.rows), -(-columns // pattern.cols), generator=generator, device=device)
        keep = pattern.expand(_with_empty_row(tiles < case.density))[:rows, :columns]
    else:
        some = torch.rand(min(rows, MASK_ROWS), columns, generator=generator, device=device)
        masks = some < case.density
        if isinstance(pattern, NM):
            masks = pattern.select(some, 1 - pattern.keep / pattern.of, case.run)
        keep = masks[torch.randint(len(masks), (rows,), generator=generator, device=device)]
        keep = keep if isinstance(pattern, NM) else _with_empty_row(keep)
    weight = torch.randn(rows, columns, generator=generator, device=device).to(dtype)
    return format_for(pattern).pack(weight, keep, pattern, case.run)


def _with_empty_row(keep: Tensor) -> Tensor:
    """Empty the second row of a mask of several rows; keep its first entry, so that something is left."""
    keep[0, 0] = True
    if len(keep) > 3:
        keep[1] = False
    return keep


def _small_shape(case: Case, pattern: Pattern) -> tuple[int, int, int | None]:
    """Return odd sides of a few tiles or groups, and the run with them."""
    out, in_ = 77, 211
    if isinstance(pattern, Block):
        out, in_ = 3 * pattern.rows + 5, 3 * pattern.cols + 3
    if isinstance(pattern, NM):
        in_ = 3 * pattern.of * (1 + 128 // pattern.of) + 1
    if case.run is None or case.run == case.in_:
        return out, in_, None if case.run is None else in_
    run = min(case.run, in_)
    return out, run * min(3, case.in_ // case.run), run


def _wrong(kernel: Kernel, prepared: Prepared, trial: _Trial, tokens: int) -> str | None:
    """Run every variant at one token count; None, or what is wrong with which."""
    spec = trial.spec
    x = _draw(tokens, spec.in_ + 1, spec.dtype, spec.device)[:, 1:]  # not contiguous, and at an odd address
    if tokens != 3:
        x = x.contiguous()
    rows = checked_rows(tokens)
    checked: Expected | None = None
    for name in kernel.variants(spec, tokens) or ("",):
        trial.say(f"variant {name or 'only'!r} of {spec.out}x{spec.in_} with {tokens} tokens")
        poison = torch.full((tokens, spec.out), torch.nan, dtype=spec.dtype, device=spec.device)
        del poison  # the allocator hands this memory out next: entries that are never written stay NaN
        chosen = dataclasses.replace(prepared, variants=write_variants({tokens: name}))
        y = kernel.run(chosen, x, trial.bias, trial.case.activation)
        if y.shape[0] != tokens:
            return f"wrong result in its self-test: {tuple(y.shape)} for {tokens} tokens"
        checked = checked or expected(x[rows], trial.weight, trial.bias, trial.case.activation)
        if wrong := checked.difference(y[rows]):
            called = f" by variant {name}" if name else ""
            return f"wrong result in its self-test for {tokens} tokens of {spec.out}x{spec.in_}{called}: {wrong}"
    return None


def _uncapturable(kernel: Kernel, prepared: Prepared, trial: _Trial) -> str | None:
    """Say why a CUDA graph cannot hold the kernel, or None. A capture that fails leaves this process unusable."""
    spec = trial.spec
    try:
        with torch.cuda.device(spec.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            for tokens in dict.fromkeys(spec.tokens):
                x = _draw(tokens, spec.in_, spec.dtype, spec.device)
                for name in kernel.variants(spec, tokens) or ("",):
                    trial.say(f"the capture of variant {name or 'only'!r} with {tokens} tokens in a CUDA graph")
                    chosen = dataclasses.replace(prepared, variants=write_variants({tokens: name}))
                    _capture(functools.partial(kernel.run, chosen, x, trial.bias, trial.case.activation), stream)
    except RuntimeError as error:
        return first_line(error)
    return None


def _capture(call: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Capture one call and replay it. Raises RuntimeError."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a kernel may set itself up once a stream
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    graph.replay()
    torch.cuda.synchronize()


def _draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, device=device).to(dtype)


def _step(answers: IO[str], case: Case, step: str) -> None:
    """Tell the parent what comes next; should the parent be gone, end a step that never ends."""
    answers.write(json.dumps({"step": step}) + "\n")
    faulthandler.dump_traceback_later(2 * case.step_seconds + 60, exit=True)


if __name__ == "__main__":
    main()
