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
from sparsify_compiler.graph import ConvLayout, MatmulLayout, Site
from sparsify_compiler.passes.sensitivity import (
    DivergenceProbe,
    ErrorProbe,
    Probe,
    Sensitivity,
    draw_labels,
    tells_samples,
)
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
    found = Sensitivity(graph, ErrorProbe()).effects(batches, changes).sizes
    assert sorted(found) == sorted(changes)
    for name, (site, change) in changes.items():
        pairs = [first_order(module, batch, site, change) for batch in batches]
        exact = sum(moved.square().sum() for _, moved in pairs) / sum(y.square().sum() for y, _ in pairs)
        assert found[name] == pytest.approx(float(exact), rel=1e-4)  # float32 products


class Attending(nn.Module):
    """Torch's own attention between two layers: it runs on (length, samples, width) inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(("samples", "length"), [(3, 5), (4, 4), (1, 5), (1, 1)])
def test_rows_that_cannot_be_told_to_samples_are_squared_one_by_one_and_named(
    samples: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = OneNumber(seeded(Attending)).eval()
    x = torch.randn(samples, length, 16, generator=torch.Generator().manual_seed(0))
    graph, changes = traced(module, x)
    found = Sensitivity(graph, ErrorProbe()).effects([x], changes)
    inside = ("inner.attention.in_proj_weight", "inner.attention.out_proj")
    ambiguous = inside if length != samples else ("inner.first", *inside, "inner.last")
    assert found.by_row == (() if samples == 1 else ambiguous)
    made: list[tuple[Tensor, Tensor]] = []
    linear = torch.nn.functional.linear

    def spied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made.append((x, y := linear(x, weight, bias)))
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    module(x).sum().backward(inputs=[y for _, y in made])  # one number a sample: any signs give the same squares
    monkeypatch.undo()
    assert len(made) == len(changes)
    energy = first_order(module, x, *changes["inner.first"])[0].square().sum()
    for (read, y), (name, (site, change)) in zip(made, changes.items(), strict=True):
        assert y.grad is not None
        along = torch.einsum("...o,oi,...i->...", y.grad.double(), change[0].double(), read.detach().double())
        alone, together = along.square().sum(), first_order(module, x, site, change)[1].square().sum()
        exact = alone if name in found.by_row else together
        assert found.sizes[name] == pytest.approx(float(exact / energy), rel=1e-4)  # float32 products
        if length > 1:
            assert float(alone / together) != pytest.approx(1, abs=0.05)  # else nothing is tested


def test_an_expert_whose_rows_divide_by_the_samples_has_them_squared_one_by_one() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.arange(6)  # all four of the first sample, two of the second
            return x.flatten(0, 1).index_add(0, rows, self.expert(x.flatten(0, 1)[rows])).view_as(x).sum((1, 2))

    module, x = seeded(Routed), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    graph, changes = traced(module, x)
    found = Sensitivity(graph, ErrorProbe()).effects([x], changes)
    assert found.by_row == ("expert",)
    change = changes["expert"][1][0]
    rows = (x.flatten(0, 1)[:6] @ change.T).sum(1)  # the gradient of every entry is a sign of its sample
    assert found.sizes["expert"] == pytest.approx(
        float(rows.square().sum() / module(x).detach().square().sum()), rel=1e-4
    )


def test_the_samples_are_told_by_axis_zero_alone() -> None:
    product, transposed, images = (
        MatmulLayout(False),
        MatmulLayout(True, input_axis=0),
        ConvLayout((3,), (1,), ((0, 0),), (1,), 1),
    )
    for shape, layout, told in (
        ((4, 5, 8), product, True),
        ((4, 5, 4), product, True),  # the last axis is of inputs
        ((4, 8), product, True),
        ((5, 4, 8), product, False),
        ((4, 4, 8), product, False),
        ((4, 5, 4, 8), product, False),
        ((8, 8), product, False),
        ((8,), product, False),
        ((4, 8), transposed, False),
        ((4, 3, 4), images, True),
        ((8, 3, 4), images, False),
        ((4, 8), images, False),
    ):
        assert tells_samples(torch.zeros(shape), layout, 4) is told, shape
        assert tells_samples(torch.zeros(shape), layout, 1)


def test_a_weight_that_is_used_three_times_moves_the_outputs_as_a_whole() -> None:
    class Summed(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).flatten(1).sum(1)

    module, ids = seeded(Summed), torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(0))
    graph = trace_module(module, ids)
    site = next(site for site in graph.sites if site.name == "shared")
    assert site.calls == 3
    change = graph.weight(site).tril()
    found = Sensitivity(graph, ErrorProbe()).effects([ids], {"shared": (site, change)}).sizes
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
    found = Sensitivity(graph, probe).effects([copies], changes).sizes
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
    found = Sensitivity(graph, probe).effects([ids], changes).sizes
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
    figures = [
        Sensitivity(graph, probe).effects([{"x": each, "attention_mask": mask}], changes).sizes for each in (x, other)
    ]
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
        figures.append(
            list(Sensitivity(graph, DivergenceProbe(by_token=True)).effects(batches, changes).sizes.values())
        )
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
    assert set(Sensitivity(graph, ErrorProbe()).effects([x], changes).sizes) == {"smooth"}
    still = {name: (site, torch.zeros_like(change)) for name, (site, change) in changes.items()}
    assert Sensitivity(graph, ErrorProbe()).effects([x], still).sizes["rounded"] == 0.0
