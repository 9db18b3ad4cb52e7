"""How far the outputs move when one site changes: predictions against brute force on the whole module."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call

from sparsify_compiler.batches import Batch, padding
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.layout import from_problem
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.graph import Site
from sparsify_compiler.passes.sensitivity import DivergenceProbe, ErrorProbe, Probe, Sensitivity, draw_labels
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded

Changes = dict[str, tuple[Site, Tensor]]


class OneNumber(nn.Module):
    """Adds up what `inner` returns for a sample, weighing places and classes differently."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).flatten(1)
        return y @ torch.linspace(-1, 2, y.shape[1]).to(y)


def traced(module: nn.Module, batch: Batch) -> tuple[TorchGraph, Changes]:
    """Return the graph and a change of the size of pruning for every site that can be pruned."""
    graph, generator = trace_module(module, batch), torch.Generator().manual_seed(5)
    changes = {}
    for site in graph.sites:
        if site.refusal is None:
            weight = graph.weight(site)
            changes[site.name] = site, -weight * (torch.rand(weight.shape, generator=generator) < 0.5)
    return graph, changes


def first_order(module: nn.Module, batch: Tensor, site: Site, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dense output and J vec(Δ), from the whole Jacobian of the module by the weight, in float64."""
    module = copy.deepcopy(module).double()
    weight = module.get_parameter(site.parameter).detach()
    batch = batch.double() if batch.is_floating_point() else batch

    def outputs(own: Tensor) -> Tensor:
        return functional_call(module, {site.parameter: own}, (batch,))  # type: ignore[no-any-return]

    assert site.layout is not None
    delta = from_problem(change, site.layout, tuple(weight.shape)).double()
    y = outputs(weight)
    by_weight = jacobian(outputs, weight).reshape(*y.shape, -1)  # type: ignore[no-untyped-call]
    return y.detach(), by_weight @ delta.flatten()


def fisher(y: Tensor, moved: Tensor) -> Tensor:
    """Return δᵀ (diag(p) − ppᵀ) δ / 2 of every row: the divergence to second order."""
    p = y.softmax(-1)
    return ((p * moved.square()).sum(-1) - (p * moved).sum(-1).square()) / 2


@pytest.mark.parametrize(
    ("inner", "batches"),
    [(seeded(Mlp), mlp_batches(2)), (seeded(Cnn), image_batches(2))],
    ids=["tokens", "images"],
)
def test_with_one_number_a_sample_the_figure_is_the_exact_curvature(inner: nn.Module, batches: list[Tensor]) -> None:
    # A sign squared is one, so nothing is left to chance, and rows of a sample act together: tokens, places, groups.
    module = OneNumber(inner).eval()
    graph, changes = traced(module, batches[0])
    found = Sensitivity(graph, ErrorProbe()).effects(batches, changes)
    assert sorted(found) == sorted(changes)
    for name, (site, change) in changes.items():
        pairs = [first_order(module, batch, site, change) for batch in batches]
        exact = sum(moved.square().sum() for _, moved in pairs) / sum(y.square().sum() for y, _ in pairs)
        assert found[name] == pytest.approx(float(exact), rel=1e-4)  # float32 products


def test_a_weight_that_is_used_three_times_moves_the_outputs_as_a_whole() -> None:
    class Summed(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).flatten(1).sum(1)

    module, ids = seeded(Summed), torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(0))
    graph = trace_module(module, ids)
    site = next(site for site in graph.sites if site.name == "shared")
    assert site.calls == 3
    change = graph.weight(site).tril()
    found = Sensitivity(graph, ErrorProbe()).effects([ids], {"shared": (site, change)})
    y, moved = first_order(module, ids, site, change)
    assert found["shared"] == pytest.approx(float(moved.square().sum() / y.square().sum()), rel=1e-4)


@pytest.mark.parametrize("probe", [ErrorProbe(), DivergenceProbe(by_token=False), DivergenceProbe(by_token=True)])
def test_the_mean_over_draws_is_the_curvature_of_the_distance(probe: Probe) -> None:
    # 4,000 copies of one sample of one token are as many draws. The relative error of a mean of n squares of spread
    # sqrt(κ − 1) is sqrt((κ − 1) / n); κ is at most 3 for signs and
    # below 20 here for drawn labels: 0.07, so that 0.2 is three times as much.
    module = seeded(Mlp, depth=1)
    sample = mlp_batches(1)[0][:1, :1]
    graph, changes = traced(module, sample)
    graph = trace_module(module, (copies := sample.repeat(4000, 1, 1)))
    found = Sensitivity(graph, probe).effects([copies], changes)
    for name, (site, change) in changes.items():
        y, moved = first_order(module, sample, site, change)
        exact = fisher(y, moved) if isinstance(probe, DivergenceProbe) else moved.square().sum() / y.square().sum()
        assert found[name] == pytest.approx(float(exact.sum()), rel=0.2)


def test_labels_are_drawn_as_often_as_the_model_expects_them() -> None:
    scores = torch.tensor([0.0, -float("inf"), 1.0, 2.0, -3.0])
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = draw_labels(scores.expand(10_000, 5), uniform)
    shares = drawn.bincount(minlength=5).double() / 10_000
    assert torch.allclose(shares, scores.double().softmax(0), atol=1e-4)  # each count is right to within one
    assert draw_labels(scores[None], torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [4]
    assert draw_labels(scores[None], torch.zeros(1, dtype=torch.float64)).tolist() == [0]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_label_is_drawn_from_scores_that_are_not_finite(number: float, dtype: torch.dtype) -> None:
    module, x = seeded(lambda: nn.Linear(8, 5)).to(dtype), torch.randn(3, 8, dtype=dtype)
    with torch.no_grad():
        assert module.bias is not None
        module.bias[:] = number
    graph, changes = traced(module, x)
    with pytest.raises(CalibrationError, match=r"no KL divergence .*calibration batch 0, .*they are not finite"):
        Sensitivity(graph, DivergenceProbe(by_token=False)).effects([x], changes)


def test_hidden_tokens_may_have_any_scores_and_a_batch_of_them_alone_has_none() -> None:
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    scores[1, 1:] = torch.nan
    probe = DivergenceProbe(by_token=True)
    hidden = padding({"x": scores, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    value, size = probe.draw((scores,), hidden, 0)
    assert torch.isfinite(value)
    assert size == 8
    nothing = padding({"x": scores, "attention_mask": torch.zeros(2, 3, dtype=torch.int64)})
    assert probe.draw((scores,), nothing, 0) == (0.0, 0.0)


def test_a_padded_batch_of_as_many_classes_as_tokens_has_a_label_a_sample() -> None:
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    hidden = padding({"x": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])})
    value, size = DivergenceProbe(by_token=False).draw((scores,), hidden, 0)
    assert size == 4
    first, second = -scores.log_softmax(-1)  # of two samples, a label each
    assert float((first[:, None] + second - value).abs().min()) < 1e-6


def test_tokens_are_squared_one_by_one_in_a_language_model() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.mix(self.embed(ids).cumsum(1))).cumsum(1))

    module, ids = seeded(Causal), torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    graph, changes = traced(module, ids)
    probe = DivergenceProbe(by_token=True)
    found = Sensitivity(graph, probe).effects([ids], changes)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name in changes:
        module.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: made.update({name: (x[0], y)}))
    value, size = probe.draw((module(ids),), None, 0)  # the same draw, through the module itself
    assert size == 2 * ids.numel()
    for name, (_, change) in changes.items():
        x, y = made[name]
        (gradient,) = torch.autograd.grad(value, y, retain_graph=True)
        along = torch.einsum("bto,oi,bti->bt", gradient.double(), change[0].double(), x.double())
        assert found[name] == pytest.approx(float(along.square().sum().detach() / size), rel=1e-4)


@pytest.mark.parametrize("probe", [ErrorProbe(), DivergenceProbe(by_token=True)])
def test_hidden_tokens_have_no_part_in_the_figure(probe: Probe) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    module, generator = seeded(Masked), torch.Generator().manual_seed(0)
    x, mask = torch.randn(2, 4, 8, generator=generator), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    other = torch.where(mask[:, :, None] == 1, x, 1e3)
    graph, changes = traced(module, {"x": x, "attention_mask": mask})
    figures = [Sensitivity(graph, probe).effects([{"x": each, "attention_mask": mask}], changes) for each in (x, other)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert min(figures[0].values()) > 0
    size = probe.draw((x,), padding({"x": x, "attention_mask": mask}), 0)[1]
    assert size == pytest.approx(12 if isinstance(probe, DivergenceProbe) else float(x[mask == 1].square().sum()))


def test_probabilities_move_as_the_scores_that_they_were_made_of() -> None:
    class Softmax(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).softmax(-1)

    inner, batches = seeded(Mlp, depth=1), mlp_batches(2)
    figures = []
    for module in (inner, Softmax(inner)):
        graph, changes = traced(module, batches[0])
        figures.append(list(Sensitivity(graph, DivergenceProbe(by_token=True)).effects(batches, changes).values()))
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)  # one softmax more or less in float32


def test_gradients_by_weights_are_held_for_one_segment_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = seeded(Mlp, depth=4), mlp_batches(1)[0]
    graph, changes = traced(module, x)
    shapes, made, alive = {tuple(graph.weight(site).shape) for site in graph.sites}, [], []
    grad = torch.autograd.grad

    def watched(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
        found = grad(*args, **kwargs)  # type: ignore[arg-type]
        made.extend(weakref.ref(each) for each in found if tuple(each.shape) in shapes)
        alive.append(sum(each() is not None for each in made))
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    Sensitivity(graph, ErrorProbe()).effects([x], changes)
    assert len(made) == len(graph.sites) > 4
    assert max(alive) == max(len(segment.sites) for segment in graph.segments)


def test_sites_that_no_gradient_reaches_are_left_out_unless_they_do_not_change() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.smooth, self.rounded, self.cut = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.smooth(x) + self.rounded(x).round() + self.cut(x).detach()

    module, x = seeded(Rounded), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    graph, changes = traced(module, x)
    assert set(Sensitivity(graph, ErrorProbe()).effects([x], changes)) == {"smooth"}
    still = {name: (site, torch.zeros_like(change)) for name, (site, change) in changes.items()}
    assert Sensitivity(graph, ErrorProbe()).effects([x], still)["rounded"] == 0.0
