"""Moments: after the correction every pruned convolution has the dense mean and variance, and its zeros stay zero."""

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx_build import FLOAT, array, load, model, node

from sparsify_compiler.errors import CalibrationError, ModelError
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.passes.moments import correct_moments

# The corrected weights and biases are rounded to float32, and later layers see those roundings.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def network() -> onnx.ModelProto:
    """A convolution with a bias, one with a BatchNormalization behind, a grouped one with neither, and a Gemm."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], "one", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], "two"),
        node("BatchNormalization", ["c2", "gamma", "beta", "mean", "var"], ["n2"], "norm"),
        node("Relu", ["n2"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"], "three", group=2),
        node("Relu", ["c3"], ["r3"]),
        node("GlobalAveragePool", ["r3"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w4"], ["y"], "four"),
    ]
    weights = {
        "w1": array(8, 3, 3, 3) / 3,
        "b1": array(8),
        "w2": array(6, 8, 3, 3) / 6,
        "gamma": 1 + array(6) / 8,
        "beta": array(6, seed=1),
        "mean": array(6, seed=2),
        "var": 1 + array(6, seed=3) ** 2,
        "w3": array(4, 3, 3, 3) / 4,
        "w4": array(4, 5),
    }
    return model(nodes, [("x", FLOAT, ("batch", 3, 9, 9))], [("y", FLOAT, ("batch", 5))], weights)


BATCHES = [torch.from_numpy(array(4, 3, 9, 9, seed=seed)) + 0.5 for seed in range(3)]
CONVS = ("one", "two", "three")
BEHIND = {"one": "c1", "two": "n2", "three": "c3"}  # where the mean and variance can be seen: after the shift


def halve(graph: OnnxGraph) -> None:
    """Remove the smaller half of every weight."""
    for site in graph.sites:
        weight = graph.weight(site)
        graph.set_weight(site, weight * (weight.abs() > weight.abs().median()))


def moments(graph: OnnxGraph) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    proto = onnx_ir.to_proto(graph.model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in BEHIND.values())
    whole = load(proto)
    runs = [whole.run(batch) for batch in BATCHES]
    found = {}
    for position, site in enumerate(BEHIND):
        rows = torch.cat([run[position] for run in runs]).double().movedim(1, 0).flatten(1)
        found[site] = (rows.mean(1), rows.var(1, correction=0))
    return found


def test_mean_and_variance_of_every_pruned_convolution_are_the_dense_ones_again() -> None:
    dense, pruned = load(network()), load(network())
    halve(pruned)
    wanted, before = moments(dense), moments(pruned)
    (note,) = correct_moments(pruned, dense, BATCHES, CONVS)
    assert note.startswith(f"mean and variance of {len(CONVS)} convolutions corrected")
    after = moments(pruned)
    for name in CONVS:
        assert not torch.allclose(before[name][0], wanted[name][0], **TOLERANCE), "the check can fail"
        torch.testing.assert_close(after[name], wanted[name], **TOLERANCE)


def test_zeros_stay_zero_and_other_sites_stay_as_they_were() -> None:
    dense, pruned = load(network()), load(network())
    halve(pruned)
    keep = {site.name: pruned.weight(site) != 0 for site in pruned.sites}
    gemm = pruned.weight(pruned.sites[-1])
    correct_moments(pruned, dense, BATCHES, CONVS)
    for site in pruned.sites:
        assert torch.equal(pruned.weight(site) != 0, keep[site.name])
    assert torch.equal(pruned.weight(pruned.sites[-1]), gemm)


def test_the_shift_goes_to_the_bias_the_norm_or_a_new_bias() -> None:
    dense, pruned = load(network()), load(network())
    halve(pruned)
    correct_moments(pruned, dense, BATCHES, CONVS)
    inputs = {each.name: [value.name for value in each.inputs if value] for each in pruned.model.graph}
    assert inputs["one"] == ["x", "w1", "b1"]
    assert inputs["two"] == ["r1", "w2"]
    assert inputs["norm"] == ["c2", "gamma", "beta", "mean", "var"]
    assert inputs["three"] == ["r2", "w3", "w3_bias"]
    proto = onnx_ir.to_proto(pruned.model)
    onnx.checker.check_model(proto)
    means = [onnx.numpy_helper.to_array(each) for each in proto.graph.initializer if each.name == "mean"]
    assert not np.allclose(means[0], array(6, seed=2))


def test_a_channel_that_lost_every_weight_keeps_the_dense_mean() -> None:
    dense, pruned = load(network()), load(network())
    site = pruned.sites[0]
    weight = pruned.weight(site)
    weight[0, 3] = 0
    pruned.set_weight(site, weight)
    correct_moments(pruned, dense, BATCHES, ["one"])
    after, wanted = moments(pruned)["one"], moments(dense)["one"]
    torch.testing.assert_close(after[0], wanted[0], **TOLERANCE)
    assert after[1][3] < 1e-9


def test_a_convolution_used_twice_is_left_and_noted() -> None:
    nodes = [node("Conv", ["x", "w"], ["a"], "c"), node("Conv", ["a", "w"], ["y"], "d")]
    proto = model(nodes, [("x", FLOAT, (1, 2, 9))], [("y", FLOAT, None)], {"w": array(2, 2, 3)})
    dense, pruned = load(proto), load(proto)
    notes = correct_moments(pruned, dense, [torch.ones(1, 2, 9)], ["c"])
    assert notes == ("c: used in 2 places, its mean and variance are not corrected",)


def test_outputs_that_are_not_finite_are_an_error() -> None:
    graph = load(network())
    with pytest.raises(CalibrationError, match="layer 'one': its outputs on the data are not finite"):
        correct_moments(graph, load(network()), [torch.full((1, 3, 9, 9), float("nan"))], CONVS)


def test_another_model_is_refused_as_the_dense_one() -> None:
    other = model([node("Relu", ["x"], ["y"])], [("x", FLOAT, (2,))], [("y", FLOAT, (2,))])
    with pytest.raises(ModelError, match="another model"):
        correct_moments(load(network()), load(other), BATCHES, CONVS)
