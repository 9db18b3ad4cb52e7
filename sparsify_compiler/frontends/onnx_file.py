"""Read and write ONNX files: a file is data, its paths stay inside its folder, a written file is whole or absent."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from sparsify_compiler.errors import ExportError, ModelError

LARGEST_INLINE_BYTES = 1_500_000_000
"""Above this much weight data a file keeps it outside (protobuf ends at 2 GiB)."""


def read_model(path: Path) -> onnx_ir.Model:
    """Read the ONNX file at `path`; external data is only located and checked, and mapped when it is first read.

    Raises:
        ModelError: the file is missing, truncated or not ONNX, holds what this package would lose (sparse
            initialisers, training graphs), or names external data that is absent, too short or outside its folder.
    """
    if not path.is_file():
        raise ModelError(f"ONNX file {str(path)!r}: {'it is a folder' if path.is_dir() else 'no such file'}")
    try:
        proto = onnx.load_model(path, format="protobuf", load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ModelError(f"ONNX file {str(path)!r}: cannot be read ({error}); is it whole, and is it ONNX?") from None
    if reason := _unusable(proto):
        raise ModelError(f"ONNX file {str(path)!r}: {reason}")
    folder = path.parent.resolve()
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and (reason := _outside(tensor, folder)):
            raise ModelError(f"ONNX file {str(path)!r}: weight {tensor.name!r}: {reason}")
    try:
        model = onnx_ir.from_proto(proto)
    except (onnx_ir.serde.SerdeError, ValueError, NotImplementedError, KeyError) as error:
        raise ModelError(f"ONNX file {str(path)!r}: its graph is not valid ONNX: {_first_line(error)}") from None
    onnx_ir.external_data.set_base_dir(model.graph, folder)
    return model


def write_model(model: onnx_ir.Model, path: Path, external_data: bool | None = None) -> tuple[Path, ...]:
    """Write `model` to `path` and return the files written. `model` is not modified.

    `external_data`: keep the weights in `path`.data beside the file; None: only above 1.5 GB. Both files are written
    under other names and renamed at the end, the data first.

    Raises:
        ExportError: the folder or the disk refused the write.
    """
    copy = model.clone()
    if external_data is None:
        external_data = weight_bytes(copy) > LARGEST_INLINE_BYTES
    data_name = f"{path.name}.data"
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            inside = Path(folder)
            if external_data:
                onnx_ir.save(copy, inside / path.name, format="protobuf", external_data=data_name)
            else:
                load_weights(copy)
                (inside / path.name).write_bytes(to_bytes(copy))
            written = [name for name in (data_name, path.name) if (inside / name).exists()]
            for name in written:
                os.replace(inside / name, path.parent / name)
    except OSError as error:
        raise ExportError(f"ONNX file {str(path)!r}: could not be written: {error}; nothing was left behind") from None
    return tuple(path.parent / name for name in reversed(written))


def to_bytes(model: onnx_ir.Model) -> bytes:
    """Serialise `model`, without the type entries that onnx_ir adds for every initialiser."""
    proto = onnx_ir.to_proto(model)
    for graph in _graphs(proto.graph):
        initialisers = {tensor.name for tensor in graph.initializer}
        kept = [info for info in graph.value_info if info.name not in initialisers]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    data: bytes = proto.SerializeToString()
    return data


def load_weights(model: onnx_ir.Model) -> None:
    """Bring all external data of `model` into memory; `model` is modified, the files are only read."""
    onnx_ir.external_data.load_to_model(model)
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if attribute.type == onnx_ir.AttributeType.TENSOR and isinstance(attribute.value, onnx_ir.ExternalTensor):
                tensor = attribute.value
                node.attributes[name] = onnx_ir.AttrTensor(name, onnx_ir.tensor(tensor.numpy().copy(), tensor.dtype))


def weight_bytes(model: onnx_ir.Model) -> int:
    """Sum the bytes of every initialiser, bodies included."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _first_line(error: Exception) -> str:
    """Return the innermost cause of an onnx_ir error: its own text repeats the whole graph."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(cause).strip().splitlines()[0][:200] if str(cause).strip() else type(cause).__name__


def _unusable(proto: onnx.ModelProto) -> str | None:
    if proto.ir_version < 1 or not proto.opset_import or not (proto.graph.node or proto.graph.output):
        return "not an ONNX model: it has no IR version, operator set or graph"
    if proto.training_info:
        return "it holds a training graph, which would be lost; export the model for inference"
    if any(graph.sparse_initializer for graph in _graphs(proto.graph)):
        return "it holds sparse initialisers, which onnx_ir cannot carry; store them dense"
    if name := _never_made(proto.graph, frozenset()):
        return f"its graph reads {name!r} before anything makes it; it is damaged, or not sorted"
    return None


def _never_made(graph: onnx.GraphProto, outside: frozenset[str]) -> str | None:
    """Return the first value that a node of `graph` or of its bodies reads before it is made."""
    known = {"", *outside, *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        missing: list[str] = [name for name in node.input if name not in known]
        for body in _direct_bodies(node):
            missing += [name for name in (_never_made(body, frozenset(known)),) if name]
        if missing:
            return missing[0]
        known.update(node.output)
    ends: list[str] = [value.name for value in graph.output if value.name not in known]
    return ends[0] if ends else None


def _direct_bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for body in _direct_bodies(node):
            yield from _graphs(body)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    nodes = [node for function in proto.functions for node in function.node]
    graphs = [inner for node in nodes for body in _direct_bodies(node) for inner in _graphs(body)]
    graphs += _graphs(proto.graph)
    nodes += [node for graph in graphs for node in graph.node]
    for graph in graphs:
        yield from graph.initializer
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _outside(tensor: onnx.TensorProto, folder: Path) -> str | None:
    """Say what is wrong with where `tensor` keeps its data, or None."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location:
        return "it is marked external and names no file"
    found = (folder / location).resolve()
    if Path(location).is_absolute() or ".." in Path(location).parts or not found.is_relative_to(folder):
        return f"its data file {location!r} leads outside the model's folder, which is refused; copy the file inside"
    if not found.is_file():
        return f"its data file {location!r} is missing beside the model"
    offset, length = entries.get("offset", "0"), entries.get("length", "0")
    if not (offset.isdigit() and length.isdigit()):
        return f"its place in {location!r} is not a number: offset {offset!r}, length {length!r}"
    if found.stat().st_size < int(offset) + int(length):
        return f"its data file {location!r} ends before byte {int(offset) + int(length)}; is it whole?"
    return None
