"""What this machine can run: every kernel on every kind of weight, its self-test, and the machine's ceilings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsify_compiler.kernel import Kernel, MatmulSpec
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.runtime.benchmark.ceilings import Ceilings, measure_ceilings
from sparsify_compiler.runtime.kernels import capability, kernels
from sparsify_compiler.runtime.machine import describe_machine
from sparsify_compiler.runtime.tuning.selftest import Tester

WEIGHTS: tuple[tuple[Pattern, float], ...] = (
    (NM(2, 4), 0.5),
    (NM(4, 8), 0.5),
    (NM(8, 16), 0.5),
    (NM(16, 32), 0.5),
    (NM(2, 8), 0.25),
    (NM(4, 16), 0.25),
    (NM(8, 32), 0.25),
    (Unstructured(), 0.5),
    (Unstructured(), 0.1),
    (Block(16, 16), 0.1),
    (Block(64, 64), 0.1),
    (Block(128, 128), 0.1),
)
"""Patterns with the density that is asked about."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPE = (512, 1024)
TOKENS = (1, 16, 100)


@dataclass(frozen=True)
class SurveyRow:
    """One kernel on one kind of weight. `refused` is its reason, or what its self-test found; None where it runs.

    `tested` says whether a self-test against float64 in a process of its own was made.
    """

    kernel: str
    pattern: str
    density: float
    dtype: str
    refused: str | None
    tested: bool


@dataclass(frozen=True)
class Survey:
    """Every row, the ceilings in each dtype the device can multiply, and what all of it was found on."""

    machine: tuple[tuple[str, str], ...]
    ceilings: tuple[Ceilings, ...]
    rows: tuple[SurveyRow, ...]


def survey(
    device: torch.device,
    tester: Tester | None = None,
    offered: Sequence[Kernel] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    progress: Progress = silent,
) -> Survey:
    """Ask every kernel about every kind of weight, and let `tester` try those that do not refuse (None: nobody)."""
    rows: list[SurveyRow] = []
    wanted = [(kernel, *weight, dtype) for kernel in offered or kernels() for weight in WEIGHTS for dtype in dtypes]
    for done, (kernel, pattern, density, dtype) in enumerate(wanted):
        progress("self-test" if tester else "ask", done, len(wanted))
        spec = MatmulSpec(*SHAPE, dtype, pattern, density, TOKENS, device, capability(device))
        reason = kernel.rejects(spec)
        tested = reason is None and tester is not None
        if tester is not None and reason is None:
            found = tester.test(kernel.name, spec, True, None)
            reason = None if found.refused is None else f"self-test: {found.refused}"
        name = str(dtype).removeprefix("torch.")
        rows.append(SurveyRow(kernel.name, str(pattern), density, name, reason, tested))
    progress("self-test" if tester else "ask", len(wanted), len(wanted))
    ceilings = tuple(measure_ceilings(device, dtype, rounds=3) for dtype in dtypes if _fast(device, dtype))
    return Survey(describe_machine(device), ceilings, tuple(rows))


def _fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a product in `dtype` is worth waiting for: half precision on a CPU may take minutes."""
    return device.type == "cuda" or dtype == torch.float32
