"""The torch frontend: sites, segments and slices against the module itself."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.batches import call
from sparsify_compiler.errors import DataError, TraceError
from sparsify_compiler.frontends import torch_trace
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.frontends.torch_trace import Traced
from sparsify_compiler.graph import ConvLayout, MatmulLayout
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded


def run_all(graph: TorchGraph, batch: object, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
    values = graph.enter(batch)  # type: ignore[arg-type]
    for segment in graph.segments:
        values = graph.run_segment(segment.index, values, weights=weights)
    return graph.outputs(values)


def symbolic(module: nn.Module) -> TorchGraph:
    return TorchGraph(Traced(torch.fx.symbolic_trace(module), 1, (), "torch.fx.symbolic_trace", dynamic=True))


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
@pytest.mark.parametrize("kind", [Mlp, Cnn])
def test_running_all_segments_equals_the_module_on_other_sizes_too(kind: type[nn.Module], tracer: str) -> None:
    module = seeded(kind)
    batches = mlp_batches(1) if kind is Mlp else image_batches(1)
    graph = trace_module(module, batches[0]) if tracer == "export" else symbolic(module)
    for batch in (batches[0], batches[0][:3]):
        with torch.no_grad():
            assert torch.equal(run_all(graph, batch)[0], module(batch))


def test_a_model_on_another_device_than_its_batch_is_exported() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module.to("meta"), x)  # the one device besides the CPU that every machine has
    assert graph.traced.how == "torch.export"
    assert run_all(graph, x)[0].device.type == "meta"


def test_an_example_batch_of_one_still_gives_a_dynamic_graph() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module, x[:1])
    assert graph.traced.dynamic
    with torch.no_grad():
        assert torch.equal(run_all(graph, x)[0], module(x))


def test_residual_blocks_become_segments_with_one_value_alive_between_them() -> None:
    graph = trace_module(seeded(Mlp), mlp_batches(1)[0])
    assert [segment.name for segment in graph.segments[:4]] == [f"blocks.{i}" for i in range(4)]
    assert all(len(segment.needs) == 1 for segment in graph.segments)


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_every_convolution_is_listed_with_its_problem_or_its_refusal(tracer: str) -> None:
    module = seeded(Cnn)
    graph = trace_module(module, image_batches(1)[0]) if tracer == "export" else symbolic(module)
    sites = {site.name: site for site in graph.sites}
    assert (sites["stem"].out, sites["stem"].in_, sites["stem"].run, sites["stem"].groups) == (16, 27, 3, 1)
    assert (sites["grouped"].out, sites["grouped"].in_, sites["grouped"].groups) == (8, 72, 2)
    assert isinstance(sites["point"].layout, ConvLayout)
    assert sites["point"].layout.stride == (2, 2)
    assert "depthwise" in (sites["depthwise"].refusal or "")
    assert "transposed" in (sites["up"].refusal or "")
    assert sites["fc"].dense_by_default == "output head"


def test_a_tied_weight_is_one_site_and_a_shared_one_counts_its_calls() -> None:
    module = seeded(Tied)
    ids = torch.randint(0, 50, (2, 7))
    graph = trace_module(module, ids)
    sites = {site.name: site for site in graph.sites}
    assert sites["shared"].calls == 3
    assert "embedding" in (sites["head"].dense_by_default or "")
    assert len(graph.sites) == 4
    seen: list[str] = []
    values = graph.enter(ids)
    for segment in graph.segments:
        values = graph.run_segment(segment.index, values, lambda key, x: seen.append(key))
    assert seen.count(sites["shared"].reads) == 3


def test_setting_a_weight_changes_the_graph_and_not_the_module() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module, x)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    site = graph.sites[0]
    graph.set_weight(site, torch.zeros(site.groups, site.out, site.in_))
    assert torch.equal(graph.weight(site), torch.zeros(1, site.out, site.in_))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(run_all(graph, x)[0], module(x))


def test_a_model_that_only_symbolic_trace_follows_is_not_modified_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Traced:
        raise RuntimeError("torch.export cannot follow it")

    monkeypatch.setattr(torch_trace, "_export", fails)
    module, batches = seeded(Cnn), image_batches(3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rule = sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.8)
    options = sc.Options(onnx=False, tokens=(1,), device="cpu")
    pruned, report = sc.compile(module, batches, recipe=sc.Recipe((rule,)), options=options)
    assert any("symbolic_trace" in note for note in report.notes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert isinstance(pruned, nn.Module)
    assert float((pruned.state_dict()["point.weight"] == 0).float().mean()) > 0.7
    assert report.quality[0].sparse > 1e-6  # beside a dense model that was pruned as well it would be 0


def test_setting_a_shared_weight_reaches_every_use() -> None:
    module, ids = seeded(Tied), torch.randint(0, 50, (2, 7))
    graph = trace_module(module, ids)
    site = next(site for site in graph.sites if site.name == "shared")
    new = torch.randn(1, 16, 16)
    graph.set_weight(site, new)
    twin = seeded(Tied)
    twin.shared.weight.data = new[0]  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(run_all(graph, ids)[0], twin(ids))


def test_weights_given_for_a_run_are_used_and_differentiable() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module, x)
    site = graph.sites[1]
    weight = graph.weight(site).requires_grad_()
    run_all(graph, x, {site.name: weight})[0].square().mean().backward()
    module(x).square().mean().backward()
    own = module.blocks[0].down.weight.grad  # type: ignore[union-attr, index]
    assert weight.grad is not None
    # The same float32 products, accumulated in another order.
    assert torch.allclose(weight.grad[0], own, rtol=1e-4, atol=1e-7)


def test_training_with_masks_in_place_keeps_the_zeros_and_lowers_the_loss() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module, x)
    site = graph.sites[0]
    with torch.no_grad():
        target = module(x)
    keep = torch.rand(1, site.out, site.in_, generator=torch.Generator().manual_seed(0)) > 0.5
    weight = (graph.weight(site) * keep).requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=1e-2)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (run_all(graph, x, {site.name: weight * keep})[0] - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(weight[~keep], torch.zeros(int((~keep).sum())))


class Mixed(nn.Module):
    """Norms in float32, as decoders have them, casts by name, a constant, and regions that a trace keeps as graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 16), nn.Linear(16, 4), nn.LayerNorm(16)
        self.register_buffer("scale", torch.rand(16) + 1)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.a.weight.dtype
        x = self.a(x.to(dtype))
        with torch.autocast("cpu", enabled=False):
            x = (x.float() / x.float().norm(dim=-1, keepdim=True)).to(dtype)
        with torch.no_grad():
            x = x * torch.full((16,), 0.3, dtype=dtype) * self.scale
        return self.b(self.norm(x).type_as(self.b.weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [Mlp, Cnn, Mixed])
def test_exact_outputs_are_those_of_the_module_in_float32(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = seeded(kind).to(dtype)
    x = {Mlp: mlp_batches(1)[0], Cnn: image_batches(1)[0]}.get(
        kind, torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    ).to(dtype)
    graph = trace_module(module, x)
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    (found,) = graph.exact_outputs(x)
    with torch.no_grad():
        expected = copy.deepcopy(module).float()(x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32 sums, in the order of other kernels
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.module.state_dict().items())
    native = call(module, x)[0]
    again = graph.exact_outputs(x)[0]
    assert torch.equal(found, again)
    values = graph.enter(x)
    for segment in graph.segments:
        values = graph.run_segment(segment.index, values)
    torch.testing.assert_close(graph.outputs(values)[0], native)  # nothing of float32 is left behind


def test_a_slice_gives_the_recorded_outputs_of_the_model_itself() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module, x)
    site = next(site for site in graph.sites if site.name == "blocks.1.up")
    piece = graph.slice(site, operations=3)
    assert len(piece.records) == 4
    with torch.no_grad():
        values = graph.run_segment(0, graph.enter(x))
        found = graph.record(1, values, {*piece.inputs, *piece.records})
        outputs = piece(graph.weight(site), found)
    for name, output in zip(piece.records, outputs, strict=True):
        assert torch.equal(output, found[name])


def test_a_slice_may_reach_into_later_segments() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module, x)
    site = next(site for site in graph.sites if site.name == "blocks.2.down")
    piece = graph.slice(site, operations=100)
    with torch.no_grad():
        values = graph.run_segment(1, graph.run_segment(0, graph.enter(x)))
        found = graph.record(2, values, {*piece.inputs, *piece.records})
        assert torch.equal(piece(graph.weight(site), found)[-1], module(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func's own import
def test_both_hessian_products_of_a_slice_agree() -> None:
    module, x = seeded(Mlp).double(), mlp_batches(1)[0].double()
    graph = trace_module(module, x)
    site = next(site for site in graph.sites if site.name == "blocks.1.up")
    piece = graph.slice(site, operations=3)
    with torch.no_grad():
        values = graph.run_segment(0, graph.enter(x))
        found = graph.record(1, values, piece.inputs)
    weight = graph.weight(site).double()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return sum((output.square().sum() for output in piece(w, found)), torch.zeros((), dtype=torch.float64))

    forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (weight,), (direction,))[1]
    again = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(again), again, create_graph=True)
    (double_backward,) = torch.autograd.grad((gradient * direction).sum(), again)
    assert torch.allclose(forward_over_reverse, double_backward, rtol=1e-8)


