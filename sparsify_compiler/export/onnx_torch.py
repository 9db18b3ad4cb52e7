"""Write a torch module as a dense ONNX graph with torch's own exporter.

Pruned weights leave as dense zeros; `onnx_pack` then rewrites the graph, as it does with a user's own ONNX file.
"""

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sparsify_compiler.batches import Batch, call_arguments
from sparsify_compiler.errors import ExportError
from sparsify_compiler.frontends.onnx_names import SCOPES
from sparsify_compiler.frontends.torch_trace import (
    TRACE_FAILURES,
    export_program,
    fixed_size,
    inference,
    input_tensors,
    is_text,
)

_EXPORTER = ("pkg.torch.", "namespace")
"""Metadata of the exporter. All but the module path is dropped: it holds the user's source lines with their paths."""


@dataclass(frozen=True)
class DenseExport:
    """A dense ONNX model. `dynamic`: batches of other sizes than the example's fit."""

    model: onnx_ir.Model
    dynamic: bool
    notes: tuple[str, ...] = ()


def export_torch(module: nn.Module, batch: Batch, opset: int | None = None) -> DenseExport:
    """Export `module` in eval mode and in its own dtype. The module is not modified, its weights are shared.

    Inputs are called as in the module's forward, outputs as in a Hugging Face ModelOutput, else output, output_1, ...
    Axis 0 of every input is free (`batch`), and axis 1 of token ids and masks (`sequence`).

    Raises:
        ExportError: torch.export or the ONNX exporter cannot follow the module.
    """
    args, kwargs = call_arguments(module, batch)
    with inference(module):
        names = _output_names(module(*args, **kwargs))
        try:
            program, dynamic = export_program(module, args, kwargs)
        except TRACE_FAILURES as error:
            lines = str(error).strip().splitlines()
            raise ExportError(
                f"torch.export cannot follow {type(module).__name__}: {lines[0] if lines else type(error).__name__}; "
                "an ONNX file needs a forward without data-dependent Python control flow"
            ) from error
    axes = {name: _axis_names(value) for name, value in _tensor_inputs(module, args, kwargs).items()}
    model = to_onnx(program, list(axes), names, opset)
    _fix_axes(model, program)
    name_axes(model, axes)
    notes = () if dynamic else ("the ONNX graph has the example batch's sizes: the model fixes them when traced",)
    return DenseExport(model, dynamic, notes)


def to_onnx(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int | None
) -> onnx_ir.Model:
    """Translate an exported program. `inputs` and `outputs` name its tensors, in order.

    Raises:
        ExportError: an operation has no ONNX form.
    """
    try:
        with _quiet_exporter():
            result = torch.onnx.export(
                program,
                (),
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, *TRACE_FAILURES) as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ExportError(
            f"torch's ONNX exporter cannot translate the module: {reason[0] if reason else type(error).__name__}; "
            "write the operation with standard ones, or export without ONNX"
        ) from error
    assert result is not None
    model: onnx_ir.Model = result.model
    for graph in model.graphs():
        for node in graph:
            _drop_metadata(node.metadata_props)
            for value in node.outputs:
                _drop_metadata(value.metadata_props)
    _drop_metadata(model.graph.metadata_props)
    return model


def _drop_metadata(properties: dict[str, str]) -> None:
    for key in list(properties):
        if key.startswith(_EXPORTER) and key != SCOPES:
            del properties[key]


def name_axes(model: onnx_ir.Model, axes: Mapping[str, Sequence[str | None]]) -> None:
    """Give the free axes of the model's inputs names, here and in every shape that depends on them."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dimension, name in zip(value.shape or (), axes.get(value.name or "", ()), strict=False):
            if isinstance(dimension, onnx_ir.SymbolicDim) and isinstance(dimension.value, str) and name:
                names.setdefault(dimension.value, name)
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _all_values(model.graph):
        for axis, dimension in enumerate(value.shape or ()):
            if isinstance(dimension, onnx_ir.SymbolicDim) and isinstance(dimension.value, str):
                assert value.shape is not None
                value.shape[axis] = pattern.sub(lambda found: names[found[1]], dimension.value)


def _fix_axes(model: onnx_ir.Model, program: ExportedProgram) -> None:
    """Write the one length of the axes that tracing fixed: the exporter gives them a symbol, as if they were free."""
    fixed: dict[str, int] = {}
    for value, traced in zip(model.graph.inputs, input_tensors(program), strict=True):
        for dimension, size in zip(value.shape or (), traced.shape, strict=True):
            length = fixed_size(size)
            if isinstance(dimension, onnx_ir.SymbolicDim) and isinstance(dimension.value, str) and length is not None:
                fixed[dimension.value] = length
    for value in _all_values(model.graph) if fixed else ():
        for axis, dimension in enumerate(value.shape or ()):
            if isinstance(dimension, onnx_ir.SymbolicDim) and dimension.value in fixed:
                assert value.shape is not None
                value.shape[axis] = fixed[str(dimension.value)]


def _all_values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _tensor_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    parameters = list(inspect.signature(module.forward).parameters)
    named = dict(zip(parameters, args, strict=False)) if len(parameters) >= len(args) else {}
    named = named or {f"input_{position}": value for position, value in enumerate(args)}
    return {name: value for name, value in (named | kwargs).items() if isinstance(value, Tensor)}


def _axis_names(value: Tensor) -> tuple[str, ...]:
    if not value.ndim:
        return ()
    return ("batch", "sequence") if is_text(value) else ("batch",)


def _output_names(value: object) -> list[str]:
    """Name the output tensors: the fields of a mapping, numbered where a field holds several."""
    if isinstance(value, Mapping):
        return [
            name if count == 1 else f"{name}.{number}"
            for name, entry in value.items()
            for count in [_count(entry)]
            for number in range(count)
        ]
    count = _count(value)
    return ["output", *(f"output_{number}" for number in range(1, count))]


def _count(value: object) -> int:
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, Mapping):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, tuple | list) else 0


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter from warning the user about itself: deprecations inside torch, and torchvision's absence."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def about_others(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger.addFilter(about_others)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            yield
    finally:
        logger.removeFilter(about_others)
