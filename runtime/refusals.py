"""Why a kernel cannot run a product, in the same words from all of them.

Kernels ask in this order, the device first: the pattern, the dtype, the GPU's generation, sizes, and libraries last. So
nobody is sent to another dtype where none would do on this device.
"""

from collections.abc import Sequence

import torch

from sparsify_compiler.kernel import MatmulSpec
from sparsify_compiler.pattern import NM, Pattern

TWO_OF_FOUR = (NM(2, 4), NM(1, 4), NM(1, 2))
"""Patterns that keep at most two of every four columns."""


def not_on(spec: MatmulSpec, *devices: str) -> str | None:
    """Say that the device is of none of the types `devices`, or None."""
    return None if spec.device.type in devices else f"runs on {_list(devices)}; found {spec.device.type}"


def not_two_of_four(spec: MatmulSpec) -> str | None:
    """Say that the pattern, or where it starts again, does not do for sparse tensor cores, or None."""
    if not fits_two_of_four(spec.pattern):
        return f"runs {_list([str(pattern) for pattern in TWO_OF_FOUR])}; found {spec.pattern}"
    if spec.run is not None and spec.run != spec.in_ and spec.run % 4:
        return f"groups of four columns must not cross channels; they start again after {spec.run} columns"
    return None


def fits_two_of_four(pattern: Pattern) -> bool:
    """Say whether every four columns of a weight of this pattern keep at most two."""
    return pattern in TWO_OF_FOUR


def not_in(spec: MatmulSpec, dtypes: Sequence[torch.dtype], why: str = "") -> str | None:
    """Say that the dtype is none of `dtypes`, `why` these, or None."""
    if spec.dtype in dtypes:
        return None
    return f"runs {_list([dtype_name(dtype) for dtype in dtypes])}{why}; found {dtype_name(spec.dtype)}"


def older_than(spec: MatmulSpec, least: tuple[int, int], what: str = "") -> str | None:
    """Say that the GPU is older than the compute capability `least`, which `what` needs, or None."""
    if spec.capability is not None and spec.capability >= least:
        return None
    needs = f"{what} needs" if what else "needs"
    return f"{needs} compute capability {least[0]}.{least[1]} or later; found {capability_name(spec)}"


def capability_name(spec: MatmulSpec) -> str:
    """Write the compute capability as NVIDIA does: 9.0."""
    return "an unknown one" if spec.capability is None else "{}.{}".format(*spec.capability)


def dtype_name(dtype: torch.dtype) -> str:
    """Write a dtype as recipes and options do: float16."""
    return str(dtype).removeprefix("torch.")


def _list(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
