import hashlib
import json
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparsify_compiler.errors import ExportError
from sparsify_compiler.export.onnx_pack import DENSE, PackResult, pack_model
from sparsify_compiler.export.onnx_sites import SiteMask, read_weight, site_products, site_weights
from sparsify_compiler.frontends.onnx_constants import Constants
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
# Products of at most a few hundred float32 terms, summed in another order by another kernel.
TOLERANCE = 1e-5


def make_model(
    nodes: list,
    weights: Mapping[str, np.ndarray],
    x: tuple,
    y: tuple,
    opset: int = 18,
    ir: int = 10,
    dtype: int = FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info("y", dtype, y)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.checker.check_model(model, full_check=True)
    return model


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def prune(
    proto: onnx.ModelProto, pattern: Pattern, only: str | None = None
) -> tuple[onnx.ModelProto, dict[str, SiteMask]]:
    """Put magnitude zeros into every prunable site's own initialiser."""
    model = onnx_ir.from_proto(proto)
    constants, masks = Constants(model), {}
    for name, products in site_products(model).items():
        if only not in (None, name):
            continue
        weight = read_weight(products[0], constants)
        groups, out, in_ = weight.shape
        layout = products[0].layout
        run_length = in_ // int(np.prod(getattr(layout, "kernel", (1,))))
        keep = torch.stack([pattern.select(w.abs().float(), 0.6, run_length) for w in weight])
        masks[name] = SiteMask(keep, pattern, {"kernel": "dense"})
        value = products[0].weight
        zeroed = weight * keep
        if hasattr(layout, "kernel"):
            own = zeroed.reshape(groups * out, *layout.kernel, -1).movedim(-1, 1)
        else:
            own = zeroed[0].T if layout.transposed else zeroed[0]
        value.const_value = onnx_ir.tensor(np.ascontiguousarray(own.numpy()), name=value.name)
    return onnx_ir.to_proto(model), masks


def pack(
    proto: onnx.ModelProto, masks: Mapping[str, SiteMask], flavour: str = "packed"
) -> tuple[PackResult, onnx.ModelProto]:
    model = onnx_ir.from_proto(proto)
    result = pack_model(model, site_weights(model, site_products(model), masks), flavour)
    packed = onnx_ir.to_proto(result.model)
    onnx.checker.check_model(packed, full_check=True)
    return result, packed


def assert_same_results(dense: onnx.ModelProto, packed: onnx.ModelProto, x: np.ndarray) -> None:
    for expected, found in zip(run(dense, x), run(packed, x), strict=True):
        assert np.abs(expected - found).max() <= TOLERANCE * np.abs(expected).max()


PATTERNS = [NM(2, 4), Unstructured(), Block(4, 4)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_matmul_becomes_one_linear_node(pattern):
    dense, masks = prune(
        make_model(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="up")],
            {"w": normal(32, 24)},
            ("b", 7, 32),
            ("b", 7, 24),
        ),
        pattern,
    )
    result, packed = pack(dense, masks)
    prefix = {NM: "NM", Unstructured: "Bitmap", Block: "Block"}[type(pattern)]
    assert [(node.domain, node.op_type, node.name) for node in packed.graph.node] == [
        ("ai.sparsify", f"{prefix}Linear", "up")
    ]
    assert result.sites[0].written_bytes < result.sites[0].dense_bytes == 32 * 24 * 4
    assert not [tensor for tensor in packed.graph.initializer if tensor.name == "w"]
    assert_same_results(dense, packed, normal(3, 7, 32))


GEMMS = [
    ({}, True, ["BitmapLinear", "Add"]),
    ({}, False, ["BitmapLinear"]),
    ({"transB": 1}, True, ["BitmapLinear", "Add"]),
    ({"alpha": 0.5}, True, ["BitmapWeight", "Gemm"]),
    ({"beta": 2.0, "transB": 1}, True, ["BitmapWeight", "Gemm"]),
    ({"beta": 2.0}, False, ["BitmapLinear"]),
    ({"transA": 1}, True, ["BitmapWeight", "Gemm"]),
    ({"alpha": 1.5, "beta": 0.0, "transA": 1, "transB": 1}, True, ["BitmapWeight", "Gemm"]),
]


