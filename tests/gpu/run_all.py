"""Run tests/gpu so that one crash takes nothing else down: a process for every file, and for every kernel of one file.

    PYTHONPATH=. python tests/gpu/run_all.py OUT/ [--jobs 6] [--seconds 560] [--only nm_mma]

Writes OUT/<unit>.log and ends with a table of all units; the exit status is 1 if any failed. `--jobs` units share the
GPU, but for those that measure times or may hang it: they come last, one after the other. A unit is stopped after
`--limit` seconds, and none starts after `--seconds`.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BY_KERNEL = "test_kernels_gpu.py"
KERNELS = (
    *("dense", "nm24_mma", "cusparselt", "nm_gemv", "nm_mma", "block_decode", "block_triton", "cusparse_blocked_ell"),
    *("cusparse_bsr", "bitmap_gemv", "expand_dense", "cusparse_csr", "torch_csr", "numba", "block_gather"),
)
RISKY = ("nm24_wgmma",)
"""Never run on hardware before, with barriers that may wait for ever."""
ALONE = ("test_modules_gpu.py", "test_cusparse_gpu.py", "test_tune_gpu.py", "test_nm24_many_gpu.py")
"""Measure times, compile on all processors, or hold the risky kernel."""

_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


@dataclass(frozen=True)
class Unit:
    """One process of pytest."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Ending:
    """How it went, in words, and whether well."""

    unit: Unit
    words: str
    seconds: float
    good: bool


def units() -> tuple[list[Unit], list[Unit]]:
    """Return those that may share the GPU and those that may not."""
    path = str(HERE / BY_KERNEL)
    names = " or ".join((*KERNELS, *RISKY))
    together = [Unit(f"kernels-{name}", (path, "-k", name)) for name in KERNELS]
    together.append(Unit("kernels-rest", (path, "-k", f"not ({names})")))
    others = sorted(file.name for file in HERE.glob("test_*.py") if file.name != BY_KERNEL)
    together += [Unit(name.removesuffix(".py"), (str(HERE / name),)) for name in others if name not in ALONE]
    alone = [Unit(name.removesuffix(".py"), (str(HERE / name), "-s")) for name in ALONE]  # cuSPARSE's prints figures
    alone += [Unit(f"kernels-{name}", (path, "-k", name)) for name in RISKY]
    return together, alone


def run(unit: Unit, out: Path, limit: float, deadline: float) -> Ending:
    """Run one unit and keep what it prints."""
    start = time.perf_counter()
    left = min(limit, deadline - start)
    if left <= 0:
        return Ending(unit, "not started: out of time", 0.0, False)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1"}
    # -W: the warnings of other people's packages are summed up here, where elsewhere they are errors.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=5", "-p", "no:cacheprovider"]
    command += ["-W", "default"]
    log = out / f"{unit.name}.log"
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [*command, *unit.arguments], cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the children that its self-tests may have
            process.wait()
            return Ending(unit, f"stopped after {left:.0f} s", time.perf_counter() - start, False)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
    counts = ", ".join(" ".join(found) for found in _COUNT.findall(tail[0])) if tail else ""
    words = f"died by signal {-code}" if code < 0 else counts or f"ended with code {code}"
    return Ending(unit, words, time.perf_counter() - start, code in (0, 5))  # 5: nothing was collected


def main() -> int:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--limit", type=float, default=240.0)
    parser.add_argument("--only", default="", help="run the units whose name holds this")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + asked.seconds
    endings: list[Ending] = []
    for workers, group in zip((asked.jobs, 1), units(), strict=True):
        chosen = [unit for unit in group if asked.only in unit.name]
        with ThreadPoolExecutor(workers) as pool:
            for ending in pool.map(lambda unit: run(unit, asked.out, asked.limit, deadline), chosen):
                endings.append(ending)
                print(f"{ending.unit.name:24} {ending.seconds:5.0f} s  {ending.words}", flush=True)
    bad = [ending.unit.name for ending in endings if not ending.good]
    print(f"{len(endings) - len(bad)} of {len(endings)} units are well; look at: {', '.join(bad) or 'nothing'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
