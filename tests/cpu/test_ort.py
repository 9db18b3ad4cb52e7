"""Running ONNX files: values, external data, and one sentence for everything that can be wrong."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.runtime.ort import run, run_file, session

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
X = np.ones((2, 4), dtype=np.float32)


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def write(path: Path, weight: TensorProto | None = None, node: str = "MatMul", domain: str = "") -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node(node, ["x", "w"], ["y"], domain=domain)],
        "graph",
        [x],
        [y],
        [numpy_helper.from_array(WEIGHT, "w") if weight is None else weight],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_a_file_is_run_on_named_arrays_of_any_strides(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    for x in (X, np.zeros((0, 4), np.float32), np.arange(40, dtype=np.float32).reshape(5, 8)[:, ::2]):
        outputs = run_file(path, {"x": x})
        assert list(outputs) == ["y"]
        np.testing.assert_array_equal(outputs["y"], x @ WEIGHT)  # small integers: exact in float32
    opened = session(path, threads=1)
    np.testing.assert_array_equal(run(opened, {"x": X})["y"], X @ WEIGHT)


def test_external_data_is_read_from_the_files_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "w.bin").write_bytes(WEIGHT.tobytes())
    path = write(folder / "m.onnx", external("w.bin"))
    np.testing.assert_array_equal(run_file(path, {"x": X})["y"], X @ WEIGHT)
    for location in ("../w.bin", str(tmp_path / "w.bin"), "absent.bin"):
        with pytest.raises(ModelError, match="weight 'w'"):
            session(write(folder / "m.onnx", external(location)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"missing input x; given: none; the model's inputs are x tensor\(float\) \(tokens, 4\)"),
        ({"y": X}, "missing input x; given: y"),
        ({"x": X, "z": X}, "unknown input z"),
        ({"x": X.astype(np.float64)}, "input 'x' is float64; the model needs float32"),
        ({"x": X[0]}, r"input 'x' has shape \(4,\); the model needs \(tokens, 4\)"),
        ({"x": X[:, :3]}, r"input 'x' has shape \(2, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        run_file(write(tmp_path / "m.onnx"), inputs)


def test_files_that_are_not_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        session(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="it is a folder"):
        session(tmp_path)
    whole = write(tmp_path / "m.onnx").read_bytes()
    for content in (b"", b"not a model at all\n" * 9, whole[: len(whole) // 2]):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"broken\.onnx"):
            session(tmp_path / "broken.onnx")


def test_an_operator_that_onnx_runtime_lacks_is_named_without_its_codes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", node="Mystery", domain="example")
    with pytest.raises(ModelError, match=r"cannot open .*m\.onnx: .*example:Mystery") as caught:
        session(path)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failure_while_running_is_a_model_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", numpy_helper.from_array(WEIGHT.reshape(3, 4), "w"), node="Add")
    with pytest.raises(ModelError, match="cannot run the model"):
        run_file(path, {"x": np.ones((2, 4), np.float32)})  # (2, 4) + (3, 4) does not broadcast


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_cuda_without_cuda_is_refused_instead_of_run_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"asked to run m\.onnx on cuda, but this onnxruntime"):
        session(write(tmp_path / "m.onnx"), device="cuda")
