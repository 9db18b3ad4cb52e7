"""Time whole models against each other: same run, interleaved, medians, the spread shown."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sparsify_compiler.errors import DataError
from sparsify_compiler.figures import saved_figure
from sparsify_compiler.runtime.tuning.timing import Words, compare_pairs, spread

Clock = Callable[[], float]
"""Returns seconds since any fixed moment."""


@dataclass(frozen=True)
class BenchRow:
    """One candidate. `median_ms` and its relative `spread` (IQR / median) over `repeats` calls.

    `speedup` is the median over the rounds of the base's time / this one's, `speedup_spread` that ratio's IQR /
    median, `verdict` what they say about this one against the base ("base" for the base itself). Sizes are the
    caller's, None if unknown. `case` says what was run where several things were; `tokens` how many tokens one call
    makes or reads, None where the model has none.
    """

    label: str
    median_ms: float
    spread: float
    speedup: float
    speedup_spread: float
    verdict: Words | Literal["base"]
    repeats: int
    peak_memory_bytes: int | None = None
    size_bytes: int | None = None
    case: str = ""
    tokens: int | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second at the median time, None where `tokens` is."""
        return None if self.tokens is None else 1e3 * self.tokens / self.median_ms


@dataclass(frozen=True)
class Measured:
    """What `compare` passes on to its rows: sizes by label, and the case and tokens of all of them."""

    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    size_bytes: Mapping[str, int] = field(default_factory=dict)
    case: str = ""
    tokens: int | None = None


def compare(
    candidates: Sequence[tuple[str, Callable[[], object]]],
    repeats: int = 20,
    warmup: int = 3,
    device: torch.device | None = None,
    measured: Measured | None = None,
    bases: Sequence[str] = (),
    clock: Clock = time.perf_counter,
) -> tuple[BenchRow, ...]:
    """Call the labelled candidates in turn, `repeats` rounds after `warmup` ones; one row each, in the order given.

    The base of all ratios is the fastest of `bases`, by medians, so that nothing wins against a slow way of running
    the same model; with none given, the first candidate.

    Wall time of a call from an idle device to an idle device: on a CUDA `device` both ends are synchronised, so that
    launch overhead counts as it does for a user. Fewer than 5 rounds say little about the spread.

    Raises:
        DataError: no candidate, labels that repeat, a base that is no candidate, or fewer than 2 repeats.
    """
    labels = [label for label, _ in candidates]
    if not labels or len(set(labels)) != len(labels) or repeats < 2 or warmup < 0 or not {*bases} <= {*labels}:
        raise DataError(
            f"cannot compare {labels} with {list(bases)} over {repeats} repeats after {warmup}: needs at least one "
            f"candidate, labels that differ, bases among them and 2 repeats"
        )
    times: dict[str, list[float]] = {label: [] for label in labels}
    for done in range(warmup + repeats):
        for label, call in candidates:
            seconds = _seconds(call, device, clock)
            if done >= warmup:
                times[label].append(seconds * 1e3)
    base = min(bases or labels[:1], key=lambda label: statistics.median(times[label]))
    return tuple(_row(label, times, base, measured or Measured()) for label in labels)


def plot(rows: Sequence[BenchRow], path: str | Path) -> None:
    """Draw the medians as bars with their interquartile range, each with its speed-up, to a .png or .svg file.

    Raises:
        DataError: matplotlib is not installed, another file type was asked, there are no rows, or the disk refused.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg") or not rows:
        raise DataError(f"cannot plot {len(rows)} rows to {path.name}: needs at least one row and a .png or .svg file")
    with saved_figure(path, (7, 1.2 + 0.5 * len(rows))) as figure:
        axes = figure.add_subplot()
        middle = [row.median_ms for row in rows]
        # the spread is symmetric by definition, a time is not: no whisker reaches below 0
        whiskers = [row.median_ms * row.spread / 2 for row in rows]
        below = [min(whisker, row.median_ms) for whisker, row in zip(whiskers, rows, strict=True)]
        names = [f"{row.label}\n{row.case}" if row.case else row.label for row in rows]
        bars = axes.barh(names, middle, xerr=(below, whiskers), color="#4c78a8", ecolor="#333333", capsize=3)
        axes.bar_label(bars, [_caption(row) for row in rows], padding=6, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.9 * max(m + w for m, w in zip(middle, whiskers, strict=True)))
        axes.set_xlabel(f"ms a call: median of {rows[0].repeats}, whiskers: interquartile range")


def module_bytes(module: nn.Module) -> int:
    """Return the bytes that the parameters and buffers of a module hold on its own device, shared ones once.

    The device is that of the first parameter: what offloaded sparse layers keep in host memory is not counted.
    """
    tensors = [*module.parameters(), *module.buffers()]
    home = next((tensor.device for tensor in tensors), torch.device("cpu"))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device == home
    }
    return sum(storages.values())


def _seconds(call: Callable[[], object], device: torch.device | None, clock: Clock) -> float:
    _wait(device)
    start = clock()
    call()
    _wait(device)
    return clock() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(label: str, times: Mapping[str, Sequence[float]], base: str, measured: Measured) -> BenchRow:
    pair = compare_pairs(times[base], times[label])
    own = times[label]
    return BenchRow(
        label=label,
        median_ms=statistics.median(own),
        spread=spread(own),
        speedup=pair.speedup,
        speedup_spread=pair.spread,
        verdict="base" if label == base else pair.words(),
        repeats=len(own),
        peak_memory_bytes=measured.peak_memory_bytes.get(label),
        size_bytes=measured.size_bytes.get(label),
        case=measured.case,
        tokens=measured.tokens,
    )


def _caption(row: BenchRow) -> str:
    return (
        f"{row.median_ms:.3g} ms"
        if row.verdict == "base"
        else f"{row.median_ms:.3g} ms, {row.speedup:.2f}x\n{row.verdict}"
    )
