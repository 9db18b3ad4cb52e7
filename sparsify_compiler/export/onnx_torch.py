"""Write a torch module as a dense ONNX graph with torch's own exporter.

Pruned weights leave as dense zeros; `onnx_pack` then rewrites the graph, as it does with a user's own ONNX file.
"""

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sparsify_compiler.batches import Batch, call_arguments
from sparsify_compiler.errors import ExportError
from sparsify_compiler.frontends.onnx_names import SCOPES
from sparsify_compiler.frontends.torch_trace import TRACE_FAILURES, evaluating

_EXPORTER = ("pkg.torch.", "namespace")
"""Metadata of the exporter. All but the module path is dropped: it holds the user's source lines with their paths."""


@dataclass(frozen=True)
class DenseExport:
    """A dense ONNX model. `dynamic`: sizes of the batch (and of a text's length) other than the example's fit."""

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
        program, dynamic = _export_program(module, args, kwargs)
    axes = {name: _axis_names(value) for name, value in _tensor_inputs(module, args, kwargs).items()}
    model = to_onnx(program, list(axes), names, opset)
    name_axes(model, axes)
    notes = () if dynamic else ("the ONNX graph has the example batch's sizes: the model fixes them when traced",)
    return DenseExport(model, dynamic, notes)


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Run `module` in eval mode without gradients. A saved program has the one mode it was exported in."""
    mode = nullcontext() if isinstance(module, torch.fx.GraphModule) else evaluating(module)
    with mode, torch.no_grad():
        yield


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


def _all_values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _export_program(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ExportedProgram, bool]:
    """Export with free sizes where the module allows it, else with the example's own."""
    grown = _grow(args, kwargs)
    first: BaseException | None = None
    for kind in (Dim.DYNAMIC, Dim.AUTO, None):
        example = (args, kwargs) if kind is None else grown
        shapes = None if kind is None else _dynamic_shapes(module, *example, kind)
        try:
            return torch.export.export(module, example[0], example[1], dynamic_shapes=shapes), kind is not None
        except TRACE_FAILURES as error:
            first = first or error
    assert first is not None
    lines = str(first).strip().splitlines()
    raise ExportError(
        f"torch.export cannot follow {type(module).__name__}: {lines[0] if lines else type(first).__name__}; "
        "an ONNX file needs a forward without data-dependent Python control flow"
    ) from first


def _grow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one, because torch.export takes a size of one for a constant."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return args, kwargs

    def twice(value: Any) -> Any:
        return value.repeat(2, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value

    return tuple(map(twice, args)), {name: twice(value) for name, value in kwargs.items()}


def _tensor_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    parameters = list(inspect.signature(module.forward).parameters)
    named = dict(zip(parameters, args, strict=False)) if len(parameters) >= len(args) else {}
    named = named or {f"input_{position}": value for position, value in enumerate(args)}
    return {name: value for name, value in (named | kwargs).items() if isinstance(value, Tensor)}


def _axis_names(value: Tensor) -> tuple[str, ...]:
    if not value.ndim:
        return ()
    return ("batch", "sequence") if _is_text(value) else ("batch",)


def _is_text(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point()


def _dynamic_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kind: Any) -> Any:
    def free(value: Any) -> Any:
        if isinstance(value, tuple):  # *args
            return tuple(map(free, value))
        return dict.fromkeys(range(len(_axis_names(value))), kind) if isinstance(value, Tensor) else None

    bound = inspect.signature(module.forward).bind_partial(*args)
    return {name: free(value) for name, value in (bound.arguments | kwargs).items()}


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
