"""ONNX sites: every kind of product, every place a weight hides, every refusal, names and ties."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_build import BOOL, FLOAT, INT64, array, load, model, node, reference, scopes

from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends.layout import row_chunks
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.graph import ConvLayout, MatmulLayout

F32 = 2e-5  # a few float32 roundings of sums of up to 54 products of size 1


def gemm(**attributes: float) -> onnx.ModelProto:
    shape = (5, 7) if attributes.get("transA") else (7, 5)
    weight = array(6, 5) if attributes.get("transB") else array(5, 6)
    nodes = [node("Gemm", ["x", "w", "c"], ["y"], **attributes)]
    return model(nodes, [("x", FLOAT, shape)], [("y", FLOAT, (7, 6))], {"w": weight, "c": np.zeros(6, np.float32)})


def left_gemm(**attributes: float) -> onnx.ModelProto:
    weight = array(5, 6) if attributes.get("transA") else array(6, 5)
    shape = (7, 5) if attributes.get("transB") else (5, 7)
    return model(
        [node("Gemm", ["w", "x"], ["y"], **attributes)], [("x", FLOAT, shape)], [("y", FLOAT, (6, 7))], {"w": weight}
    )


def conv(x: tuple[int, ...], w: tuple[int, ...], **attributes: object) -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w"], ["y"], **attributes)]
    return model(nodes, [("x", FLOAT, x)], [("y", FLOAT, [None] * len(x))], {"w": array(*w)})


def matmul(left: bool = False, x: tuple[int, ...] = (2, 3, 5)) -> onnx.ModelProto:
    inputs, weight = (["w", "x"], array(6, 5)) if left else (["x", "w"], array(5, 6))
    return model([node("MatMul", inputs, ["y"])], [("x", FLOAT, x)], [("y", FLOAT, None)], {"w": weight})


PRODUCTS = {
    "matmul": (matmul(), 1.0),
    "matmul of a vector": (matmul(x=(5,)), 1.0),
    "matmul, constant left": (matmul(left=True, x=(2, 5, 4)), 1.0),
    "matmul, constant left of a vector": (matmul(left=True, x=(5,)), 1.0),
    "gemm": (gemm(), 1.0),
    "gemm alpha beta": (gemm(alpha=0.5, beta=2.0), 0.5),
    "gemm transA": (gemm(transA=1), 1.0),
    "gemm transB": (gemm(transB=1), 1.0),
    "gemm transA transB": (gemm(transA=1, transB=1, alpha=3.0), 3.0),
    "gemm left": (left_gemm(), 1.0),
    "gemm left transA": (left_gemm(transA=1), 1.0),
    "gemm left transB": (left_gemm(transB=1), 1.0),
    "gemm left transA transB": (left_gemm(transA=1, transB=1), 1.0),
    "conv 1d": (conv((2, 4, 9), (6, 4, 3), strides=[2], pads=[1, 0], dilations=[2]), 1.0),
    "conv 2d groups": (conv((2, 4, 8, 7), (6, 2, 3, 2), group=2, strides=[2, 1], pads=[1, 0, 2, 1]), 1.0),
    "conv 3d": (conv((1, 2, 5, 4, 6), (3, 2, 2, 3, 1), strides=[1, 2, 3]), 1.0),
    "conv valid": (conv((1, 4, 6, 6), (3, 4, 3, 3), auto_pad="VALID", strides=[2, 2]), 1.0),
    "conv same upper": (conv((1, 4, 6, 7), (3, 4, 2, 3), auto_pad="SAME_UPPER"), 1.0),
    "conv same lower": (conv((1, 4, 6, 7), (3, 4, 2, 4), auto_pad="SAME_LOWER"), 1.0),
    "conv same upper strided": (conv((1, 4, 6, 7), (3, 4, 3, 4), auto_pad="SAME_UPPER", strides=[2, 3]), 1.0),
    "conv same lower strided": (conv((1, 4, 9, 7), (3, 4, 3, 4), auto_pad="SAME_LOWER", strides=[2, 2]), 1.0),
}


def batch_for(graph: OnnxGraph) -> dict[str, torch.Tensor]:
    return {each.name: torch.from_numpy(array(*(int(size or 2) for size in each.shape or ()))) for each in graph.inputs}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_rows_times_weight_is_what_the_operator_computes(kind: str) -> None:
    proto, scale = PRODUCTS[kind]
    graph = load(proto)
    (site,) = graph.sites
    assert site.refusal is None
    assert site.layout is not None
    batch = batch_for(graph)
    seen: list[torch.Tensor] = []
    graph.run_segment(0, graph.enter(batch), lambda reads, x: seen.append(x))
    rows = torch.cat(list(row_chunks(seen[0], site.layout)), 1)
    y = scale * rows @ graph.weight(site).transpose(1, 2)  # (groups, tokens, out)
    (expected,) = reference(proto, batch)
    if isinstance(site.layout, ConvLayout):
        expected = expected.flatten(2).transpose(1, 2).reshape(-1, site.groups, site.out).transpose(0, 1)
    else:
        out_axis = list(proto.graph.node[0].input).index("w") - 2 if expected.dim() > 1 else -1
        expected = expected.movedim(out_axis, -1).reshape(1, -1, site.out)
    torch.testing.assert_close(y, expected, rtol=F32, atol=F32)


def test_a_constant_on_the_left_is_out_by_in_and_reduces_the_last_but_one_axis() -> None:
    site = load(matmul(left=True, x=(2, 5, 4))).sites[0]
    assert site.layout == MatmulLayout(transposed=False, input_axis=-2)
    assert (site.out, site.in_, site.shape) == (6, 5, (6, 5))


def hidden(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], last: str = "w") -> onnx.ModelProto:
    product = node("MatMul", ["x", last], ["y"])
    return model([*nodes, product], [("x", FLOAT, (3, 4))], [("y", FLOAT, (3, 6))], weights, opset=19, ir_version=9)


def quantised(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-128, 127, shape).astype(np.int8)


SCALES = np.linspace(0.1, 0.6, 6, dtype=np.float32)
HIDDEN = {
    "Constant": hidden([node("Constant", [], ["w"], value=numpy_helper.from_array(array(4, 6)))], {}),
    "Transpose": hidden([node("Transpose", ["v"], ["w"], perm=[1, 0])], {"v": array(6, 4)}),
    "Identity": hidden([node("Identity", ["v"], ["w"])], {"v": array(4, 6)}),
    "Cast": hidden([node("Cast", ["v"], ["w"], to=FLOAT)], {"v": array(4, 6).astype(np.float16)}),
    "Reshape": hidden([node("Reshape", ["v", "s"], ["w"])], {"v": array(24), "s": np.array([4, 6])}),
    "Cast, Transpose": hidden(
        [node("Cast", ["v"], ["u"], to=FLOAT), node("Transpose", ["u"], ["w"])], {"v": array(6, 4).astype(np.float64)}
    ),
    "DequantizeLinear": hidden([node("DequantizeLinear", ["v", "s"], ["w"])], {"v": quantised(4, 6), "s": SCALES[0]}),
    "DequantizeLinear, one scale a column": hidden(
        [node("DequantizeLinear", ["v", "s"], ["w"], axis=1)], {"v": quantised(4, 6), "s": SCALES}
    ),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_a_weight_is_found_and_replaced_wherever_it_hides(place: str) -> None:
    proto = HIDDEN[place]
    graph = load(proto)
    (site,) = graph.sites
    assert site.refusal is None
    assert (site.out, site.in_) == (6, 4)
    (expected,) = reference(proto, {"x": torch.eye(4)[:3]}, ["w"])
    torch.testing.assert_close(graph.weight(site)[0].t(), expected, rtol=0, atol=0)  # exact: the value that is read
    new = torch.arange(24.0).reshape(1, 6, 4)
    graph.set_weight(site, new)
    assert torch.equal(graph.weight(site), new)
    assert torch.equal(graph.run(torch.eye(4)[:3])[0], new[0].t()[:3])
    assert [each.op_type for each in graph.model.graph] == ["MatMul"], "the nodes that made the old weight are dead"
    value = graph.weight_value(site)
    assert value.is_initializer()
    assert value.name == "w", "the name the product reads stays"
    assert list(graph.model.graph.initializers) == ["w"]


def test_a_quantised_weight_says_that_the_file_grows() -> None:
    graph = load(HIDDEN["DequantizeLinear"])
    assert "stored quantised" in graph.notes(graph.sites[0])[0]


def test_a_constant_that_others_read_keeps_its_numbers_for_them() -> None:
    nodes = [
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["h"]),
        node("Gather", ["w", "ids"], ["e"]),
        node("Add", ["h", "e"], ["y"]),
    ]
    proto = model(nodes, [("x", FLOAT, (2, 4)), ("ids", INT64, (2,))], [("y", FLOAT, (2, 4))], {"w": array(4, 4)})
    graph = load(proto)
    product = next(site for site in graph.sites if site.kind == "MatMul")
    assert product.dense_by_default == "an embedding reads the same weight"
    graph.set_weight(product, torch.zeros(1, 4, 4))
    ids = torch.tensor([1, 3])
    (y,) = graph.run({"x": torch.ones(2, 4), "ids": ids})
    assert torch.equal(y, torch.from_numpy(array(4, 4))[ids])


def shared(second: list[onnx.NodeProto]) -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), *second]
    return model(nodes, [("x", FLOAT, (3, 4))], [("y", FLOAT, (3, 4))], {"w": array(4, 4)})


@pytest.mark.parametrize(
    "second",
    [
        [node("MatMul", ["r", "w"], ["y"])],
        [node("Gemm", ["r", "w"], ["y"])],
        [node("Transpose", ["w"], ["t"]), node("Gemm", ["r", "t"], ["y"], transB=1)],
        [node("Identity", ["w"], ["i"]), node("MatMul", ["r", "i"], ["y"])],
    ],
    ids=["twice the same", "another operator", "stored the other way", "behind an identity"],
)
def test_a_weight_used_twice_is_one_site_with_two_calls(second: list[onnx.NodeProto]) -> None:
    proto = shared(second)
    graph = load(proto)
    (site,) = graph.sites
    assert site.calls == 2
    assert len(graph.segments) == 1, "no cut between two uses of a weight"
    seen: list[tuple[str, torch.Tensor]] = []
    x = torch.from_numpy(array(3, 4))
    graph.run_segment(0, graph.enter(x), lambda reads, value: seen.append((reads, value)))
    assert [reads for reads, _ in seen] == [site.reads] * 2
    new = torch.from_numpy(array(1, 4, 4, seed=1))
    graph.set_weight(site, new)
    expected = torch.relu(x @ new[0].t()) @ new[0].t()
    torch.testing.assert_close(graph.run(x)[0], expected, rtol=F32, atol=F32)


def test_a_weight_shared_by_two_geometries_is_refused() -> None:
    nodes = [node("Conv", ["x", "w"], ["a"], strides=[1]), node("Conv", ["x", "w"], ["b"], strides=[2])]
    proto = model(nodes, [("x", FLOAT, (1, 2, 9))], [("a", FLOAT, None), ("b", FLOAT, None)], {"w": array(3, 2, 3)})
    (site,) = load(proto).sites
    assert "different ways" in (site.refusal or "")
    assert site.layout is None


def body(weight: str | None = None) -> onnx.GraphProto:
    nodes = [node("MatMul", ["x", weight or "inner"], ["out"])]
    tensors = [] if weight else [numpy_helper.from_array(array(4, 4), "inner")]
    return helper.make_graph(nodes, "body", [], [helper.make_tensor_value_info("out", FLOAT, None)], tensors)


def branch(weight: str | None) -> onnx.ModelProto:
    choice = node("If", ["flag"], ["y"], "choose", then_branch=body(weight), else_branch=body(weight))
    return model([choice], [("flag", BOOL, ()), ("x", FLOAT, (2, 4))], [("y", FLOAT, (2, 4))], {"w": array(4, 4)})


def loop() -> onnx.ModelProto:
    """A Loop that carries its weight as a state that never changes, as converters of TensorFlow write LSTMs."""
    infos = [("i", INT64, ()), ("go", BOOL, ()), ("h", FLOAT, (2, 4)), ("k", FLOAT, (4, 4))]
    outputs = [("go", BOOL, ()), ("h2", FLOAT, (2, 4)), ("k", FLOAT, (4, 4))]
    inner = helper.make_graph(
        [node("MatMul", ["h", "k"], ["h2"])],
        "body",
        [helper.make_tensor_value_info(*each) for each in infos],
        [helper.make_tensor_value_info(*each) for each in outputs],
    )
    nodes = [node("Loop", ["n", "yes", "x", "w"], ["y", "kept"], "repeat", body=inner)]
    weights = {"w": array(4, 4), "n": np.array(2), "yes": np.array(True)}
    return model(nodes, [("x", FLOAT, (2, 4))], [("y", FLOAT, (2, 4))], weights)


def refused(
    op: str, inputs: list[str], weights: dict[str, np.ndarray], domain: str = "", **extra: object
) -> onnx.ModelProto:
    nodes = [node(op, inputs, ["y"], "it", domain=domain, **extra)]
    domains = {domain: 1} if domain else {}
    return model(nodes, [("x", FLOAT, None)], [("y", FLOAT, None)], weights, domains=domains)


def function() -> onnx.ModelProto:
    inner = helper.make_function(
        "local", "Dense", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"])], [helper.make_opsetid("", 17)]
    )
    nodes = [node("Dense", ["x", "w"], ["y"], "call", domain="local")]
    return model(
        nodes,
        [("x", FLOAT, (2, 4))],
        [("y", FLOAT, (2, 4))],
        {"w": array(4, 4)},
        functions=[inner],
        domains={"local": 1},
    )


INT8 = {"w": quantised(4, 4), "s": np.float32(1), "z": np.int8(0)}
RNN = {"w": array(1, 16, 4), "r": array(1, 16, 4)}
REFUSED = {
    "If, own weight": (branch(None), "body of If 'choose'"),
    "If, outer weight": (branch("w"), "body of If 'choose'"),
    "Loop, carried weight": (loop(), "body of Loop 'repeat'"),
    "function": (function(), "function 'Dense'"),
    "depthwise": (refused("Conv", ["x", "w"], {"w": array(4, 1, 3)}, group=4), "depthwise"),
    "transposed": (refused("ConvTranspose", ["x", "w"], {"w": array(4, 2, 3)}), "transposed convolution"),
    "4 axes": (refused("Conv", ["x", "w"], {"w": array(2, 2, 1, 1, 1, 1)}), "over 4 axes"),
    "batched": (refused("MatMul", ["x", "w"], {"w": array(2, 4, 4)}), "batch of matrices (3 axes)"),
    "vector": (refused("MatMul", ["x", "w"], {"w": array(4)}), "a vector"),
    "integers": (refused("MatMul", ["x", "w"], {"w": np.ones((4, 4), np.int64)}), "type INT64"),
    "ConvInteger": (refused("ConvInteger", ["x", "w"], {"w": quantised(2, 2, 3)}), "quantised operator"),
    "MatMulInteger": (refused("MatMulInteger", ["x", "w"], {"w": quantised(4, 4)}), "quantised operator"),
    "QLinearConv": (refused("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], INT8), "quantised operator"),
    "QLinearMatMul": (refused("QLinearMatMul", ["x", "s", "z", "w", "s", "z", "s", "z"], INT8), "quantised operator"),
    "QGemm": (refused("QGemm", ["x", "s", "z", "w", "s", "z"], INT8, "com.microsoft"), "com.microsoft::QGemm"),
    "FusedMatMul": (
        refused("FusedMatMul", ["x", "w"], {"w": array(4, 4)}, "com.microsoft"),
        "com.microsoft::FusedMatMul",
    ),
    "LSTM": (refused("LSTM", ["x", "w", "r"], RNN, hidden_size=4), "recurrent"),
    "GRU": (refused("GRU", ["x", "w", "r"], RNN, hidden_size=4), "recurrent"),
    "RNN": (refused("RNN", ["x", "w", "r"], RNN, hidden_size=4), "recurrent"),
    "Einsum": (refused("Einsum", ["x", "w"], {"w": array(4, 4)}, equation="bi,ij->bj"), "Einsum"),
    "embedding": (refused("Gather", ["w", "x"], {"w": array(9, 4)}), "embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_is_listed_with_its_reason(case: str) -> None:
    proto, reason = REFUSED[case]
    graph = load(proto)
    assert graph.sites, "inspect is never silent"
    for site in graph.sites:
        assert reason in (site.refusal or "")
        assert site.layout is None
        with pytest.raises(ModelError, match="cannot be pruned"):
            graph.weight(site)
        with pytest.raises(ModelError, match="cannot be pruned"):
            graph.set_weight(site, torch.zeros(1, 1, 1))


def test_products_of_activations_and_of_constants_are_no_sites() -> None:
    nodes = [
        node("MatMul", ["x", "x"], ["a"]),
        node("MatMul", ["v", "v"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    assert load(model(nodes, [("x", FLOAT, (4, 4))], [("y", FLOAT, (4, 4))], {"v": array(4, 4)})).sites == ()


def test_names_come_from_scopes_then_the_node_then_the_weight_and_are_unique() -> None:
    nodes = [
        scopes(node("MatMul", ["x", "w1"], ["a"], "node_1"), "model", "model.layers.0", "model.layers.0.mlp"),
        scopes(node("MatMul", ["a", "w2"], ["b"], "node_2"), "model", "model.layers.0", "model.layers.0.mlp"),
        node("MatMul", ["b", "w3"], ["c"], "/layers.1/proj/MatMul"),
        node("MatMul", ["c", "w4"], ["y"]),
    ]
    weights = {f"w{index}": array(4, 4, seed=index) for index in range(1, 5)}
    graph = load(model(nodes, [("x", FLOAT, (2, 4))], [("y", FLOAT, (2, 4))], weights))
    assert [site.name for site in graph.sites] == [
        "model.layers.0.mlp",
        "model.layers.0.mlp#2",
        "/layers.1/proj/MatMul",
        "w4",
    ]
    assert [site.parameter for site in graph.sites] == ["w1", "w2", "w3", "w4"]


def test_the_last_product_before_the_outputs_is_the_head() -> None:
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w2"], ["c"]),
        node("Add", ["c", "bias"], ["d"]),
        node("Softmax", ["d"], ["y"]),
    ]
    weights = {"w1": array(4, 4), "w2": array(4, 6), "bias": array(6)}
    first, last = load(model(nodes, [("x", FLOAT, (2, 4))], [("y", FLOAT, (2, 6))], weights)).sites
    assert first.dense_by_default is None
    assert last.dense_by_default == "output head"


def test_the_only_site_of_a_model_is_not_called_its_head() -> None:
    assert load(matmul()).sites[0].dense_by_default is None


def test_sites_that_read_one_tensor_share_its_name_and_it_is_observed_once() -> None:
    nodes = [*(node("MatMul", ["x", f"w{i}"], [f"a{i}"]) for i in range(3)), node("Sum", ["a0", "a1", "a2"], ["y"])]
    weights = {f"w{i}": array(4, 4, seed=i) for i in range(3)}
    graph = load(model(nodes, [("x", FLOAT, (2, 4))], [("y", FLOAT, (2, 4))], weights))
    seen: list[str] = []
    graph.run_segment(0, graph.enter(torch.ones(2, 4)), lambda reads, x: seen.append(reads))
    assert {site.reads for site in graph.sites} == set(seen)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_weight_keeps_the_dtype_of_the_model(dtype: type) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {"w": array(4, 6).astype(dtype)}
    graph = load(model([node("MatMul", ["x", "w"], ["y"])], [("x", kind, (2, 4))], [("y", kind, (2, 6))], weights))
    (site,) = graph.sites
    assert graph.weight(site).dtype == torch.float32
    graph.set_weight(site, graph.weight(site) * 2)
    value = graph.weight_value(site)
    assert value.const_value is not None
    assert value.const_value.numpy().dtype == dtype
    np.testing.assert_array_equal(value.const_value.numpy(), weights["w"] * 2)


def test_bfloat16_weights_round_to_nearest() -> None:
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, (2, 2), [1.0, 2.0, 3.0, 4.0])
    kind = TensorProto.BFLOAT16
    proto = model([node("MatMul", ["x", "w"], ["y"])], [("x", kind, (2, 2))], [("y", kind, (2, 2))])
    proto.graph.initializer.append(tensor)
    graph = load(proto)
    (site,) = graph.sites
    new = torch.tensor([[[1.001, -0.3], [1e-3, 7.77]]])
    graph.set_weight(site, new)
    assert torch.equal(graph.weight(site), new.bfloat16().float())


def test_a_weight_of_another_shape_is_an_error() -> None:
    graph = load(matmul())
    with pytest.raises(ModelError, match=r"asked for a weight \(groups, out, in\) \(1, 6, 5\), found \(1, 5, 6\)"):
        graph.set_weight(graph.sites[0], torch.zeros(1, 5, 6))


def test_a_number_too_large_for_float16_is_an_error() -> None:
    kind = TensorProto.FLOAT16
    weights = {"w": array(4, 6).astype(np.float16)}
    graph = load(model([node("MatMul", ["x", "w"], ["y"])], [("x", kind, (2, 4))], [("y", kind, (2, 6))], weights))
    with pytest.raises(ModelError, match=r"layer 'w': a new weight of size 1e\+05 does not fit float16"):
        graph.set_weight(graph.sites[0], torch.full((1, 6, 4), 1e5))
