"""ONNX segments: cut where few values live, run by ONNX Runtime as the whole model runs, with the weights of now."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_build import BOOL, FLOAT, INT64, STRING, array, load, model, node, reference, scopes

from sparsify_compiler.errors import ModelError
from sparsify_compiler.frontends import onnx_runner
from sparsify_compiler.frontends.onnx import OnnxGraph

EXACT = {"rtol": 0.0, "atol": 0.0}  # one operator at a time on both sides: no fusion that could round differently
FUSED = {"rtol": 1e-5, "atol": 1e-6}  # the session may fuse a product with what follows: a few roundings of 1e-7


def blocks(count: int = 3) -> onnx.ModelProto:
    """Residual blocks with an attention-like mask that lives to the end, and scopes as torch's exporter writes them."""
    nodes = [node("Unsqueeze", ["mask", "last"], ["wide"]), node("Mul", ["x", "wide"], ["h0"])]
    weights: dict[str, np.ndarray] = {"last": np.array([2])}
    for i in range(count):
        path = ("model", f"model.layers.{i}", f"model.layers.{i}.mlp")
        nodes += [
            scopes(node("MatMul", [f"h{i}", f"up{i}"], [f"u{i}"]), *path, f"{path[-1]}.up"),
            scopes(node("Mul", [f"u{i}", "wide"], [f"m{i}"]), *path),
            scopes(node("Relu", [f"m{i}"], [f"r{i}"]), *path),
            scopes(node("MatMul", [f"r{i}", f"down{i}"], [f"d{i}"]), *path, f"{path[-1]}.down"),
            scopes(node("Add", [f"h{i}", f"d{i}"], [f"h{i + 1}"]), "model", f"model.layers.{i}"),
        ]
        weights |= {f"up{i}": array(8, 12, seed=i) / 4, f"down{i}": array(12, 8, seed=i) / 4}
    nodes.append(node("Tanh", [f"h{count}"], ["y"]))
    infos = [("x", FLOAT, ("batch", "time", 8)), ("mask", FLOAT, ("batch", "time"))]
    return model(nodes, infos, [("y", FLOAT, None)], weights)


def block_batch(batch: int = 2) -> dict[str, torch.Tensor]:
    return {"x": torch.from_numpy(array(batch, 5, 8)), "mask": (torch.arange(5) < 4).float().repeat(batch, 1)}


