"""ONNX files: bad ones are one sentence, paths stay inside the folder, what is written is the user's own graph."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import external_data_helper, helper, numpy_helper
from onnx_build import FLOAT, array, load, model, node, reference, scopes

from sparsify_compiler.errors import ExportError, ModelError
from sparsify_compiler.frontends import onnx_file
from sparsify_compiler.frontends.onnx import OnnxGraph, load_onnx


def two_layers(ir_version: int = 8) -> onnx.ModelProto:
    nodes = [
        scopes(node("Gemm", ["x", "w1", "c"], ["h"], "first", doc_string="the first"), "model", "model.fc1"),
        node("Relu", ["h"], ["r"]),
        node("Constant", [], ["w2"], "constant", value=numpy_helper.from_array(array(6, 4))),
        node("MatMul", ["r", "w2"], ["y"], "second"),
    ]
    weights = {"w1": array(5, 6), "c": array(6)}
    proto = model(nodes, [("x", FLOAT, ("batch", 5))], [("y", FLOAT, ("batch", 4))], weights, ir_version=ir_version)
    proto.producer_name, proto.producer_version, proto.doc_string, proto.model_version = "maker", "7", "words", 3
    proto.graph.doc_string = "the graph"
    helper.set_model_props(proto, {"licence": "mine"})
    proto.graph.value_info.append(helper.make_tensor_value_info("h", FLOAT, ("batch", 6)))
    return proto


def external(folder: Path, location: str = "weights.bin", rows: int = 6) -> Path:
    """Write a model whose weight lies in `location`, without checking where that is."""
    proto = two_layers()
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data
    external_data_helper.set_external_data(tensor, location=location, offset=0, length=len(data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    (folder / "weights.bin").write_bytes(data)
    return path


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx'?: no such file"):
        load_onnx(tmp_path / "none.onnx")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it is a folder"):
        load_onnx(tmp_path)


@pytest.mark.parametrize("keep", [1, 10, 100, 300])
def test_a_truncated_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(two_layers().SerializeToString()[:keep])
    with pytest.raises(ModelError, match="ONNX file"):
        load_onnx(path)


@pytest.mark.parametrize("data", [b"", b"not a model at all", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000)])
def test_what_is_not_onnx_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="ONNX"):
        load_onnx(path)


def test_a_graph_that_reads_a_value_nobody_makes_is_an_error(tmp_path: Path) -> None:
    proto = model([node("MatMul", ["x", "nowhere"], ["y"])], [("x", FLOAT, (2, 2))], [("y", FLOAT, (2, 2))])
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="nowhere"):
        load_onnx(path)


def test_sparse_initialisers_are_refused_since_they_would_be_lost(tmp_path: Path) -> None:
    proto = two_layers()
    values = helper.make_tensor("s", FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", onnx.TensorProto.INT64, [1], [3])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="sparse initialisers"):
        load_onnx(path)


def test_external_data_is_read_from_beside_the_model(tmp_path: Path) -> None:
    graph = load_onnx(external(tmp_path))
    torch.testing.assert_close(graph.weight(graph.sites[0])[0].t(), torch.from_numpy(array(5, 6)), rtol=0, atol=0)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "sub/../../weights.bin", "a/../weights.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    with pytest.raises(ModelError, match="leads outside the model's folder, which is refused"):
        load_onnx(external(folder, location))


def test_a_link_that_leads_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    os.symlink(tmp_path / "secret.bin", folder / "link.bin")
    with pytest.raises(ModelError, match="leads outside"):
        load_onnx(external(folder, "link.bin"))


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weight 'w1': its data file 'gone.bin' is missing"):
        load_onnx(external(tmp_path, "gone.bin"))


def test_short_external_data_is_an_error(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(50))
    with pytest.raises(ModelError, match="ends before byte 120"):
        load_onnx(path)


def nodes_without(proto: onnx.ModelProto, gone: set[str]) -> list[bytes]:
    return [each.SerializeToString(deterministic=True) for each in proto.graph.node if each.output[0] not in gone]


@pytest.mark.parametrize("ir_version", [3, 8, 10])
def test_everything_but_the_replaced_weights_is_written_as_it_was(tmp_path: Path, ir_version: int) -> None:
    before = two_layers(ir_version)
    path = tmp_path / "model.onnx"
    path.write_bytes(before.SerializeToString())
    graph = load_onnx(path)
    new = {site.name: torch.full((1, site.out, site.in_), 0.5) for site in graph.sites}
    for site in graph.sites:
        graph.set_weight(site, new[site.name])
    written = graph.save(tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(after)
    assert written == (tmp_path / "out.onnx",)
    assert nodes_without(after, set()) == nodes_without(before, {"w2"}), "only the Constant that held a weight went"
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, field) == getattr(before, field)
    for field in ("opset_import", "metadata_props", "functions"):
        assert list(getattr(after, field)) == list(getattr(before, field))
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.graph.value_info) == list(before.graph.value_info)
    assert list(after.graph.input)[: len(before.graph.input)] == list(before.graph.input)
    assert (after.graph.name, after.graph.doc_string) == (before.graph.name, before.graph.doc_string)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    assert set(tensors) == {"w1", "c", "w2"}
    np.testing.assert_array_equal(tensors["c"], array(6))
    assert np.all(tensors["w1"] == 0.5)
    assert np.all(tensors["w2"] == 0.5)
    assert path.read_bytes() == before.SerializeToString(), "the input file stays as it was"


def test_the_given_model_stays_as_it_was() -> None:
    proto = two_layers()
    given = onnx_ir.from_proto(proto)
    before = onnx_ir.to_proto(given).SerializeToString(deterministic=True)
    graph = OnnxGraph(given)
    for site in graph.sites:
        graph.set_weight(site, torch.zeros(1, site.out, site.in_))
    assert onnx_ir.to_proto(given).SerializeToString(deterministic=True) == before


def test_external_data_is_written_beside_the_file_and_read_back(tmp_path: Path) -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["y"])], [("x", FLOAT, (2, 30))], [("y", FLOAT, (2, 40))], {"w": array(30, 40)}
    )
    graph = load(proto)
    files = graph.save(tmp_path / "m.onnx", external_data=True)
    assert files == (tmp_path / "m.onnx", tmp_path / "m.onnx.data")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    x = torch.from_numpy(array(2, 30))
    assert torch.equal(load_onnx(tmp_path / "m.onnx").run(x)[0], reference(proto, {"x": x})[0])


def test_a_model_with_external_data_is_written_whole_into_another_folder(tmp_path: Path) -> None:
    graph = load_onnx(external(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    graph.save(tmp_path / "elsewhere" / "m.onnx")
    again = load_onnx(tmp_path / "elsewhere" / "m.onnx")
    assert torch.equal(again.weight(again.sites[0]), graph.weight(graph.sites[0]))


def test_external_data_of_a_constant_node_is_written_too(tmp_path: Path) -> None:
    proto = two_layers()
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="d", size_threshold=0, convert_attribute=True
    )
    graph = load_onnx(tmp_path / "m.onnx")
    (tmp_path / "elsewhere").mkdir()
    graph.save(tmp_path / "elsewhere" / "m.onnx")
    x = torch.ones(2, 5)
    (expected,) = reference(two_layers(), {"x": x})
    torch.testing.assert_close(load_onnx(tmp_path / "elsewhere" / "m.onnx").run(x)[0], expected, rtol=0, atol=0)


def test_the_input_itself_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(two_layers().SerializeToString())
    with pytest.raises(ExportError, match="never modified"):
        load_onnx(path).save(tmp_path / "." / "model.onnx")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out.onnx").write_bytes(b"the old file")
    monkeypatch.setattr(onnx_file.os, "replace", full)
    with pytest.raises(ExportError, match="No space left on device"):
        load(two_layers()).save(tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_bytes() == b"the old file"
