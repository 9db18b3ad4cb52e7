"""ONNX graphs run by PyTorch: operators against ONNX's own cases, segments against ONNX Runtime, and training."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases
from onnx_build import FLOAT, array, load, model, node, scopes
from torch import Tensor

import sparsify_compiler as sc
from sparsify_compiler.batches import Batch
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.errors import ModelError, RecipeError
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.frontends.onnx_gradient import TABLES, DifferentiableOnnx
from sparsify_compiler.frontends.onnx_operators import Call
from sparsify_compiler.passes.gradients import backpropagate
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.layerwise import prune_layerwise
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.passes.refine.reconstruct import Reconstruction
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.pipeline.own_loss import check_trainable
from sparsify_compiler.plan import decide
from sparsify_compiler.recipe import Recipe, make_rule
from sparsify_compiler.steps import Allocate, Distill, FineTune, Reconstruct

UNSIGNED = ("uint16", "uint32", "uint64")  # PyTorch has no arithmetic for them; no gradient flows through them
EMPTY = (
    "test_reduce_max_empty_set",
    "test_reduce_max_empty_set_bool",
    "test_reduce_min_empty_set",
    "test_maxpool_2d_uint8",
)


def cases() -> Iterator[tuple[str, str, Call, list[np.ndarray], float]]:
    """Yield (name, operator, the call, expected outputs, relative tolerance) of ONNX's cases of one node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of ONNX's own cases divide by zero on purpose
        found = collect_testcases(None)
    for case in found:
        each = onnx_ir.from_proto(case.model)
        op = next(iter(each.graph))
        fits = len(list(each.graph)) == 1 and not op.domain and op.op_type in TABLES
        if not fits or case.name.endswith(UNSIGNED) or case.name in EMPTY or op.op_type.startswith("Cast"):
            continue
        for given, wanted in case.data_sets:
            if any(np.asarray(x).dtype.kind not in "fiub" for x in (*given, *wanted)):
                continue  # strings, and types that NumPy itself does not have
            names = (info.name for info in case.model.graph.input)
            values = {name: torch.from_numpy(np.array(x)) for name, x in zip(names, given, strict=True)}
            inputs = tuple(values[v.name or ""] if v is not None and v.name else None for v in op.inputs)
            attributes = {name: attribute.value for name, attribute in op.attributes.items()}
            call = Call(inputs, attributes, each.opset_imports[""], len(op.outputs))
            yield case.name, op.op_type, call, [np.asarray(y) for y in wanted], case.rtol


def test_every_operator_gives_what_onnx_expects_or_says_that_it_cannot() -> None:
    right, refused = Counter[str](), Counter[str]()
    for name, operator, call, wanted, tolerance in cases():
        try:
            made = TABLES[operator](call)
        except NotImplementedError as error:
            refused[str(error)] += 1
            continue
        for found, expected in zip(made if isinstance(made, tuple) else (made,), wanted, strict=False):
            assert tuple(found.shape) == expected.shape, name
            assert str(found.dtype) == f"torch.{expected.dtype}", name
            # Sums in another order than NumPy's: ONNX's own tolerance is for ONNX Runtime, which does so less.
            ours, theirs = found.double().numpy(), expected.astype("float64")
            np.testing.assert_allclose(ours, theirs, rtol=3 * tolerance, atol=1e-5, err_msg=name)
        right[operator] += 1
    assert set(TABLES) - set(right) == {"Cast", "CastLike"}, "operators without a case"
    assert sum(right.values()) > 500
    assert set(refused) == {
        "AveragePool with dilations",
        "BatchNormalization in training mode",
        "ConvTranspose with auto_pad or output_shape",
        "Dropout in training mode",
        "MaxPool with indices",
    }


@pytest.mark.parametrize(("operator", "dtype"), [("Cast", torch.int64), ("CastLike", torch.float64)])
def test_values_are_cast(operator: str, dtype: torch.dtype) -> None:
    x = torch.tensor([1.5, -2.5])
    found = TABLES[operator](Call((x, torch.zeros(1, dtype=dtype)), {"to": 7}, 17, 1))
    assert isinstance(found, Tensor)
    assert torch.equal(found, x.to(dtype))


