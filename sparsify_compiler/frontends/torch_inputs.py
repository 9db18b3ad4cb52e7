"""What a traced torch model is called with: a user's batch in the order of its inputs, each as it was traced."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import DataError
from sparsify_compiler.frontends.torch_trace import Traced, fixed_size


def arrange(traced: Traced, batch: Batch) -> Sequence[Any]:
    """Order a batch as the graph's placeholders, defaults for what only the trace needed (use_cache).

    Raises:
        DataError: inputs are missing, or not among those that were traced.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, tuple):
        return [*batch, *(_default(name) for name in traced.keywords[len(batch) - traced.positional :])]
    missing = [name for name in traced.keywords if name not in batch and name != "use_cache"]
    unknown = [name for name in batch if name not in traced.keywords]
    if missing or unknown or traced.positional:
        expected = ", ".join(name for name in traced.keywords if name != "use_cache")
        raise DataError(f"the model was traced with inputs {expected or 'by position'}; got {', '.join(batch)}")
    return [batch[name] if name in batch else _default(name) for name in traced.keywords]


def check_input(name: str, value: Any, traced: Any) -> None:
    """Compare an input with what stood in its place when the model was traced.

    Raises:
        DataError: another rank, dtype or fixed length.
    """
    if not isinstance(traced, Tensor) or not isinstance(value, Tensor):
        return
    asked = [fixed_size(size) for size in traced.shape]
    fits = len(asked) == value.dim() and all(
        size in (None, found) for size, found in zip(asked, value.shape, strict=True)
    )
    if not fits or value.dtype != traced.dtype:
        sizes = ", ".join("any" if size is None else str(size) for size in asked)
        raise DataError(
            f"input {name!r} is {value.dtype} {tuple(value.shape)}; traced on the first batch, the model takes "
            f"{traced.dtype} ({sizes}); give batches of one kind"
        )


def _default(name: str) -> Any:
    if name == "use_cache":
        return False
    raise DataError(f"the model's input {name!r} is missing from the batch")
