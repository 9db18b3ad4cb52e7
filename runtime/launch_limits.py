"""What our kernels need of a GPU, and what a single launch of them may hold."""

from collections.abc import Iterator

import torch

from sparsify_compiler.kernel import MatmulSpec
from sparsify_compiler.runtime.launch import Launcher
from sparsify_compiler.runtime.refusals import not_in, not_on, older_than
from sparsify_compiler.runtime.rows import HALF_DTYPES

MOST_PASSES = 65535
"""Blocks along the second axis of a grid."""

LEAST = (8, 0)
CLUSTERS_FROM = (9, 0)

_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}


def most_shared(capability: tuple[int, int] | None) -> int:
    """Return the bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications).

    99 KiB on generations from 8.0 on that are not listed; None, a CPU that emulates a GPU, counts as 9.0.
    """
    return 1024 * _SHARED_KIB.get(CLUSTERS_FROM if capability is None else capability, 99)


def missing_for(spec: MatmulSpec, launcher: Launcher) -> str | None:
    """Say what a product in float16 or bfloat16 by our CUDA kernels lacks (GPU, dtype, compiler), or None."""
    reason = not_on(spec, "cuda") or not_in(spec, HALF_DTYPES) or older_than(spec, LEAST)
    return reason or launcher.unavailable()


def can_cluster(device: torch.device) -> bool:
    """Whether blocks on `device` may form clusters. A CPU (where tests emulate a GPU) counts as one that can."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= CLUSTERS_FROM


def token_slices(tokens: int, passed: int) -> Iterator[tuple[int, int]]:
    """Cut `tokens` rows, `passed` a block, into what one launch can hold: (start, stop) of each."""
    most = MOST_PASSES * passed
    for start in range(0, tokens, most):
        yield start, min(tokens, start + most)
