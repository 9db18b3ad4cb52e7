"""What a model is called with: one batch, its names and sizes, and the call itself."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, overload

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import DataError, ModelError

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""One call of a model: its only input, its positional inputs, or its inputs by name. Axis 0 counts the samples."""

Axis = int | str | None
"""The length of an axis: fixed, free under a name (equal names have equal lengths), or free."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model as the model itself declares it.

    `dtype` and `shape` are None where the model does not say (a plain module); `required` is False for an argument
    with a default. `below` is the number of rows of the embedding that reads the input: its values lie in [0, below).
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[Axis, ...] | None = None
    required: bool = True
    below: int | None = None


def call(module: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Run `module` on one batch and return its output tensors, in order, as `output_tensors` finds them.

    A Hugging Face forward is told `use_cache=False`, so that no key-value cache is among the outputs. Gradients are
    recorded or not as the caller's context says.

    Raises:
        DataError: a named batch does not fit the arguments of the module's forward.
        ModelError: the module returned something that is no tensor and holds none.
    """
    args, kwargs = call_arguments(module, batch)
    return output_tensors(module(*args, **kwargs))


def call_arguments(module: nn.Module, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Split a batch into the positional and keyword arguments of the module's forward, `use_cache=False` among them.

    The tensors are copies where the module lies: a forward that writes into its inputs leaves the batch as it was.

    Raises:
        DataError: a named batch does not fit the arguments of the module's forward.
    """
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in _parameters(module) else {}
    if isinstance(batch, dict):
        _check_names(module, batch)
        return (), {**options, **{name: _copied(tensor, module) for name, tensor in batch.items()}}
    return tuple(_copied(tensor, module) for tensor in (batch if isinstance(batch, tuple) else (batch,))), options


def home(module: nn.Module, otherwise: torch.device | str = "cpu") -> torch.device:
    """Return where the first parameter of `module` lies, or its first buffer, or `otherwise` where it has neither."""
    held = next(chain(module.parameters(), module.buffers()), None)
    return held.device if held is not None else torch.device(otherwise)


def _copied(tensor: Tensor, module: nn.Module) -> Tensor:
    return tensor.to(home(module, tensor.device), copy=True)


def output_tensors(value: object) -> tuple[Tensor, ...]:
    """Flatten tuples, lists and mappings (a Hugging Face ModelOutput is one) into tensors; None entries are left out.

    Raises:
        ModelError: something else is among them.
    """
    if isinstance(value, Tensor):
        return (value,)
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return tuple(tensor for entry in value for tensor in output_tensors(entry))
    raise ModelError(f"the model returned a {type(value).__name__}; return tensors, or tuples or dicts of tensors")


def named_tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a batch under its name, or "input 0", "input 1", ... where it has none."""
    if isinstance(batch, Tensor):
        yield "input 0", batch
    elif isinstance(batch, dict):
        yield from batch.items()
    else:
        for position, tensor in enumerate(batch):
            yield f"input {position}", tensor


def main_tensor(batch: Batch) -> Tensor:
    """Return the tensor that counts the samples: `input_ids` if there is one, else the first with at least one axis.

    Raises:
        DataError: the batch holds no such tensor.
    """
    if isinstance(batch, dict) and "input_ids" in batch:
        return batch["input_ids"]
    for _, tensor in named_tensors(batch):
        if tensor.ndim:
            return tensor
    raise DataError("a batch holds no tensor with at least one axis; axis 0 must count the samples")


def sample_count(batch: Batch) -> int:
    """Count the samples of a batch: axis 0 of `main_tensor`."""
    return main_tensor(batch).shape[0]


@dataclass(frozen=True)
class Padding:
    """Where a batch has padding: the shape (samples, length) of its attention_mask, and its shown tokens.

    `shown` (tokens,) int64 numbers the places of the ones, row by row.
    """

    shape: tuple[int, int]
    shown: Tensor

    def drop(self, x: Tensor) -> Tensor:
        """Return the shown rows of x (samples, length, ...) or (samples x length, width) as (tokens, ...).

        Anything else, such as one row a sample, is returned as it is.
        """
        if x.dim() >= 3 and x.shape[:2] == self.shape:
            x = x.flatten(0, 1)
        elif x.dim() != 2 or x.shape[0] != self.shape[0] * self.shape[1]:
            return x
        return x.index_select(0, self.shown.to(x.device))


def padding(batch: Batch) -> Padding | None:
    """Return where the batch's `attention_mask` (samples, length) hides tokens; None without one, or if it hides none.

    None for an encoder-decoder's batch as well: its mask speaks of the encoder's inputs alone, and both may be of one
    length.
    """
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    if isinstance(batch, dict) and any(name.startswith("decoder_") for name in batch):
        return None
    return Padding((mask.shape[0], mask.shape[1]), mask.flatten().nonzero()[:, 0])


def size_bytes(batch: Batch) -> int:
    """Sum the sizes of the batch's tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(batch))


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with every tensor on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return tuple(tensor.to(device) for tensor in batch)


def forward_inputs(module: nn.Module) -> tuple[InputSpec, ...]:
    """List the named arguments of the module's forward; `*args` and `**kwargs` are not named."""
    return tuple(
        InputSpec(name, required=parameter.default is inspect.Parameter.empty)
        for name, parameter in _parameters(module).items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    )


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _check_names(module: nn.Module, batch: Mapping[str, Tensor]) -> None:
    known = [spec.name for spec in forward_inputs(module)]
    swallows = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(module).values())
    if swallows and not set(known) & set(batch):
        return  # forward(**kwargs) alone says nothing of its names
    # Hugging Face forwards swallow unknown keyword arguments, so a misspelt name would be dropped in silence.
    if unknown := [name for name in batch if name not in known]:
        raise DataError(
            f"{type(module).__name__}.forward has no input {', '.join(map(repr, unknown))}; it takes {', '.join(known)}"
        )


@dataclass(frozen=True)
class LazyBatches(Sequence[Batch]):
    """`length` batches, each made by `make(index)` every time it is asked for, so that none need stay in memory."""

    length: int
    make: Callable[[int], Batch]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyBatches": ...
    def __getitem__(self, index: int | slice) -> "Batch | LazyBatches":
        chosen = range(self.length)[index]
        if isinstance(chosen, range):
            return LazyBatches(len(chosen), lambda position: self.make(chosen[position]))
        return self.make(chosen)


@dataclass(frozen=True)
class RoundBatches(Sequence[Batch]):
    """Calibration batches that the caller divided among rounds of pruning: `sets[t - 1]` are those of round t.

    As a sequence it holds the batches of all sets in order.
    """

    sets: tuple[Sequence[Batch], ...]

    def numbers(self) -> list[list[int]]:
        """Return for every set the positions of its batches in the whole sequence."""
        starts = list(accumulate((len(part) for part in self.sets), initial=0))
        return [list(range(start, start + len(part))) for start, part in zip(starts, self.sets, strict=False)]

    def __len__(self) -> int:
        return sum(len(part) for part in self.sets)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> LazyBatches: ...
    def __getitem__(self, index: int | slice) -> Batch | LazyBatches:
        if isinstance(index, slice):
            return LazyBatches(len(self), self.__getitem__)[index]
        position = range(len(self))[index]
        for part in self.sets:
            if position < len(part):
                return part[position]
            position -= len(part)
        raise AssertionError("a position inside the length lies in a set")