@pytest.mark.parametrize(("attributes", "bias", "operators"), GEMMS, ids=str)
def test_a_gemm_keeps_its_meaning_with_every_attribute(attributes, bias, operators):
    w = normal(24, 32) if attributes.get("transB") else normal(32, 24)
    weights = {"w": w, "c": normal(24, seed=1)} if bias else {"w": w}
    x = (32, 5) if attributes.get("transA") else (5, 32)
    node = helper.make_node("Gemm", ["x", *weights], ["y"], name="fc", **attributes)
    dense, masks = prune(make_model([node], weights, x, (5, 24)), Unstructured())
    _, packed = pack(dense, masks)
    assert [node.op_type for node in packed.graph.node] == operators
    assert_same_results(dense, packed, normal(*x, seed=2))


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_weight_on_the_left_keeps_its_node(op):
    dense, masks = prune(
        make_model([helper.make_node(op, ["w", "x"], ["y"], name="left")], {"w": normal(24, 32)}, (32, 5), (24, 5)),
        NM(2, 4),
    )
    _, packed = pack(dense, masks)
    assert [node.op_type for node in packed.graph.node] == ["NMWeight", op]
    assert_same_results(dense, packed, normal(32, 5))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(), Block(4, 4)], ids=str)
@pytest.mark.parametrize(("kernel", "groups"), [((3,), 1), ((3, 2), 2), ((1, 1), 1), ((2, 3, 2), 1)])
def test_a_convolution_reads_its_unpacked_weight(pattern, kernel, groups):
    weight = normal(16, 16 // groups, *kernel)
    spatial = tuple(size + 4 for size in kernel)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", group=groups, strides=[1] * len(kernel))
    dense, masks = prune(
        make_model([node], {"w": weight, "b": normal(16)}, ("n", 16, *spatial), ("n", 16, *[5] * len(kernel))), pattern
    )
    _, packed = pack(dense, masks)
    assert [node.op_type for node in packed.graph.node][1] == "Conv"
    assert packed.graph.node[1].attribute == dense.graph.node[0].attribute
    assert_same_results(dense, packed, normal(2, 16, *spatial))


def test_products_that_share_a_weight_share_its_packed_tensors():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["g"], name="second", alpha=0.5),
        helper.make_node("Gemm", ["g", "w"], ["y"], name="third", alpha=2.0),
    ]
    dense, masks = prune(make_model(nodes, {"w": normal(16, 16)}, (3, 16), (3, 16)), NM(2, 4))
    assert list(masks) == ["first"]
    result, packed = pack(dense, masks)
    assert sorted(tensor.name for tensor in packed.graph.initializer) == ["first.mask", "first.values"]
    assert [node.op_type for node in packed.graph.node] == ["NMLinear", "Relu", "NMWeight", "Gemm", "Gemm"]
    assert result.sites[0].form == "NMLinear + NMWeight"
    assert_same_results(dense, packed, normal(3, 16))