def blocks() -> onnx.ModelProto:
    """Two residual blocks of a product stored (in, out), a Gemm stored (out, in), and shapes made at run time."""
    nodes, weights = [], {"flat": np.array([-1]), "wide": np.array([8])}
    for i in range(2):
        path = ("model", f"model.layers.{i}", f"model.layers.{i}.mlp")
        nodes += [
            scopes(node("Shape", [f"h{i}"], [f"s{i}"]), *path),
            scopes(node("Concat", ["flat", "wide"], [f"f{i}"], axis=0), *path),
            scopes(node("Reshape", [f"h{i}", f"f{i}"], [f"r{i}"]), *path),
            scopes(node("MatMul", [f"r{i}", f"up{i}"], [f"u{i}"]), *path, f"{path[-1]}.up"),
            scopes(node("Relu", [f"u{i}"], [f"a{i}"]), *path),
            scopes(node("Gemm", [f"a{i}", f"down{i}", f"b{i}"], [f"d{i}"], transB=1), *path, f"{path[-1]}.down"),
            scopes(node("Reshape", [f"d{i}", f"s{i}"], [f"e{i}"]), *path),
            scopes(node("Add", [f"h{i}", f"e{i}"], [f"h{i + 1}"]), "model", f"model.layers.{i}"),
        ]
        weights |= {
            f"up{i}": array(8, 12, seed=i) / 3,
            f"down{i}": array(8, 12, seed=9 + i) / 3,
            f"b{i}": array(8, seed=i),
        }
    nodes.append(node("Softmax", ["h2"], ["y"], axis=-1))
    return model(nodes, [("h0", FLOAT, ("batch", "time", 8))], [("y", FLOAT, None)], weights)


