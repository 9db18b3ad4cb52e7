"""Any model as a plain function of a batch: a torch module, a torch.export program, an ONNX file in ONNX Runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, call, named_tensors
from sparsify_compiler.errors import DataError, ModelError, SparsifyError, first_line
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.frontends.torch_trace import inference
from sparsify_compiler.runtime.ort import run, session
from sparsify_compiler.sources.models import Source


def forward_of(source: Source, device: torch.device) -> Forward:
    """Return the model as a function from a batch to its output tensors, on `device`.

    A module stays on the device it is on, unless `device` is another; then it is moved there.

    Raises:
        ModelError: the source holds nothing that can be run.
    """
    if source.kind == "onnx":
        if source.path is None:
            raise ModelError(f"model {source.reference!r}: the source names no file")
        return _onnx(source.path, device)
    module = source.program.module() if source.program is not None else source.module
    if module is None:
        raise ModelError(f"model {source.reference!r}: the source holds no module")
    module.to(device)
    training = any(sub.training for sub in module.modules())

    def forward(batch: Batch) -> tuple[Tensor, ...]:
        with inference(module) if training else torch.no_grad():
            return call(module, batch)

    return forward


def refuses(forward: Forward) -> Callable[[Batch], str | None]:
    """Return a probe: run a batch and say why the model cannot take it, or None."""

    def probe(batch: Batch) -> str | None:
        try:
            forward(batch)
        except (SparsifyError, RuntimeError, ValueError, IndexError) as error:
            return first_line(error)
        return None

    return probe


def _onnx(path: Path, device: torch.device) -> Forward:
    opened = session(path, "cuda" if device.type == "cuda" else "cpu", spinning=False)
    names = [value.name for value in opened.get_inputs()]
    outputs = [value.name for value in opened.get_outputs()]

    def forward(batch: Batch) -> tuple[Tensor, ...]:
        found = run(opened, arrays(batch, names))
        return tuple(torch.from_numpy(np.ascontiguousarray(found[name])) for name in outputs if _numeric(found[name]))

    return forward


def arrays(batch: Batch, names: list[str]) -> Mapping[str, np.ndarray[Any, Any]]:
    """Name a batch's tensors as an ONNX file's inputs: by name, else in order. Raises DataError."""
    if isinstance(batch, dict):
        return {name: tensor.detach().cpu().numpy() for name, tensor in batch.items()}
    tensors = [tensor for _, tensor in named_tensors(batch)]
    if len(tensors) > len(names):
        raise DataError(f"the model takes {len(names)} inputs ({', '.join(names)}); the batch holds {len(tensors)}")
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=False)}


def _numeric(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