def test_a_batch_that_does_not_fit_says_what_the_model_takes() -> None:
    graph = trace_module(seeded(Mlp), mlp_batches(1)[0])
    with pytest.raises(DataError, match=r"takes 1 inputs .* got 2"):
        graph.enter((torch.zeros(1), torch.zeros(1)))
    with pytest.raises(DataError, match="by position"):
        graph.enter({"pixels": torch.zeros(1)})


class Untraceable(nn.Module):
    """Branches on a value, which neither tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return x


def test_a_model_that_cannot_be_traced_names_the_line_of_its_source() -> None:
    with pytest.raises(TraceError, match=r"test_torch_graph\.py:\d+ \(if x\.sum\(\) > 0:\)"):
        trace_module(Untraceable(), torch.randn(2, 4))


def test_tracing_restores_training_mode() -> None:
    module = seeded(Cnn).train()
    module.bn.eval()  # type: ignore[union-attr]
    trace_module(module, image_batches(1)[0])
    assert module.training
    assert not module.bn.training  # type: ignore[union-attr]


def test_the_printed_graph_names_segments_and_sites() -> None:
    text = trace_module(seeded(Mlp), mlp_batches(1)[0]).text()
    assert "segment 0 blocks.0" in text
    assert "# site blocks.3.down (32, 64)" in text


def test_hugging_face_models_run_segment_by_segment() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(0, 40, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    graph = trace_module(module, batch)
    sites = {site.name: site for site in graph.sites}
    assert sites["transformer.h.0.attn.c_attn"].layout == MatmulLayout(transposed=True)
    assert sites["transformer.h.0.attn.c_attn"].kind == "Conv1D"
    assert "embedding" in (sites["lm_head"].dense_by_default or "")
    other = {"input_ids": torch.randint(0, 40, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(run_all(graph, other)[0], call(module, other)[0])


class InPlace(nn.Module):
    """Writes into its input and into what crosses the segments, as vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3), nn.SiLU(inplace=True)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.head(self.layers(x).mean((2, 3)))


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_operations_in_place_change_neither_the_data_nor_a_second_run(tracer: str) -> None:
    module, x = seeded(InPlace), image_batches(1)[0]
    if tracer == "export":
        graph = trace_module(module, x.clone())
    else:
        traced = torch.fx.symbolic_trace(module)
        graph = TorchGraph(Traced(traced, 1, (), "torch.fx.symbolic_trace", dynamic=True, in_place=True))
    before = x.clone()
    values = graph.enter(x)
    for segment in graph.segments:
        graph.run_segment(segment.index, values)
        values = graph.run_segment(segment.index, values)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(graph.outputs(values)[0], module(x.clone()))


