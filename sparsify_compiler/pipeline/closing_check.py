"""What to tell a user whose exported file failed its check: what made it likely, and how to keep the pruned model."""

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.errors import VerificationError

GROWN = 100.0
"""Times its largest dense weight that a pruned weight may reach before its rounding is worth a word."""

WAYS_ON = (
    "--no-onnx writes the torch artefact alone; with --resume the pruned weights are kept and only what comes after "
    "pruning is done again"
)


def explained(error: VerificationError, grown: Mapping[str, float]) -> VerificationError:
    """Return the error with the ways on, and the site that grew most where by more than GROWN.

    `grown` has the growth of every pruned site by name.
    """
    worst = max(grown, key=lambda name: grown[name], default="")
    cause = ""
    if worst and grown[worst] > GROWN:
        cause = (
            f"the largest pruned weight of {worst} is {grown[worst]:,.0f} times its largest dense one, so that sums "
            "cancel and lose digits: give more calibration data, or another method for this site; "
        )
    return VerificationError(f"{error}; {cause}{WAYS_ON}")


def growth(dense: Tensor, pruned: Tensor) -> float:
    """Return max |pruned| / max |dense|; 0 for an empty or an all-zero dense weight."""
    if not dense.numel():
        return 0.0
    largest = float(dense.detach().abs().max())
    return float(pruned.detach().abs().max()) / largest if largest > 0 else 0.0