def test_everything_else_in_the_graph_stays_as_it_was():
    nodes = [
        helper.make_node("Constant", [], ["half"], name="half", value=numpy_helper.from_array(np.float32(0.5))),
        helper.make_node("Mul", ["x", "half"], ["m"], name="scale", doc_string="halve it"),
        helper.make_node("MatMul", ["m", "w"], ["h"], name="fc"),
        helper.make_node("Add", ["h", "b"], ["y"], name="bias"),
    ]
    proto = make_model(nodes, {"w": normal(16, 32), "b": normal(32)}, ("batch", 16), ("batch", 32))
    proto.producer_name, proto.producer_version, proto.domain, proto.doc_string = "maker", "7", "org.example", "words"
    helper.set_model_props(proto, {"owner": "me"})
    entry = proto.graph.node[1].metadata_props.add()
    entry.key, entry.value = "where", "here"
    dense, masks = prune(proto, NM(2, 4))
    _, packed = pack(dense, masks)
    assert list(packed.graph.input) == list(dense.graph.input)
    assert list(packed.graph.output) == list(dense.graph.output)
    assert [node for node in packed.graph.node if node.name != "fc"] == [n for n in dense.graph.node if n.name != "fc"]
    kept = {tensor.name: tensor for tensor in packed.graph.initializer}
    assert numpy_helper.to_array(kept["b"]).tobytes() == numpy_helper.to_array(dense.graph.initializer[1]).tobytes()
    assert (packed.producer_name, packed.producer_version, packed.domain, packed.doc_string) == (
        "maker",
        "7",
        "org.example",
        "words",
    )
    assert packed.ir_version == dense.ir_version
    assert {p.key: p.value for p in packed.metadata_props} == {"owner": "me", "ai.sparsify.version": "1"}


def test_the_node_says_what_was_done_and_the_hash_is_that_of_the_unpacked_weight():
    dense, masks = prune(
        make_model([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": normal(32, 24)}, (1, 32), (1, 24)),
        NM(2, 4),
    )
    _, packed = pack(dense, masks)
    weight = np.ascontiguousarray(numpy_helper.to_array(dense.graph.initializer[0]).T)
    assert {p.key: p.value for p in packed.graph.node[0].metadata_props} == {
        "ai.sparsify.site": "fc",
        "ai.sparsify.pattern": "2:4",
        "ai.sparsify.sparsity": "0.5",
        "ai.sparsify.kernel": "dense",
        "ai.sparsify.weight_sha256": hashlib.sha256(weight.tobytes()).hexdigest(),
    }


def test_an_old_file_carries_the_words_in_the_model_and_its_ir_version_is_raised():
    dense, masks = prune(
        make_model(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
            {"w": normal(32, 24)},
            (1, 32),
            (1, 24),
            opset=12,
            ir=6,
        ),
        NM(2, 4),
    )
    result, packed = pack(dense, masks)
    assert packed.ir_version == 8
    assert result.notes == ("IR version raised from 6 to 8, the first with function bodies",)
    words = {p.key: p.value for p in packed.metadata_props}
    assert json.loads(words["ai.sparsify.site.fc"])["pattern"] == "2:4"
    assert not packed.graph.node[0].metadata_props
    assert_same_results(dense, packed, normal(1, 32))


def test_an_opset_too_old_for_the_bodies_keeps_dense_zeros_and_says_so():
    dense, masks = prune(
        make_model(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
            {"w": normal(32, 24)},
            (1, 32),
            (1, 24),
            opset=9,
            ir=4,
        ),
        NM(2, 4),
    )
    result, packed = pack(dense, masks)
    assert result.sites[0].form == DENSE
    assert result.notes == ("opset 9: packed weights need opset 11; the pruned weights are dense zeros",)
    assert [node.op_type for node in packed.graph.node] == ["MatMul"]
    assert packed.ir_version == 4


def test_a_weight_that_something_else_reads_stays_dense():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"),
        helper.make_node("Transpose", ["w"], ["t"], name="turn"),
        helper.make_node("MatMul", ["h", "t"], ["g"], name="back"),
        helper.make_node("ReduceSum", ["w"], ["s"], name="sum"),
        helper.make_node("Add", ["g", "s"], ["y"]),
    ]
    dense, masks = prune(make_model(nodes, {"w": normal(16, 16)}, (3, 16), (3, 16)), NM(2, 4), only="fc")
    result, packed = pack(dense, masks)
    assert result.sites[0].form == DENSE
    assert "reads it too" in result.sites[0].reason
    assert [node.op_type for node in packed.graph.node] == [node.op_type for node in dense.graph.node]


def test_a_weight_that_would_not_shrink_stays_dense():
    dense, masks = prune(
        make_model([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": normal(1, 4)}, (1, 1), (1, 4)),
        Unstructured(),
    )
    result, _ = pack(dense, masks)
    assert result.sites[0].form == DENSE
    assert "packed it would take" in result.sites[0].reason


def test_a_weight_that_is_also_an_input_of_the_graph_stays_dense():
    proto = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        {"w": normal(32, 24)},
        (1, 32),
        (1, 24),
        opset=11,
        ir=4,
    )
    proto.ir_version = 3  # where every initialiser is listed as an input
    proto.graph.input.append(helper.make_tensor_value_info("w", FLOAT, (32, 24)))
    dense, masks = prune(proto, NM(2, 4))
    result, packed = pack(dense, masks)
    assert "also an input of the graph" in result.sites[0].reason
    assert [value.name for value in packed.graph.input] == ["x", "w"]


def test_a_graph_that_still_holds_the_dense_weight_is_refused():
    proto = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": normal(32, 24)}, (1, 32), (1, 24)
    )
    _, masks = prune(proto, NM(2, 4))
    with pytest.raises(ExportError, match="'fc': the graph's weight is not zero in 384 pruned entries"):
        pack(proto, masks)


def test_a_mask_of_an_unknown_site_is_refused():
    proto = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": normal(32, 24)}, (1, 32), (1, 24)
    )
    with pytest.raises(ExportError, match="site 'other' was pruned and is not in the ONNX graph; its sites are fc"):
        pack(proto, {"other": SiteMask(torch.ones(1, 24, 32, dtype=torch.bool), NM(2, 4))})


