"""Measure on a GPU everything that README's table of speeds promises, and set each figure beside its goal.

    PYTHONPATH=. python tests/gpu/measure.py OUT/ [--part nm24] [--part decode] [--seconds 540]

Writes OUT/<goal>.json (every number, machine and versions) and OUT/<goal>.log, and prints one Markdown row a goal and
token count. Each goal runs in a process of its own: one that crashes, hangs or raises is a row that says so. Goals that
would start after --seconds are named, not run; parts take about 5 (nm24), 6 (half, quarter), 1 (bitmap), 4 (blocks) and
6 (decode) minutes, predicted from about 0.1 s a program, 1 s a Triton kernel and 20 variants a kernel and token count.
The goals are ratios to the best dense path in the same run on an H200.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UP, DOWN, SQUARE = (14336, 4096), (4096, 14336), (4096, 4096)
Wanted = tuple[tuple[int, float], ...]
NM24: Wanted = ((1, 1.75), (8, 1.75), (16, 1.7), (32, 1.6), (64, 1.5), (512, 1.5), (2048, 1.5), (8192, 1.5))
HALF: Wanted = ((1, 1.65), (2, 1.6), (8, 1.6), (16, 1.5), (32, 1.3))
QUARTER: Wanted = ((1, 3.0), (2, 2.5), (8, 2.5), (16, 2.0), (32, 1.5))
LLAMA = "llama-3-8b"


@dataclass(frozen=True)
class Goal:
    """The speedup asked for at each token count, on `shape` pruned to `pattern` (with `sparsity` where it is free).

    Of part "decode" it is tokens per second of LLAMA at batch 1, and `shape` says nothing.
    """

    part: str
    shape: tuple[int, int]
    pattern: str
    speedups: Wanted
    sparsity: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        shape = LLAMA if self.part == "decode" else f"{self.shape[0]}x{self.shape[1]}"
        share = "" if self.sparsity is None else f"-{self.sparsity:.0%}"
        return f"{self.part}-{shape}-{self.pattern.replace(':', 'of')}{share}"

    @property
    def row(self) -> str:
        """Begin a row of the table."""
        shape = LLAMA if self.part == "decode" else f"{self.shape[0]}x{self.shape[1]}"
        return f"| {shape} | {self.pattern}{'' if self.sparsity is None else f' {self.sparsity:.0%}'} |"


GOALS = (
    Goal("nm24", UP, "2:4", NM24),
    Goal("nm24", DOWN, "2:4", NM24),
    Goal("nm24", SQUARE, "2:4", ((1, 1.5), (8, 1.5), (16, 1.5))),
    *(Goal("half", shape, pattern, HALF) for pattern in ("16:32", "8:16", "4:8") for shape in (UP, DOWN)),
    *(Goal("quarter", shape, pattern, QUARTER) for pattern in ("8:32", "4:16", "2:8") for shape in (UP, DOWN)),
    Goal("bitmap", UP, "unstructured", ((1, 2.3),), 0.7),
    Goal("bitmap", UP, "unstructured", ((1, 4.5),), 0.9),
    Goal("blocks", UP, "128x128", ((1, 5.0), (16, 5.0), (1024, 5.0), (8192, 7.0)), 0.9),
    Goal("blocks", UP, "128x128", ((8192, 3.8),), 0.8),
    Goal("blocks", UP, "128x128", ((8192, 11.0),), 0.95),
    *(Goal("decode", UP, pattern, ((1, wanted),)) for pattern, wanted in (("2:4", 1.6), ("16:32", 1.5), ("8:32", 2.3))),
)
PARTS = tuple(dict.fromkeys(goal.part for goal in GOALS))
HEAD = "| weight | pattern | tokens | goal | measured | kernel | of limit |\n|---|---|---|---|---|---|---|"


def measure_layer(goal: Goal, out: Path, dtype: str) -> Iterator[str]:
    """Measure one weight at all its token counts; yield a row each."""
    import torch

    from sparsify_compiler import RandomLayers, bench_layers, parse_pattern

    tokens = tuple(count for count, _ in goal.speedups)
    asked = RandomLayers((goal.shape,), (parse_pattern(goal.pattern),), goal.sparsity, tokens, getattr(torch, dtype))
    report = bench_layers(asked, device="cuda")
    (out / f"{goal.name}-{dtype}.json").write_text(report.to_json(), encoding="utf-8")
    layer = report.layers[0]
    for count, wanted in goal.speedups:
        found = [row for row in layer.rows if row.tokens == count and row.kernel != "dense"]
        if not found:
            yield f"{goal.row} {count} | {wanted} | no kernel: {dict(layer.refused)} | | |"
            continue
        best = max(found, key=lambda row: row.speedup)
        yield f"{goal.row} {count} | {wanted} | {best.speedup:.2f} | {best.kernel} | {best.of_limit:.0%} |"


def measure_decode(goal: Goal, out: Path, dtype: str) -> Iterator[str]:
    """Measure decoding of the Llama-3-8B shape at batch 1; the last two columns are tokens per second."""
    import torch

    from sparsify_compiler import DecodeChoice, bench_decoder, parse_pattern

    choice = DecodeChoice(dtype=getattr(torch, dtype), device="cuda", compiled=True)
    report = bench_decoder(LLAMA, parse_pattern(goal.pattern), choice)
    (out / f"{goal.name}-{dtype}.json").write_text(report.to_json(), encoding="utf-8")
    base = next(row for row in report.rows if row.verdict == "base")
    best = max((row for row in report.rows if row.label.startswith("sparse")), key=lambda row: row.speedup)
    rates = f"{best.tokens_per_s:.0f} tokens/s | dense {base.tokens_per_s:.0f}"
    yield f"{goal.row} 1 | {goal.speedups[0][1]} | {best.speedup:.2f} | {rates} |"


def measure_apart(goal: Goal, out: Path, dtype: str, seconds: float) -> Iterator[str]:
    """Measure a goal in a process of its own, within `seconds`; its rows, or one that says how it ended."""
    command = [sys.executable, __file__, str(out), "--dtype", dtype, "--goal", str(GOALS.index(goal))]
    log = out / f"{goal.name}-{dtype}.log"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        printed = [text.decode(errors="replace") for text in (error.stdout, error.stderr) if isinstance(text, bytes)]
        log.write_text("".join(printed), encoding="utf-8")
        yield f"{goal.row} all | | not done after {seconds:.0f} s, see {log.name} | | |"
        return
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    yield from (line for line in done.stdout.splitlines() if line.startswith("|"))
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing was said")
        yield f"{goal.row} all | | failed with code {done.returncode}: {last[:300]} | | |"


def main() -> int:
    """Measure the parts asked for, or, as a child, one goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--seconds", type=float, default=540.0, help="start no goal later, and end the one running")
    parser.add_argument("--goal", type=int, help="the one goal of this process")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.goal is not None:
        goal = GOALS[asked.goal]
        measured = (measure_decode if goal.part == "decode" else measure_layer)(goal, asked.out, asked.dtype)
        for line in measured:
            print(line, flush=True)
        return 0
    start = time.perf_counter()
    print(HEAD, flush=True)
    for goal in GOALS:
        left = asked.seconds - (time.perf_counter() - start)
        if goal.part in (asked.part or PARTS):
            rows = (
                measure_apart(goal, asked.out, asked.dtype, left) if left > 0 else [f"{goal.row} all | | no time | | |"]
            )
            for line in rows:
                print(line, flush=True)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
