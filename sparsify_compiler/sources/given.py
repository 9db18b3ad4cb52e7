"""What a user's own factory gave: split into batches and labels, and checked."""

from collections.abc import Sequence

from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import DataError
from sparsify_compiler.sources.models import Source


def split_labels(entry: object, source: Source) -> tuple[object, Tensor | None]:
    """Split (batch, labels) where the second is 1-D integers, one a sample, and not itself a required input."""
    if not (isinstance(entry, tuple) and len(entry) == 2):
        return entry, None
    first, second = entry
    if not isinstance(second, Tensor) or second.ndim != 1 or second.is_floating_point():
        return entry, None
    if isinstance(first, Tensor) and sum(spec.required for spec in source.inputs) > 1:
        return entry, None
    return first, second.long()


def checked(batches: Sequence[object], where: str) -> list[Batch]:
    """Return the entries once each is seen to be a batch. Raises DataError, also for none at all."""
    good: list[Batch] = []
    for index, entry in enumerate(batches):
        values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, tuple) else (entry,)
        if not values or not all(isinstance(value, Tensor) for value in values):
            raise DataError(
                f"{where}: batch {index} is {type(entry).__name__}; a batch is a tensor, a tuple of tensors or a "
                "dict of tensors by input name"
            )
        good.append(entry)  # type: ignore[arg-type]
    if not good:
        raise DataError(f"{where}: no batch; give at least one")
    return good
