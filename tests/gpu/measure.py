"""Measure on a GPU everything that README's table of speeds promises, and set each figure beside its goal.

    python tests/gpu/measure.py OUT/ [--part layers] [--part decode]

Writes OUT/<part>.json (every number, machine and versions) and prints one Markdown row a goal. The goals are ratios to
the best dense path in the same run on an H200; a goal is a row of GOALS, so nothing is measured that is not asked for.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsify_compiler import DecodeChoice, RandomLayers, bench_decoder, bench_layers, parse_pattern
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.runtime.benchmark.layers import LayerBench


@dataclass(frozen=True)
class Goal:
    """The speedup asked for at each token count, on `shape` pruned to `pattern` (with `sparsity` where it is free)."""

    shape: tuple[int, int]
    pattern: str
    speedups: tuple[tuple[int, float], ...]
    sparsity: float | None = None


UP, DOWN, SQUARE = (14336, 4096), (4096, 14336), (4096, 4096)
NM24 = ((1, 1.75), (8, 1.75), (16, 1.7), (32, 1.6), (64, 1.5), (512, 1.5), (2048, 1.5), (8192, 1.5))
HALF = ((1, 1.65), (2, 1.6), (8, 1.6), (16, 1.5), (32, 1.3))
QUARTER = ((1, 3.0), (2, 2.5), (8, 2.5), (16, 2.0), (32, 1.5))
DECODE_GOALS = (("2:4", 1.6), ("16:32", 1.5), ("8:32", 2.3))

GOALS = (
    Goal(UP, "2:4", NM24),
    Goal(DOWN, "2:4", NM24),
    Goal(SQUARE, "2:4", ((1, 1.5), (8, 1.5), (16, 1.5))),
    *(Goal(shape, pattern, HALF) for shape in (UP, DOWN) for pattern in ("4:8", "8:16", "16:32")),
    *(Goal(shape, pattern, QUARTER) for shape in (UP, DOWN) for pattern in ("2:8", "4:16", "8:32")),
    Goal(UP, "unstructured", ((1, 2.3),), 0.7),
    Goal(UP, "unstructured", ((1, 4.5),), 0.9),
    Goal(UP, "128x128", ((8192, 3.8),), 0.8),
    Goal(UP, "128x128", ((1, 5.0), (16, 5.0), (1024, 5.0), (8192, 7.0)), 0.9),
    Goal(UP, "128x128", ((8192, 11.0),), 0.95),
)


def measure_layers(out: Path, dtype: torch.dtype) -> Iterator[str]:
    """Measure every goal, write the figures as they come, and yield a row each."""
    yield "| weight | pattern | tokens | goal | measured | kernel | of limit |\n|---|---|---|---|---|---|---|"
    for number, goal in enumerate(GOALS):
        tokens = tuple(count for count, _ in goal.speedups)
        asked = RandomLayers((goal.shape,), (parse_pattern(goal.pattern),), goal.sparsity, tokens, dtype)
        try:
            report = bench_layers(asked, device="cuda")
        except (SparsifyError, RuntimeError) as error:
            yield f"| {goal.shape} | {goal.pattern} | {tokens} | | failed: {str(error).splitlines()[0]} | | |"
            continue
        name = f"layer{number:02d}-{str(dtype).removeprefix('torch.')}.json"
        (out / name).write_text(report.to_json(), encoding="utf-8")
        yield from _rows(goal, report.layers[0])


def measure_decode(out: Path, dtype: torch.dtype) -> Iterator[str]:
    """Measure decoding of the Llama-3-8B shape at batch 1."""
    yield "| pattern | goal | measured | tokens/s dense | tokens/s sparse |\n|---|---|---|---|---|"
    for pattern, wanted in DECODE_GOALS:
        choice = DecodeChoice(dtype=dtype, device="cuda", compiled=True)
        report = bench_decoder("llama-3-8b", parse_pattern(pattern), choice)
        (out / f"decode-{pattern.replace(':', '-')}.json").write_text(report.to_json(), encoding="utf-8")
        base = next(row for row in report.rows if row.verdict == "base")
        best = max((row for row in report.rows if row.label.startswith("sparse")), key=lambda row: row.speedup)
        yield f"| {pattern} | {wanted} | {best.speedup:.2f} | {base.tokens_per_s:.0f} | {best.tokens_per_s:.0f} |"


def _rows(goal: Goal, layer: LayerBench) -> Iterator[str]:
    what = f"{goal.pattern} {goal.sparsity}" if goal.sparsity is not None else goal.pattern
    for tokens, wanted in goal.speedups:
        found = [row for row in layer.rows if row.tokens == tokens and row.kernel != "dense"]
        start = f"| {goal.shape[0]}x{goal.shape[1]} | {what} | {tokens} | {wanted} |"
        if not found:
            yield f"{start} no kernel: {dict(layer.refused)} | | |"
            continue
        best = max(found, key=lambda row: row.speedup)
        yield f"{start} {best.speedup:.2f} | {best.kernel} | {best.of_limit:.0%} |"


def main() -> int:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", action="append", choices=("layers", "decode"))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("needs a CUDA GPU; torch.cuda.is_available() is False\n")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, asked.dtype)
    parts = {"layers": measure_layers, "decode": measure_decode}
    start = time.perf_counter()
    for part in asked.part or parts:
        for line in parts[part](asked.out, dtype):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{time.perf_counter() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