def run_all(graph: OnnxGraph, batch: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    values = graph.enter(batch)
    for segment in graph.segments:
        values = graph.run_segment(segment.index, values, **options)
    return graph.outputs(values)


def test_repeated_modules_become_segments_and_run_as_the_whole() -> None:
    proto = blocks()
    graph = load(proto)
    assert [segment.name for segment in graph.segments] == [f"model.layers.{i}" for i in range(3)]
    assert graph.segments[1].sites == ("model.layers.1.mlp.up", "model.layers.1.mlp.down")
    assert graph.segments[1].needs == ("h1", "wide"), "the mask from before the first site stays alive"
    for batch in (block_batch(2), block_batch(3)):
        torch.testing.assert_close(graph.run(batch), tuple(reference(proto, batch)), **FUSED)


def test_values_given_to_a_segment_are_not_modified_and_dead_ones_are_dropped() -> None:
    graph = load(blocks())
    values = graph.enter(block_batch())
    before = {name: value.clone() for name, value in values.items()}
    after = graph.run_segment(0, values)
    assert {name: torch.equal(value, before[name]) for name, value in values.items()} == {"x": True, "mask": True}
    assert set(after) == {"h1", "wide"}


def test_sites_are_observed_with_exactly_what_they_read() -> None:
    proto = blocks()
    graph = load(proto)
    seen: dict[str, torch.Tensor] = {}
    run_all(graph, block_batch(), observe=seen.__setitem__)
    assert list(seen) == [site.reads for site in graph.sites]
    for name, value in zip(seen, reference(proto, block_batch(), list(seen)), strict=True):
        torch.testing.assert_close(seen[name], value, **FUSED)


def test_new_weights_are_used_at_once_and_overrides_for_one_call_only() -> None:
    graph = load(blocks(1))
    batch = block_batch()
    dense = run_all(graph, batch)[0]
    down = graph.sites[1]
    zero = torch.zeros(1, down.out, down.in_)
    overridden = run_all(graph, batch, weights={down.name: zero})[0]
    assert torch.equal(run_all(graph, batch)[0], dense), "the override is gone"
    graph.set_weight(down, zero)
    pruned = run_all(graph, batch)[0]
    wide = batch["x"] * batch["mask"][..., None]
    torch.testing.assert_close(pruned, torch.tanh(wide), **FUSED)
    torch.testing.assert_close(overridden, pruned, **EXACT)


def test_one_session_is_built_per_segment_and_set_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    original = onnx_runner.open_model

    def counted(model: Any, what: str) -> Any:
        built.append(what)
        return original(model, what)

    monkeypatch.setattr(onnx_runner, "open_model", counted)
    graph = load(blocks(2))
    values = [graph.enter(block_batch(size)) for size in (1, 2, 3)]
    for segment in graph.segments:
        values = [graph.run_segment(segment.index, each) for each in values]
    assert built == ["segment 'model.layers.0'", "segment 'model.layers.1'"]


def test_replaced_weights_keep_their_session_while_they_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    original = onnx_runner.open_model

    def counted(model: Any, what: str) -> Any:
        built.append(what)
        return original(model, what)

    monkeypatch.setattr(onnx_runner, "open_model", counted)
    graph = load(blocks(2))
    values = graph.enter(block_batch())
    replaced = {graph.sites[0].name: graph.weight(graph.sites[0])}
    for _ in range(3):
        graph.run_segment(0, values)
        first = graph.run_segment(0, values, weights=replaced)
    assert len(built) == 2, "one session for the model's own weights, one for the replaced ones"
    replaced[graph.sites[0].name].zero_()
    second = graph.run_segment(0, values, weights=replaced)
    assert not torch.equal(first["h1"], second["h1"]), "a change in place is seen"


def test_values_inside_a_segment_can_be_looked_at() -> None:
    proto = blocks(2)
    graph = load(proto)
    after, made = graph.peek(0, graph.enter(block_batch()), ["d0", "m0"])
    assert set(after) == {"h1", "wide"}
    expected = reference(proto, block_batch(), ["d0", "m0"])
    torch.testing.assert_close([made["d0"], made["m0"]], expected, **FUSED)


def test_a_model_too_large_for_one_message_runs_through_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runner, "LARGEST_INLINE_BYTES", 100)
    proto = blocks(1)
    torch.testing.assert_close(load(proto).run(block_batch())[0], reference(proto, block_batch())[0], **FUSED)


def test_node_names_that_are_paths_tell_the_blocks() -> None:
    nodes, weights, name = [], {}, "x"
    for i in range(3):
        nodes += [
            node("MatMul", [name, f"w{i}"], [f"a{i}"], f"/model/layers.{i}/mlp/MatMul"),
            node("Relu", [f"a{i}"], [f"h{i}"], f"/model/layers.{i}/mlp/act/Relu"),
        ]
        weights[f"w{i}"] = array(4, 4, seed=i)
        name = f"h{i}"
    graph = load(model(nodes, [("x", FLOAT, (2, 4))], [("h2", FLOAT, (2, 4))], weights))
    assert [segment.name for segment in graph.segments] == [f"/model/layers.{i}" for i in range(3)]