def by_hand(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute `blocks` in PyTorch; `weights` are (out, in)."""
    up_down = list(weights.values())
    for i in range(2):
        inner = (x @ up_down[2 * i].t()).relu()
        x = x + inner @ up_down[2 * i + 1].t() + torch.from_numpy(array(8, seed=i))
    return x.softmax(-1)


def batches(count: int = 5) -> list[Batch]:
    return [{"h0": torch.from_numpy(array(3, 5, 8, seed=100 + i))} for i in range(count)]


def test_segments_run_as_in_onnx_runtime_and_see_the_same_inputs() -> None:
    graph = load(blocks())
    view = DifferentiableOnnx(graph)
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    ours = theirs = graph.enter(batches(1)[0])
    for segment in graph.segments:
        ours = view.run_segment(segment.index, ours, lambda key, x: seen["ours"].append(x))
        theirs = graph.run_segment(segment.index, theirs, lambda key, x: seen["theirs"].append(x))
        assert ours.keys() == theirs.keys()
    # Two implementations: sums of float32 in other orders.
    torch.testing.assert_close(view.outputs(ours), graph.outputs(theirs), rtol=1e-5, atol=1e-6)
    for one, other in zip(seen["ours"], seen["theirs"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_replaced_weight_is_seen_by_both() -> None:
    graph = load(blocks())
    view = DifferentiableOnnx(graph)
    values = view.enter(batches(1)[0])
    before = view.run_segment(0, values)["h1"]
    graph.set_weight(graph.sites[0], torch.zeros(1, 12, 8))
    after = view.run_segment(0, values)["h1"]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, graph.run_segment(0, values)["h1"], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_formula() -> None:
    graph = load(blocks())
    view, batch = DifferentiableOnnx(graph), batches(1)[0]
    assert isinstance(batch, dict)
    sites = {site.name: site for site in view.sites}
    value, found = backpropagate(view, batch, lambda outputs: outputs[0].square().sum(), sites)
    weights = {name: graph.weight(site)[0].requires_grad_() for name, site in sites.items()}
    exact = by_hand(weights, batch["h0"]).square().sum()
    exact.backward()
    assert value == pytest.approx(float(exact.detach()), rel=1e-5)
    for name, weight in weights.items():
        assert weight.grad is not None
        torch.testing.assert_close(found[name][0], weight.grad, rtol=1e-4, atol=1e-6)


def test_reconstruction_lowers_the_error_of_onnx_segments_with_exact_zeros() -> None:
    data = batches()
    graph = load(blocks())
    rule = make_rule("*", NM(2, 4), SparseGPT())
    refine = Reconstruction(DifferentiableOnnx(graph), Reconstruct(5, 1e-3, 2))
    outcomes = prune_layerwise(Walk(graph, data, decide(Recipe((rule,)), graph.sites), refine=refine))
    assert len(outcomes) == 4
    for site in graph.sites:
        outcome = outcomes[site.name]
        assert torch.equal(graph.weight(site) != 0, outcome.keep)
        assert outcome.refined is not None
        assert outcome.refined["kept"]
        assert outcome.refined["after"] < outcome.refined["before"]


def test_an_onnx_file_is_reconstructed_and_distilled(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(blocks(), path)
    data, options = batches(9), sc.Options(tokens=(1,), recalibrate_batchnorm=False)
    rule = make_rule("*", NM(2, 4), SparseGPT())
    recipe = Recipe((rule,), reconstruct=Reconstruct(3, 1e-3, 2), distill=Distill(4, 1e-3, 2))
    _, plain = sc.compile(path, data[:8], recipe=Recipe((rule,)), options=options, heldout=data[8:])
    _, tuned = sc.compile(path, data[:8], recipe=recipe, options=options, heldout=data[8:])
    assert [each.step for each in tuned.steps] == ["reconstruct"] * 2 + ["distill"] * 5
    assert tuned.quality[0].measure == "relative error"
    assert tuned.quality[0].sparse < plain.quality[0].sparse


def test_rounds_on_an_onnx_file_take_its_gradient_and_tune_between(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(blocks(), path)
    data, options = batches(9), sc.Options(tokens=(1,), recalibrate_batchnorm=False, share_batches=True)
    rule = make_rule("*", NM(2, 4), WoodTaylor(), refit=False)
    recipe = Recipe((rule,), rounds=2, finetune=FineTune(rate=1e-3, batches=2))
    _, report = sc.compile(path, data[:8], recipe=recipe, options=options, heldout=data[8:])
    assert report.rounds[1].differed == ("prefix", "Gram", "targets", "gradient", "fine-tuning")
    assert report.rounds[1].heldout < report.rounds[0].heldout


def test_a_type_that_pytorch_has_not_is_named() -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Cast", ["h"], ["y"], to=onnx.TensorProto.FLOAT8E5M2)]
    graph = load(model(nodes, [("x", FLOAT, (8, 8))], [("y", onnx.TensorProto.FLOAT8E5M2, None)], {"w": array(8, 8)}))
    assert isinstance(graph, OnnxGraph)
    view = DifferentiableOnnx(graph)
    with pytest.raises(ModelError, match="cannot be run with gradients: Cast to FLOAT8E5M2"):
        view.run_segment(0, view.enter(torch.ones(8, 8)))


def test_operators_that_give_no_gradient_are_named_before_anything_is_pruned() -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Det", ["h"], ["y"])]
    graph = load(model(nodes, [("x", FLOAT, (8, 8))], [("y", FLOAT, None)], {"w": array(8, 8)}))
    assert isinstance(graph, OnnxGraph)
    with pytest.raises(ModelError, match="uses the operators Det, through which no gradient can be taken here"):
        DifferentiableOnnx(graph)
    plain, taylor = make_rule("*", NM(2, 4), SparseGPT()), make_rule("*", NM(2, 4), WoodTaylor())
    for recipe in (
        Recipe((plain,), reconstruct=Reconstruct()),
        Recipe((plain,), distill=Distill()),
        Recipe((make_rule("*", NM(2, 4), IOBS()),), rounds=2, finetune=FineTune()),
        Recipe((taylor,)),
    ):
        with pytest.raises(ModelError, match="leave out woodtaylor and the steps that train"):
            check_trainable(graph, decide(recipe, graph.sites), recipe)
    free = (make_rule("*", Unstructured(), SparseGPT(), 0.5),)
    with pytest.raises(RecipeError, match='"gradients" cannot be had of this model; set weigh = "outputs"'):
        check_trainable(graph, decide(Recipe(free), graph.sites), Recipe(free, allocate=Allocate()))
    others = (Allocate("owl"), Allocate(weigh="outputs"))
    for recipe in (Recipe((plain,), rounds=2), *(Recipe(free, allocate=step) for step in others)):
        check_trainable(graph, decide(recipe, graph.sites), recipe)
