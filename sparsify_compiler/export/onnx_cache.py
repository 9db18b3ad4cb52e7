"""Export a Hugging Face decoder with its key-value cache as inputs and outputs.

Inputs: input_ids (batch, sequence), attention_mask (batch, past + sequence) where the batch has one, and for every
layer i past_key_values.{i}.key and .value (batch, heads, past, head size). Outputs: logits (batch, sequence,
vocabulary), present.{i}.key and .value (batch, heads, past + sequence, head size). An empty past (length 0) is the
first call on a prompt; the presents of one call are the pasts of the next.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from sparsify_compiler.batches import Batch, forward_inputs
from sparsify_compiler.errors import ExportError
from sparsify_compiler.export.onnx_torch import DenseExport, name_axes, to_onnx
from sparsify_compiler.export.onnx_verify import compare, verify
from sparsify_compiler.export.report import Verification
from sparsify_compiler.frontends.onnx_names import SCOPES
from sparsify_compiler.frontends.torch_trace import TRACE_FAILURES, inference
from sparsify_compiler.runtime.ort import run, session

_PAST = 5
_SEQUENCE = 3
"""Lengths of the example: unequal, so that no two free axes are taken for one."""


def is_decoder_without_cache(module: nn.Module) -> bool:
    """Tell whether a module generates text with a cache that a plain export leaves out."""
    can_generate = getattr(module, "can_generate", None)
    cached = getattr(getattr(module, "config", None), "use_cache", False)
    return callable(can_generate) and bool(can_generate()) and bool(cached)


def export_with_cache(module: nn.Module, batch: Batch, opset: int | None = None) -> DenseExport:
    """Export a decoder in eval mode and its own dtype, its cache as inputs and outputs; the module is not modified.

    `batch` (input_ids alone, or a dict with input_ids and perhaps attention_mask) gives the vocabulary and the
    inputs; its lengths do not matter, all axes are free.

    Raises:
        ExportError: the module keeps no `DynamicCache`, the batch has no input_ids, or torch cannot trace it.
    """
    ids, masked = _read_batch(module, batch)
    with inference(module):
        past = _example_past(module, ids)
        wrapper = _WithCache(module, masked)
        args = (ids[:, :_SEQUENCE], ids.new_ones(2, _PAST + _SEQUENCE) if masked else None, past)
        rows = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        shapes = (rows, rows if masked else None, [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * len(past))
        try:
            program = torch.export.export(wrapper, args, dynamic_shapes=shapes)
        except TRACE_FAILURES as error:
            lines = str(error).strip().splitlines()
            raise ExportError(
                f"{type(module).__name__} cannot be exported with its key-value cache: "
                f"{lines[0] if lines else type(error).__name__}; export it without the cache"
            ) from error
    entries = [f"{index}.{part}" for index in range(len(past) // 2) for part in ("key", "value")]
    pasts = [f"past_key_values.{entry}" for entry in entries]
    inputs = ["input_ids", *(["attention_mask"] if masked else []), *pasts]
    model = to_onnx(program, inputs, ["logits", *(f"present.{entry}" for entry in entries)], opset)
    _strip_scope(model)
    cache_axes = dict.fromkeys(pasts, ("batch", None, "past", None))
    name_axes(model, {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "total"), **cache_axes})
    return DenseExport(model, dynamic=True)


def empty_past(model: onnx_ir.Model, batch_size: int) -> dict[str, npt.NDArray[np.generic]]:
    """Return the cache inputs of a first call: arrays (batch_size, heads, 0, head size) by name."""
    empty: dict[str, npt.NDArray[np.generic]] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name.startswith("past_key_values.") and value.shape is not None and value.dtype is not None:
            heads, size = value.shape[1], value.shape[3]
            assert isinstance(heads, int)
            assert isinstance(size, int)
            empty[name] = np.zeros((batch_size, heads, 0, size), value.dtype.numpy())
    return empty


def verify_with_cache(
    path: Path, model: onnx_ir.Model, batch: Batch, expected: Tensor, tolerance: float
) -> Verification:
    """Run the file at `path` twice, a prompt on an empty past and the rest on its presents, and compare the logits.

    `expected` are the logits (batch, sequence, vocabulary) of the module's own run over the whole of `batch`; `model`
    is what the file holds. A batch of one token is run at once.

    Raises:
        VerificationError: as `verify`.
    """
    arrays = {name: tensor.cpu().numpy() for name, tensor in _named(batch).items()}
    samples, length = arrays["input_ids"].shape
    prompt = max(length // 2, 1)
    first = {name: array[:, :prompt] for name, array in arrays.items()} | empty_past(model, samples)
    if length == prompt:
        return verify(path, first, [expected], tolerance)
    start = verify(path, first, [expected[:, :prompt]], tolerance)
    if not start.ran:
        return start
    opened = session(path)
    presents = {
        name.replace("present.", "past_key_values."): array
        for name, array in run(opened, first).items()
        if name.startswith("present.")
    }
    # The mask of the second call covers past and new tokens, the ids are the new ones alone.
    rest = arrays | {"input_ids": arrays["input_ids"][:, prompt:]} | presents
    logits = next(iter(run(opened, rest).values()))
    end = compare(f"{path.name} with its cache", [logits], [expected[:, prompt:]], tolerance)
    return max(start, end, key=lambda verification: verification.difference or 0.0)


class _WithCache(nn.Module):
    """The decoder as a function of tensors alone."""

    def __init__(self, decoder: nn.Module, masked: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.masked = masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        mask = {"attention_mask": attention_mask} if self.masked else {}
        output = self.decoder(input_ids=input_ids, past_key_values=cache, use_cache=True, **mask)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


def _read_batch(module: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """Return example ids (2, past + sequence) of the batch's own vocabulary, and whether a mask is given."""
    named = _named(batch)
    if unknown := sorted(set(named) - {"input_ids", "attention_mask"}):
        raise ExportError(
            f"{type(module).__name__} with a key-value cache takes input_ids and attention_mask; found {unknown[0]!r}; "
            "leave it out of the batch, or export without the cache"
        )
    if "input_ids" not in named:
        raise ExportError(f"{type(module).__name__} with a key-value cache needs a batch with input_ids")
    ids = named["input_ids"].reshape(-1)
    repeats = -(-2 * (_PAST + _SEQUENCE) // ids.numel())
    return ids.repeat(repeats)[: 2 * (_PAST + _SEQUENCE)].reshape(2, -1), "attention_mask" in named


def _named(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, dict):
        return batch
    return {"input_ids": batch if isinstance(batch, Tensor) else batch[0]}


def _example_past(module: nn.Module, ids: Tensor) -> list[Tensor]:
    """Run a prefix and return its keys and values, layer after layer, each (2, heads, past, head size)."""
    from transformers import DynamicCache

    found: object = None
    if {"input_ids", "past_key_values", "use_cache"} <= {spec.name for spec in forward_inputs(module)}:
        output = module(input_ids=ids[:, :_PAST], past_key_values=DynamicCache(), use_cache=True)
        found = getattr(output, "past_key_values", None)
    if not isinstance(found, DynamicCache) or not found.layers:
        raise ExportError(
            f"{type(module).__name__} does not keep its keys and values in transformers' DynamicCache "
            f"(found {type(found).__name__}); export it without the cache"
        )
    return [tensor for layer in found.layers for tensor in (layer.keys, layer.values)]


def _strip_scope(model: onnx_ir.Model) -> None:
    """Take the wrapper's own name off the module paths, so that sites are called as in the user's model."""
    for node in model.graph.all_nodes():
        if scopes := node.metadata_props.get(SCOPES):
            node.metadata_props[SCOPES] = scopes.replace("'decoder.", "'").replace("'decoder'", "''")
