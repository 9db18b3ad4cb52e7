import errno
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparsify_compiler.errors import ExportError, VerificationError
from sparsify_compiler.export.onnx_bodies import DOMAIN
from sparsify_compiler.export.onnx_pack import pack_model
from sparsify_compiler.export.onnx_sites import SiteMask, match_sites, site_weights
from sparsify_compiler.export.onnx_verify import PROVIDER, TOLERANCES, tolerance_for, verify, write_onnx
from sparsify_compiler.pattern import NM


def linear(weight: np.ndarray, dtype: int = TensorProto.FLOAT, name: str = "w") -> onnx_ir.Model:
    """y = x W with W (in, out)."""
    sides = weight.shape
    tensor = numpy_helper.from_array(weight, name)
    if dtype == TensorProto.BFLOAT16:
        tensor = helper.make_tensor(name, dtype, sides, weight.ravel())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["y"], name="fc")],
        "main",
        [helper.make_tensor_value_info("x", dtype, ("n", sides[0]))],
        [helper.make_tensor_value_info("y", dtype, ("n", sides[1]))],
        [tensor],
    )
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def weights(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_the_difference_is_the_largest_gap_over_the_largest_expected_value(tmp_path):
    write_onnx(linear(np.eye(4, dtype=np.float32)), tmp_path / "m.onnx")
    x = torch.tensor([[1.0, -8.0, 2.0, 0.0]])
    expected = torch.tensor([[1.5, -8.0, 2.0, 0.0]])
    result = verify(tmp_path / "m.onnx", x, [expected], 0.1)
    assert result.ran
    assert result.difference == 0.5 / 8
    assert (result.tolerance, result.provider) == (0.1, PROVIDER)
    with pytest.raises(VerificationError, match=r"differ from the model's by 0\.0625 .* at most 0\.06"):
        verify(tmp_path / "m.onnx", x, [expected], 0.06)


@pytest.mark.parametrize(
    ("expected", "ratio"),
    [
        ([[0.0, 0.0]], None),  # nothing to compare with: any difference is too much
        ([[float("nan"), 2.0]], None),
        ([[1.0, float("inf")]], None),
    ],
)
def test_outputs_that_cannot_be_scaled_or_are_not_finite_fail(expected, ratio, tmp_path):
    write_onnx(linear(np.eye(2, dtype=np.float32)), tmp_path / "m.onnx")
    with pytest.raises(VerificationError, match="by inf of"):
        verify(tmp_path / "m.onnx", torch.tensor([[1.0, 2.0]]), [torch.tensor(expected)], 0.5)


def test_equal_infinities_and_zeros_are_equal(tmp_path):
    write_onnx(linear(np.eye(2, dtype=np.float32)), tmp_path / "m.onnx")
    x = torch.tensor([[0.0, 0.0]])
    assert verify(tmp_path / "m.onnx", x, [torch.zeros(1, 2)], 1e-3).difference == 0.0


def test_another_shape_or_too_few_outputs_fail(tmp_path):
    write_onnx(linear(np.eye(2, dtype=np.float32)), tmp_path / "m.onnx")
    x = torch.ones(1, 2)
    with pytest.raises(VerificationError, match=r"output 0 is \(1, 2\); the model's \(2, 1\)"):
        verify(tmp_path / "m.onnx", x, [torch.ones(2, 1)], 1.0)
    with pytest.raises(VerificationError, match="gives 1 outputs; the model 2"):
        verify(tmp_path / "m.onnx", x, [x, x], 1.0)


def test_a_wrong_input_fails_with_the_models_inputs(tmp_path):
    write_onnx(linear(np.eye(2, dtype=np.float32)), tmp_path / "m.onnx")
    with pytest.raises(VerificationError, match=r"m\.onnx: missing input x"):
        verify(tmp_path / "m.onnx", {"z": torch.ones(1, 2)}, [torch.ones(1, 2)], 1.0)


def test_floating_inputs_are_cast_to_what_the_file_asks_for(tmp_path):
    write_onnx(linear(np.eye(2, dtype=np.float16), TensorProto.FLOAT16), tmp_path / "m.onnx")
    x = torch.tensor([[0.5, 2.0]])
    assert verify(tmp_path / "m.onnx", x, [x], 1e-3).difference == 0.0


def test_a_bfloat16_file_does_not_run_on_a_cpu_and_says_so(tmp_path):
    model = linear(weights(64, 8), TensorProto.BFLOAT16)
    assert tolerance_for(model) == TOLERANCES[torch.bfloat16]
    write_onnx(model, tmp_path / "m.onnx")
    result = verify(tmp_path / "m.onnx", torch.ones(1, 64, dtype=torch.bfloat16), [torch.ones(1, 8)], 1.0)
    assert not result.ran
    assert result.difference is None
    assert "bfloat16, for which ONNX Runtime's CPU provider has no MatMul" in result.reason


def test_the_tolerance_is_that_of_the_coarsest_weights():
    assert tolerance_for(linear(weights(4, 4))) == TOLERANCES[torch.float32]
    assert tolerance_for(linear(weights(4, 4, dtype=np.float16), TensorProto.FLOAT16)) == TOLERANCES[torch.float16]


def packed_linear(*sides: int) -> tuple[onnx_ir.Model, int, np.ndarray]:
    weight = torch.from_numpy(weights(*sides))
    keep = NM(2, 4).select(weight.T.abs(), 0.5)
    model = linear((weight * keep.T).numpy())
    masks = {"fc": SiteMask(keep.unsqueeze(0), NM(2, 4))}
    result = pack_model(model, site_weights(model, match_sites(model, masks), masks))
    return result.model, result.saved_bytes, (weight * keep.T).numpy()


@pytest.mark.parametrize("external_data", [False, True])
def test_a_packed_file_reports_both_sizes_and_runs(external_data, tmp_path):
    model, saved, weight = packed_linear(64, 32)
    written = write_onnx(model, tmp_path / "m.onnx", saved, external_data)
    write_onnx(linear(weight), tmp_path / "dense.onnx", external_data=external_data)
    assert written.objection is None
    names = ["m.onnx", "m.onnx.data"] if external_data else ["m.onnx"]
    assert [file.name for file in written.files] == names == sorted(p.name for p in tmp_path.glob("m.*"))
    assert [file.size_bytes for file in written.files] == [(tmp_path / name).stat().st_size for name in names]
    dense = sum(path.stat().st_size for path in tmp_path.glob("dense.*"))
    # Exact but for the node's own words: names, attributes and metadata.
    assert abs(sum(file.dense_bytes or 0 for file in written.files) - dense) < 1000
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    # One float32 product of 64 terms, summed in another order.
    assert verify(tmp_path / "m.onnx", x, [x @ torch.from_numpy(weight)], 1e-5).ran


def test_a_full_disk_leaves_nothing_and_is_one_sentence(tmp_path, monkeypatch):
    def no_space(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, saved, _ = packed_linear(64, 32)
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(ExportError, match=r"could not be written: .*No space left on device"):
        write_onnx(model, tmp_path / "m.onnx", saved)
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_body_returns_something_else_fails_verification(tmp_path):
    model, saved, weight = packed_linear(64, 32)
    mask = model.graph.initializers["fc.mask"]
    broken = mask.const_value.numpy().copy()
    broken[0] = np.roll(np.unpackbits(broken[0], bitorder="little"), 1).reshape(-1, 8) @ (1 << np.arange(8))
    mask.const_value = onnx_ir.tensor(broken, name="fc.mask")
    write_onnx(model, tmp_path / "m.onnx", saved)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VerificationError, match="differ from the model's"):
        verify(tmp_path / "m.onnx", x, [x @ torch.from_numpy(weight)], TOLERANCES[torch.float32])


def test_what_onnx_itself_objects_to_is_told(tmp_path):
    model, saved, _ = packed_linear(64, 32)
    model.functions.clear()
    model.graph.opset_imports.pop(DOMAIN)
    written = write_onnx(model, tmp_path / "m.onnx", saved)
    assert written.objection is not None
    assert isinstance(onnx.load(tmp_path / "m.onnx"), onnx.ModelProto)


def test_the_arrays_of_a_sequence_are_compared_one_by_one(tmp_path):
    nodes = [helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1), helper.make_node("Neg", ["x"], ["y"])]
    pair = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    shape = ("n", 2)
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [pair, helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    x = torch.tensor([[1.0, 2.0]])
    assert verify(tmp_path / "m.onnx", x, [x[:, :1], x[:, 1:], -x], 1e-6).difference == 0.0