def test_float16_weights_are_packed_in_float16():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")]
    dense, masks = prune(
        make_model(nodes, {"w": normal(64, 24, dtype=np.float16)}, (2, 64), (2, 24), dtype=FLOAT16), NM(2, 4)
    )
    _, packed = pack(dense, masks)
    assert {t.name: t.data_type for t in packed.graph.initializer} == {
        "fc.values": FLOAT16,
        "fc.mask": TensorProto.UINT8,
    }
    x = normal(2, 64, dtype=np.float16)
    # Both run as float32 products of the same float16 numbers; the result is rounded to float16 once.
    assert np.array_equal(run(dense, x)[0], run(packed, x)[0])


def test_the_dense_flavour_changes_no_node():
    dense, masks = prune(
        make_model([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": normal(32, 24)}, (1, 32), (1, 24)),
        NM(2, 4),
    )
    result, packed = pack(dense, masks, "dense")
    assert result.sites[0].form == DENSE
    assert list(packed.graph.initializer) == list(dense.graph.initializer)
    assert not packed.functions


@pytest.mark.parametrize(
    ("node", "weight", "x", "y", "pattern", "words"),
    [
        (("MatMul", {}), (64, 24), (1, 64), (1, 24), NM(2, 4), "eligible for TensorRT sparse tactics"),
        (("MatMul", {}), (48, 24), (1, 48), (1, 24), NM(2, 4), "multiples of 32; found 48"),
        (("MatMul", {}), (64, 24), (1, 64), (1, 24), NM(4, 8), "not 2:4 along the input channels"),
        (("Conv", {}), (8, 32, 3, 3), (1, 32, 3, 3), (1, 8, 1, 1), NM(2, 4), "eligible for TensorRT sparse tactics"),
        (("Conv", {"group": 2}), (8, 32, 3, 3), (1, 64, 3, 3), (1, 8, 1, 1), NM(2, 4), "in 2 groups"),
    ],
)
def test_the_tensorrt_flavour_says_which_weights_its_tactics_can_take(node, weight, x, y, pattern, words):
    op, attributes = node
    nodes = [helper.make_node(op, ["x", "w"], ["y"], name="site", **attributes)]
    dense, masks = prune(make_model(nodes, {"w": normal(*weight)}, x, y), pattern)
    result, packed = pack(dense, masks, "trt")
    assert words in result.sites[0].reason
    assert not packed.functions
    assert [node.op_type for node in packed.graph.node] == [op]
