"""Arrays as model inputs: .npz and .safetensors files of named arrays, checked against what the model declares."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsify_compiler.batches import Batch, InputSpec, LazyBatches
from sparsify_compiler.errors import DataError
from sparsify_compiler.sources.models import Source

LABELS = "labels"
TOKEN_IDS = frozenset({"input_ids", "decoder_input_ids"})

Choice = Literal["random", "first"]
"""Which samples are taken when fewer are asked for than there are: a seeded draw in file order, or the first."""


@dataclass(frozen=True)
class Draw:
    """Which of n samples are taken. `part`: where that would be all of them, seven in eight at random instead."""

    limit: int | None
    choose: Choice
    seed: int
    part: bool = False

    def of(self, count: int, default: int | None = None) -> Tensor:
        """Return the chosen indices below `count`, ascending."""
        limit = self.limit or (default if self.choose == "random" else None)
        if self.part and (limit is None or limit >= count):
            limit = max(1, count * 7 // 8)
        if limit is None or limit >= count:
            return torch.arange(count)
        if self.choose == "first":
            return torch.arange(limit)
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[:limit].sort().values

    def words(self, taken: int, count: int, what: str) -> str:
        """Say how many were taken of how many."""
        if taken == count:
            short = f" ({self.limit} were asked)" if self.limit and self.limit > count else ""
            return f"all {count} {what}{short}"
        how = f"drawn with seed {self.seed} from" if self.choose == "random" else "the first of"
        return f"{taken} {what}, {how} {count}"


@dataclass(frozen=True)
class Stack:
    """Named inputs of many calls. A batch takes `rows[name]` rows of axis 0; 0 means the whole tensor every time."""

    tensors: Mapping[str, Tensor]
    rows: Mapping[str, int]
    calls: int

    def batches(self, source: Source) -> Sequence[Batch]:
        """Slice the tensors into batches of the kind that the model takes."""
        return LazyBatches(self.calls, lambda index: as_batch(self._call(index), source))

    def split(self, values: Tensor, name: str) -> tuple[Tensor, ...]:
        """Split what belongs to the samples of input `name` (their labels) along the same batches."""
        step = self.rows[name]
        return tuple(values[index * step : (index + 1) * step] for index in range(self.calls))

    def _call(self, index: int) -> dict[str, Tensor]:
        return {
            name: tensor[index * self.rows[name] : (index + 1) * self.rows[name]] if self.rows[name] else tensor
            for name, tensor in self.tensors.items()
        }


def read_arrays(path: Path, select: str | None = None) -> dict[str, Tensor]:
    """Read every array of an .npz or .safetensors file, or the one named `select`.

    Raises:
        DataError: cut short, of another format, holding Python objects or text, or without the array asked for.
    """
    where = f"data {str(path)!r}"
    try:
        if path.suffix.lower() == ".npz":
            # np.load leaves a path that is no archive open; this file is closed either way.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                names = file.files
                wanted = [name for name in names if select in {None, name}]
                arrays = {name: torch.from_numpy(np.asarray(file[name])) for name in wanted}
        else:
            loaded = load_file(path)
            names = list(loaded)
            arrays = {name: tensor for name, tensor in loaded.items() if select in {None, name}}
    except TypeError as error:
        raise DataError(f"{where}: an array is not of numbers ({error}); give integers, floats or booleans") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise DataError(
            f"{where}: not a whole {path.suffix} file of plain arrays ({error}); write it with numpy.savez or "
            "safetensors.torch.save_file"
        ) from None
    if not arrays:
        what = f"no array {select!r}; it holds {', '.join(names)}" if select else "it holds no array"
        raise DataError(f"{where}: {what}")
    return arrays


def fit_tensors(arrays: Mapping[str, Tensor], source: Source, where: str) -> dict[str, Tensor]:
    """Match arrays to the model's inputs by name and cast them without loss of kind; labels must be taken out before.

    Integers become int64 and floats float32 for a torch module, and what the model declares otherwise.

    Raises:
        DataError: a name, dtype, shape, token id or NaN that the model cannot take, naming the array.
    """
    specs = {spec.name: spec for spec in source.inputs}
    if specs:
        unknown = [name for name in arrays if name not in specs]
        missing = [name for name, spec in specs.items() if spec.required and name not in arrays]
        if unknown or missing:
            found = f"no input is called {unknown[0]!r}" if unknown else f"the input {missing[0]!r} is missing"
            required = [name for name, spec in specs.items() if spec.required] or list(specs)[:4]
            raise DataError(
                f"{where}: {found}; the model takes {', '.join(required)}, the file holds {', '.join(arrays)}; rename "
                "the arrays, or choose one for the first input with FILE:ARRAY"
            )
    return {name: _fit(arrays[name], specs.get(name), name, source, where) for name in _in_order(arrays, specs)}


def stack(tensors: Mapping[str, Tensor], source: Source, batch_size: int | None, where: str) -> Stack:
    """Decide how many rows of each tensor make one batch.

    Axis 0 counts the samples. Where the model fixes axis 0 of an input, a batch takes exactly that many rows of it;
    tensors without axes are repeated. Samples that do not fill such a fixed batch are left out.

    Raises:
        DataError: tensors of different numbers of samples, or fewer samples than a fixed axis asks for.
    """
    specs = {spec.name: spec for spec in source.inputs}
    fixed = {name: axis for name in tensors if isinstance(axis := _first_axis(specs.get(name)), int)}
    sized = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    if not sized:
        return Stack(tensors, dict.fromkeys(tensors, 0), 1)
    free = [len(tensor) for name, tensor in sized.items() if name not in fixed]
    wanted = batch_size or _comfortable(sized)
    step = min([wanted, *free])
    if any(name in sized and axis == 1 for name, axis in fixed.items()):
        step = 1  # a model of one sample a call
    rows = {name: fixed.get(name, step) if name in sized else 0 for name in tensors}
    for name, tensor in sized.items():
        if len(tensor) < rows[name] or rows[name] == 0:
            raise DataError(f"{where}: array {name!r} has {len(tensor)} samples, one call takes {rows[name] or 'none'}")
    calls = {n: (len(t) // rows[n] if n in fixed else -(-len(t) // rows[n])) for n, t in sized.items()}
    if len(set(calls.values())) > 1 or len(set(free)) > 1:
        counts = ", ".join(f"{name} {len(tensor)}" for name, tensor in sized.items())
        raise DataError(f"{where}: the arrays hold different numbers of samples ({counts}); axis 0 counts the samples")
    return Stack(tensors, rows, next(iter(calls.values())))


def as_batch(named: dict[str, Tensor], source: Source) -> Batch:
    """Give the inputs the form the model is called with: by name, or in order for a .pt2 or an unnamed forward."""
    if source.kind == "pt2" or not source.inputs:
        values = tuple(named.values())
        return values[0] if len(values) == 1 else values
    return named


def first_input(source: Source) -> str:
    """Name the input that a single tensor is meant for: `input_ids` or the first, "input 0" where none has a name."""
    names = [spec.name for spec in source.inputs]
    return "input_ids" if "input_ids" in names else next(iter(names), "input 0")


def check_token_ids(ids: Tensor, below: int | None, name: str, where: str) -> None:
    """Check that `ids` lie in [0, below).

    Raises:
        DataError: one does not.
    """
    if not ids.numel() or below is None:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= below:
        raise DataError(
            f"{where}: {name!r} holds the token id {most if most >= below else least}, the model's vocabulary is 0 to "
            f"{below - 1}; tokenise with the model's own tokenizer"
        )


def _in_order(arrays: Mapping[str, Tensor], specs: Mapping[str, InputSpec]) -> list[str]:
    return [name for name in specs if name in arrays] if specs else list(arrays)


def _fit(tensor: Tensor, spec: InputSpec | None, name: str, source: Source, where: str) -> Tensor:
    wanted = spec.dtype if spec and spec.dtype else _natural(tensor.dtype)
    if _kind(tensor.dtype) != _kind(wanted) or (name in TOKEN_IDS and _kind(tensor.dtype) != "integer"):
        asked = "integer token ids" if name in TOKEN_IDS else str(wanted).removeprefix("torch.")
        raise DataError(
            f"{where}: array {name!r} is {str(tensor.dtype).removeprefix('torch.')}, the model takes {asked}"
        )
    if tensor.is_floating_point() and (bad := int((~torch.isfinite(tensor)).sum())):
        raise DataError(f"{where}: array {name!r} has {bad} NaN or infinite of {tensor.numel()} values; take them out")
    if spec and spec.shape is not None:
        _check_shape(tensor, spec.shape, name, where)
    below = spec.below if spec and spec.below else source.vocabulary if name in TOKEN_IDS else None
    if _kind(tensor.dtype) == "integer":
        tensor = tensor.to(torch.int64)
        check_token_ids(tensor, below, name, where)
    if name in TOKEN_IDS and source.max_positions and tensor.ndim == 2 and tensor.shape[1] > source.max_positions:
        raise DataError(
            f"{where}: {name!r} holds windows of {tensor.shape[1]} tokens, the model has {source.max_positions} "
            "positions; cut them shorter"
        )
    return tensor.to(wanted)


def _check_shape(tensor: Tensor, shape: Sequence[int | str | None], name: str, where: str) -> None:
    fits = tensor.ndim == len(shape) and all(
        not isinstance(axis, int) or axis == length for axis, length in list(zip(shape, tensor.shape, strict=True))[1:]
    )
    if not fits:
        asked = ", ".join("?" if axis is None else str(axis) for axis in shape)
        raise DataError(
            f"{where}: array {name!r} has shape {tuple(tensor.shape)}, the model takes ({asked}) with axis 0 counting "
            "the samples"
        )


def _natural(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a torch module is fed: int64 for integers, float32 for floats, bool for bool."""
    return {"integer": torch.int64, "float": torch.float32, "bool": torch.bool}.get(_kind(dtype), dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "integer"


def _first_axis(spec: InputSpec | None) -> int | str | None:
    return spec.shape[0] if spec and spec.shape else None


def _comfortable(tensors: Mapping[str, Tensor]) -> int:
    """Choose a batch of about 2,048 tokens for token ids, of 8 samples for anything else."""
    for name, tensor in tensors.items():
        if name in TOKEN_IDS and tensor.ndim == 2:
            return max(1, 2048 // max(tensor.shape[1], 1))
    return 8