def test_a_batch_normalisation_stays_one_operation_where_others_work_in_place() -> None:
    names = [str(node.target) for node in trace_module(seeded(InPlace), image_batches(1)[0]).module.graph.nodes]
    assert "aten.batch_norm.default" in names
    assert not any("native" in name or "_.default" in name for name in names)


class FixedBatch(nn.Module):
    """Reads its batch size as a Python integer, which fixes it when traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).reshape(int(x.shape[0]), -1))


@pytest.mark.parametrize("size", [1, 3])
def test_a_model_that_fixes_its_batch_size_is_traced_at_the_callers(size: int) -> None:
    module, x = seeded(FixedBatch), torch.randn(size, 8)
    graph = trace_module(module, x)
    assert not graph.traced.dynamic
    with torch.no_grad():
        assert torch.equal(run_all(graph, x)[0], module(x))
    with pytest.raises(DataError, match=r"is torch.float32 \(5, 8\); traced on the first batch"):
        graph.enter(torch.randn(5, 8))


@pytest.mark.parametrize("batch", [torch.zeros(2, 5, 31), torch.zeros(2, 32), torch.zeros(2, 5, 32).double()])
def test_inputs_of_another_rank_length_or_dtype_are_refused(batch: Tensor) -> None:
    with pytest.raises(DataError, match="give batches of one kind"):
        trace_module(seeded(Mlp), mlp_batches(1)[0]).enter(batch)


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_segments_run_on_the_graphs_device_and_the_module_stays_where_it_is(tracer: str) -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    traced = trace_module(module, x).traced if tracer == "export" else symbolic(module).traced
    graph = TorchGraph(traced, torch.device("meta"))  # the only other device that every machine has
    assert run_all(graph, x)[0].is_meta
    assert not any(parameter.is_meta for parameter in module.parameters())