def test_bodies_that_read_outer_values_get_them_across_a_cut() -> None:
    def inner(op: str) -> onnx.GraphProto:
        return helper.make_graph(
            [node(op, ["early", "h"], ["o"])], "body", [], [helper.make_tensor_value_info("o", FLOAT, None)]
        )

    nodes = [
        node("Exp", ["x"], ["early"]),
        node("MatMul", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("MatMul", ["h", "w2"], ["b"]),
        node("If", ["flag"], ["c"], then_branch=inner("Add"), else_branch=inner("Sub")),
        node("Add", ["b", "c"], ["y"]),
    ]
    proto = model(
        nodes,
        [("x", FLOAT, (2, 4)), ("flag", BOOL, ())],
        [("y", FLOAT, (2, 4))],
        {"w1": array(4, 4, seed=1), "w2": array(4, 4, seed=2)},
    )
    graph = load(proto)
    assert len(graph.segments) == 2
    for flag in (True, False):
        batch = {"x": torch.from_numpy(array(2, 4)), "flag": torch.tensor(flag)}
        torch.testing.assert_close(graph.run(batch), tuple(reference(proto, batch)), **FUSED)


def test_local_functions_come_along() -> None:
    double = helper.make_function(
        "local", "Double", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Double", ["a"], ["b"], domain="local"),
        node("MatMul", ["b", "w2"], ["y"]),
    ]
    weights = {"w1": array(4, 4, seed=1), "w2": array(4, 4, seed=2)}
    proto = model(
        nodes, [("x", FLOAT, (2, 4))], [("y", FLOAT, (2, 4))], weights, functions=[double], domains={"local": 1}
    )
    x = torch.from_numpy(array(2, 4))
    torch.testing.assert_close(load(proto).run(x), tuple(reference(proto, {"x": x})), **FUSED)


def test_a_sequence_is_never_cut_through() -> None:
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("SplitToSequence", ["a", "two"], ["s"], axis=1),
        node("ConcatFromSequence", ["s"], ["b"], axis=0),
        node("MatMul", ["b", "w2"], ["y"]),
    ]
    weights = {"w1": array(4, 4, seed=1), "w2": array(2, 4, seed=2), "two": np.array(2)}
    proto = model(nodes, [("x", FLOAT, (2, 4))], [("y", FLOAT, (4, 4))], weights)
    graph = load(proto)
    assert all("s" not in segment.needs for segment in graph.segments)
    x = torch.from_numpy(array(2, 4))
    torch.testing.assert_close(graph.run(x), tuple(reference(proto, {"x": x})), **FUSED)


def test_integers_booleans_strings_and_sequences_pass_through() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Greater", ["a", "zero"], ["flags"]),
        node("ArgMax", ["a"], ["best"], axis=1),
        node("Identity", ["words"], ["same"]),
        node("SequenceConstruct", ["a", "a"], ["pair"]),
    ]
    proto = model(
        nodes,
        [("x", FLOAT, (2, 4)), ("words", STRING, (2,))],
        [("flags", BOOL, None), ("best", INT64, None), ("same", STRING, None)],
        {"w": array(4, 3), "zero": np.float32(0)},
    )
    proto.graph.output.append(helper.make_tensor_sequence_value_info("pair", FLOAT, None))
    graph = load(proto)
    x, words = torch.from_numpy(array(2, 4)), np.array(["a", "b"], dtype=object)
    flags, best, first, second = graph.run({"x": x, "words": words})
    a = x @ torch.from_numpy(array(4, 3))
    assert torch.equal(flags, a > 0)
    assert torch.equal(best, a.argmax(1, keepdim=True))
    torch.testing.assert_close(first, a, **FUSED)
    torch.testing.assert_close(second, a, **FUSED)


def test_inputs_and_constants_that_are_outputs_come_back() -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["y"])],
        [("x", FLOAT, (2, 4))],
        [("y", FLOAT, None), ("x", FLOAT, (2, 4)), ("w", FLOAT, (4, 4))],
        {"w": array(4, 4)},
    )
    graph = load(proto)
    x = torch.from_numpy(array(2, 4))
    _, same, weight = graph.run(x)
    assert torch.equal(same, x)
    assert torch.equal(weight, torch.from_numpy(array(4, 4)))


def test_a_graph_without_sites_is_one_segment() -> None:
    proto = model([node("Relu", ["x"], ["y"])], [("x", FLOAT, (2,))], [("y", FLOAT, (2,))])
    graph = load(proto)
    assert graph.sites == ()
    assert torch.equal(graph.run(torch.tensor([-1.0, 2.0]))[0], torch.tensor([0.0, 2.0]))


def test_an_operator_that_onnx_runtime_lacks_is_an_error_in_words() -> None:
    proto = model(
        [node("Nonsense", ["x", "w"], ["y"], domain="nowhere")],
        [("x", FLOAT, (2,))],
        [("y", FLOAT, (2,))],
        {"w": array(2)},
        domains={"nowhere": 1},
    )
    with pytest.raises(ModelError, match=r"ONNX Runtime .* cannot load the model"):
        load(proto).run(torch.ones(2))


def test_the_printed_graph_shows_segments_nodes_and_sites() -> None:
    text = load(blocks(2)).text()
    assert "segment 1 model.layers.1: needs h1, wide" in text
    assert "u1 = MatMul(h1, up1)  # site model.layers.1.mlp.up" in text
    assert text.endswith("return y")
