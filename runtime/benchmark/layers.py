"""Time every kernel on single layers, beside dense and beside what the machine could do at most."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import MatmulSpec, Packed
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.runtime.benchmark.ceilings import Ceilings, product_bytes, product_flops
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.tuning.tune import Verdict


@dataclass(frozen=True)
class LayerRow:
    """One kernel on one layer at one token count; times are medians in microseconds.

    `limit_us` is the least time the ceilings allow for this weight's kept values (for dense: all), `of_limit` the
    share of that limit which was reached, above 1 where the weight stayed in a cache. `weight_bytes` is the packed
    (for dense: the dense) weight.
    """

    layer: str
    shape: tuple[int, int]
    pattern: str
    density: float
    dtype: str
    tokens: int
    kernel: str
    time_us: float
    speedup: float
    spread: float
    verdict: str
    limit_us: float
    of_limit: float
    weight_bytes: int


@dataclass(frozen=True)
class LayerBench:
    """All rows of one layer, which kernel the tuner would choose and why, and why each refused kernel refused."""

    rows: tuple[LayerRow, ...]
    chosen: str
    reason: str
    refused: tuple[tuple[str, str], ...]


TuneOne = Callable[[Packed, MatmulSpec], Verdict]


def random_layer(
    shape: tuple[int, int],
    pattern: Pattern,
    sparsity: float | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Packed:
    """Draw a normal weight (out, in) on `device`, keep the largest entries by `pattern`, pack it.

    Raises:
        KernelError: the pattern does not fit the shape, or needs a sparsity and got none.
    """
    fixed = pattern.fixed_sparsity()
    if sparsity is None and fixed is None:
        raise KernelError(f"pattern {pattern} of a random layer: give a sparsity in [0, 1)")
    if misfit := pattern.misfit(shape[0], shape[1], None):
        raise KernelError(f"a random layer {shape[0]}x{shape[1]}: {misfit}")
    generator = torch.Generator(device).manual_seed(seed)
    weight = (torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5).to(dtype)
    share = fixed if fixed is not None else sparsity
    assert share is not None
    keep = pattern.select(weight.float().abs(), share)
    return format_for(pattern).pack(weight, keep, pattern)


def bench_layer(
    layer: str,
    packed: Packed,
    tokens: Sequence[int],
    device: torch.device,
    ceilings: Ceilings,
    tune_one: TuneOne,
    run: int | None = None,
) -> LayerBench:
    """Tune one packed weight at each of `tokens` by itself, and set every time beside its limit. `run` as packed with.

    A tuner that is given several counts looks for one kernel for all of them; here each count stands alone.
    """
    rows: list[LayerRow] = []
    chosen: list[str] = []
    reasons: list[str] = []
    refused: dict[str, str] = {}
    for count in tokens:
        spec = spec_for(packed, (count,), device, run)
        verdict = tune_one(packed, spec)
        rows += _rows(layer, packed, spec, verdict, ceilings)
        chosen.append(f"{count}: {verdict.kernel}")
        reasons.append(f"{count} tokens: {verdict.reason}")
        refused.update(verdict.refused)
    return LayerBench(tuple(rows), ", ".join(chosen), "; ".join(reasons), tuple(refused.items()))


def _rows(layer: str, packed: Packed, spec: MatmulSpec, verdict: Verdict, ceilings: Ceilings) -> Iterator[LayerRow]:
    if not verdict.timings:
        return
    out, in_ = packed.shape
    (tokens,) = spec.tokens
    item = packed.tensors["values"].element_size()
    make = partial(
        LayerRow,
        layer=layer,
        shape=packed.shape,
        pattern=str(packed.pattern),
        density=spec.density,
        dtype=str(spec.dtype).removeprefix("torch."),
        tokens=tokens,
    )
    time_us = statistics.median(timing.dense_us for timing in verdict.timings)
    moved = (out * in_ + tokens * (out + in_)) * item
    limit = ceilings.limit_us(moved, product_flops(out * in_, tokens))
    yield make(
        kernel="dense", time_us=time_us, speedup=1.0, spread=0.0, verdict="base",
        limit_us=limit, of_limit=limit / time_us, weight_bytes=out * in_ * item,
    )  # fmt: skip
    kept = round(out * in_ * spec.density)
    limit = ceilings.limit_us(product_bytes(packed, tokens), product_flops(kept, tokens))
    for timing in verdict.timings:
        yield make(
            kernel=timing.kernel, time_us=timing.time_us, speedup=timing.speedup, spread=timing.spread,
            verdict=timing.verdict, limit_us=limit, of_limit=limit / timing.time_us, weight_bytes=packed.size_bytes(),
        )  # fmt: skip
