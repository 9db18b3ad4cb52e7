"""An allocation inside a job: which distance is differentiated, what happens without gradients, and on ONNX files."""

from collections.abc import Sequence

import onnx
import pytest
import torch
from onnx_build import FLOAT, array, load, model, node
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import CalibrationError, RecipeError
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.graph import Graph
from sparsify_compiler.pipeline.allocation import allocate_sites
from sparsify_compiler.pipeline.quality import Heldout
from sparsify_compiler.plan import decide
from sparsify_compiler.progress import silent
from sparsify_compiler.steps import Allocate
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded

UNIFORM = sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5)


def onnx_graph(*last: onnx.NodeProto) -> tuple[OnnxGraph, list[Batch]]:
    """Make two products around a ReLU, added to the input, and last nodes that return y; and two batches."""
    nodes = [
        node("MatMul", ["x", "v"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w"], ["z"]),
        node("Add", ["x", "z"], ["s"]),
        *last,
    ]
    weights = {"v": array(8, 8), "w": array(8, 8, seed=1)}
    graph = load(model(nodes, [("x", FLOAT, (8, 8))], [("y", FLOAT, None)], weights, opset=19, ir_version=9))
    return graph, [{"x": torch.from_numpy(array(8, 8, seed=seed))} for seed in (2, 3)]


def sparsities(graph: Graph, batches: Sequence[Batch], step: Allocate) -> list[float]:
    decisions = decide(sc.Recipe((UNIFORM,)), graph.sites)
    found = allocate_sites(graph, batches, decisions, step, None, silent).decisions
    return [d.rule.sparsity for d in found if d.rule is not None]


def test_an_onnx_file_is_weighed_as_the_module_of_its_weights() -> None:
    graph, batches = onnx_graph(node("Identity", ["s"], ["y"]))

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.w = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            for layer, site in zip((self.v, self.w), graph.sites, strict=True):
                layer.weight = nn.Parameter(graph.weight(site)[0])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w(torch.relu(self.v(x)))

    given = [
        sparsities(each, batches, Allocate(spread=0.3)) for each in (graph, trace_module(Twin().eval(), batches[0]))
    ]
    assert given[0] == given[1]
    assert given[0][0] != given[0][1]


def test_an_onnx_file_without_gradients_is_refused_before_anything_runs_and_can_be_weighed_by_outputs() -> None:
    graph, batches = onnx_graph(node("Det", ["s"], ["y"]))
    decisions, stages = decide(sc.Recipe((UNIFORM,)), graph.sites), []
    with pytest.raises(RecipeError, match=r'weigh = "gradients" cannot be had.*set weigh = "outputs".*operators Det'):
        allocate_sites(graph, batches, decisions, Allocate(), None, lambda stage, *_: stages.append(stage))
    assert not stages
    assert sum(sparsities(graph, batches, Allocate(weigh="outputs"))) == 1.0


def test_an_operator_that_breaks_down_under_gradients_is_refused_in_the_same_words() -> None:
    graph, batches = onnx_graph(
        node("Cast", ["s"], ["c"], to=onnx.TensorProto.FLOAT8E5M2), node("Cast", ["c"], ["y"], to=FLOAT)
    )
    decisions = decide(sc.Recipe((UNIFORM,)), graph.sites)
    with pytest.raises(RecipeError, match=r'set weigh = "outputs".*cannot be run with gradients: Cast to FLOAT8E5M2'):
        allocate_sites(graph, batches, decisions, Allocate(), None, silent)


def test_the_distance_is_a_divergence_for_language_models_and_for_classifiers_with_labels() -> None:
    images, labels = image_batches(2), [torch.zeros(8, dtype=torch.long)] * 2
    ids: list[Batch] = [torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for module, batches, heldout, words in (
        (seeded(Cnn), images, None, "relative error of the outputs"),
        (seeded(Cnn), images, Heldout(images, labels), "KL divergence of the outputs"),
        (seeded(Tied), ids, None, "KL divergence of the outputs"),
    ):
        graph = trace_module(module, batches[0])
        decisions = decide(sc.Recipe((UNIFORM,)), graph.sites)
        notes = allocate_sites(graph, batches, decisions, Allocate(), heldout, silent).notes
        assert notes[1].startswith(f"allocate: the {words}, summed over sites")
        assert "gradients on 2 batches)" in notes[1]


def test_sites_without_a_gradient_keep_what_was_asked_and_are_named() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.cut = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x))) + self.cut(x).round()

    batches = mlp_batches(2)
    graph = trace_module(seeded(Cut), batches[0])
    decisions = decide(sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5),)), graph.sites)
    found = allocate_sites(graph, batches, decisions, Allocate(spread=0.3), None, silent)
    given = {d.site.name: d.rule.sparsity for d in found.decisions if d.rule is not None}
    assert given["cut"] == 0.5
    assert given["first"] != 0.5
    assert any("no gradient reaches cut (1 sites), which keep what was asked" in note for note in found.notes)


def test_sites_whose_rows_cannot_be_told_to_samples_are_named() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)).transpose(0, 1)).transpose(0, 1)

    note = "allocate: which rows of second (1 sites) are of one sample cannot be told, so that"
    for samples, told in ((4, False), (1, True)):
        batches = mlp_batches(2, samples)
        graph = trace_module(seeded(Turned), batches[0])
        rules = [sc.make_rule(name, sc.Unstructured(), sc.SparseGPT(), 0.5) for name in ("first", "second")]
        decisions = decide(sc.Recipe(tuple(rules)), graph.sites)
        notes = allocate_sites(graph, batches, decisions, Allocate(), None, silent).notes
        assert any(each.startswith(note) for each in notes) is not told


def test_an_allocation_is_the_same_twice() -> None:
    module, batches = seeded(Mlp), mlp_batches(3)
    given = [sparsities(trace_module(module, batches[0]), batches, Allocate()) for _ in range(2)]
    assert given[0] == given[1]


def test_a_batch_that_does_not_fit_is_named() -> None:
    ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    graph = trace_module(seeded(Tied), ids)
    decisions = decide(sc.Recipe((UNIFORM,)), graph.sites)
    with pytest.raises(CalibrationError, match=r"calibration batch 0 cannot be run through .*vocabulary"):
        allocate_sites(graph, [ids + 50], decisions, Allocate(), None, silent)
