"""The model's own loss to second order, against autograd on the whole module."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from sparsify_compiler.batches import Batch, padding
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.layout import output_rows, row_chunks, to_problem
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.graph import Site
from sparsify_compiler.passes.gradients import DenseOutputs, NextToken, backpropagate
from sparsify_compiler.passes.prune.expand import expand
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.pattern import Unstructured
from sparsify_compiler.problem import Gram, LayerProblem
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded


def traced(module: nn.Module, batch: Batch) -> tuple[TorchGraph, dict[str, Site]]:
    graph = trace_module(module, batch)
    return graph, {site.name: site for site in graph.sites if site.refusal is None}


def ids(count: int = 2, length: int = 6) -> list[Tensor]:
    return [torch.randint(0, 50, (4, length), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def shifted(module: nn.Module, batches: Sequence[Tensor]) -> tuple[DenseOutputs, list[Tensor]]:
    """Make a loss with targets that are not the module's own outputs, so that it has a gradient."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        targets = [(y := module(batch)) + torch.randn(y.shape, generator=noise) for batch in batches]
    by_id = {id(batch): target for batch, target in zip(batches, targets, strict=True)}
    return DenseOutputs(lambda batch: (by_id[id(batch)],)), targets


def close(found: Tensor, expected: Tensor) -> bool:
    """Both are sums of float32 products, in another order: 1e-5 of the largest."""
    return bool((found.double() - expected.double()).abs().max() <= 1e-5 * expected.abs().max().double() + 1e-12)


@pytest.mark.parametrize(("kind", "batches"), [(Mlp, mlp_batches(2)), (Cnn, image_batches(2))])
def test_the_gradient_is_autograds_on_the_whole_module(kind: Callable[..., nn.Module], batches: list[Tensor]) -> None:
    module = seeded(kind)  # type: ignore[arg-type]
    graph, sites = traced(module, batches[0])
    loss, targets = shifted(module, batches)
    found = expand(graph, batches, sites, loss)
    samples = sum(len(batch) for batch in batches)
    terms = [(module(batch) - target).square().sum() / 2 for batch, target in zip(batches, targets, strict=True)]
    (torch.stack(terms).sum() / samples).backward()
    for name, site in sites.items():
        assert site.layout is not None
        expected = to_problem(module.get_parameter(site.parameter).grad, site.layout)  # type: ignore[arg-type]
        assert close(found[name].gradient, expected), name


def test_at_the_dense_model_the_distance_has_no_gradient_but_a_curvature() -> None:
    module, batches = seeded(Mlp), mlp_batches(2)
    graph, sites = traced(module, batches[0])
    found = expand(graph, batches, sites, DenseOutputs(lambda batch: (module(batch),)))  # type: ignore[arg-type]
    for name in sites:
        assert float(found[name].gradient.abs().max()) <= 1e-6  # rounding of two equal models
        assert float(found[name].output_curvature.min()) > 0


def test_the_curvature_of_the_last_layer_is_its_exact_hessian() -> None:
    module, batches = seeded(Mlp), mlp_batches(2)
    graph, sites = traced(module, batches[0])
    head = expand(graph, batches, sites, shifted(module, batches)[0], frozenset(["head"]))["head"]
    rows: list[Tensor] = []
    module.head.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 32)))  # type: ignore[union-attr]
    with torch.no_grad():
        for batch in batches:
            module(batch)
    x, samples = torch.cat(rows).double(), sum(len(batch) for batch in batches)
    assert head.inputs is not None
    # ½‖xWᵀ − y‖² / samples has the Hessian XᵀX / samples for every row of W; signs have squares of exactly one.
    assert torch.equal(head.output_curvature, torch.full((1, 10), len(x) / samples, dtype=torch.float64))
    assert close(head.inputs[0] * head.output_curvature[0, 0], x.T @ x / samples)


class Narrow(nn.Module):
    """One output, so that a random sign times its derivative has the derivative's exact square."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def test_the_fisher_blocks_sum_over_rows_to_autograds() -> None:
    module = seeded(Narrow)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    graph, sites = traced(module, x)
    found = expand(graph, [x], sites, shifted(module, [x])[0], frozenset(sites))["one"]
    weights = {name: value.detach() for name, value in module.named_parameters()}

    def outputs(weight: Tensor) -> Tensor:
        return functional_call(module, {**weights, "one.weight": weight}, (x,))[:, 0]

    jacobian = jacrev(outputs)(weights["one.weight"]).double()  # (30, 4, 5)
    exact = torch.einsum("nri,nrj->rij", jacobian, jacobian) / len(x)
    assert found.inputs is not None
    blocks = found.output_curvature[0, :, None, None] * found.inputs[0]
    assert close(blocks.sum(0), exact.sum(0))
    # and each block to the trace that K-FAC with the plain Gram matrix gives it, on average over rows
    assert torch.allclose(blocks.diagonal(dim1=1, dim2=2).sum(1).sum(), exact.diagonal(dim1=1, dim2=2).sum())


def test_where_a_layer_has_one_row_its_fisher_block_is_exact() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    module = seeded(Single)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    graph, sites = traced(module, x)
    found = expand(graph, [x], sites, shifted(module, [x])[0], frozenset(sites))["one"]
    slopes = []
    for row in x:
        module.zero_grad()
        module(row).sum().backward()
        slopes.append(module.one.weight.grad[0].double())  # type: ignore[union-attr, index]
    rows = torch.stack(slopes)
    assert found.inputs is not None
    assert close(found.output_curvature[0, 0] * found.inputs[0], rows.T @ rows / len(x))


@pytest.mark.parametrize(("kind", "batches"), [(Mlp, mlp_batches(2)), (Cnn, image_batches(2))])
def test_output_rows_meet_the_input_rows_of_the_same_token(kind: type[nn.Module], batches: list[Tensor]) -> None:
    graph, sites = traced(seeded(kind), batches[0])
    read: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}

    def made(name: str, y: Tensor) -> None:
        if name in sites and sites[name].layout is not None:
            layout = sites[name].layout
            assert layout is not None
            x = torch.cat(list(row_chunks(read[sites[name].reads].detach(), layout)), 1)
            y.register_hook(  # type: ignore[no-untyped-call]
                lambda slope: products.update({name: output_rows(slope, layout).mT @ x})
            )

    _, gradients = backpropagate(
        graph, batches[0], lambda y: y[0].square().sum(), sites, observe=read.__setitem__, emit=made
    )
    for name, gradient in gradients.items():
        assert close(products[name], gradient), name  # dL/dW = Σ d xᵀ


def language_loss(module: nn.Module, batches: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    total, count = torch.zeros(()), 0
    for batch in batches:
        logits = module(batch)
        for window in range(len(batch)):
            for place in range(1, batch.shape[1]):
                if mask is None or bool(mask[window, place - 1] and mask[window, place]):
                    total = total + cross_entropy(logits[window, place - 1], batch[window, place])
                    count += 1
    return total / count


def test_a_language_models_loss_is_the_cross_entropy_of_its_tokens_and_a_shared_weight_counts_thrice() -> None:
    module, batches = seeded(Tied), ids()
    graph, sites = traced(module, batches[0])
    del sites["head"]  # its gradient through the embedding is not that of its product
    found = expand(graph, batches, sites, NextToken(), frozenset(sites))
    slopes: dict[str, list[Tensor]] = {name: [] for name in sites}
    for name in sites:

        def caught(_: nn.Module, args: object, y: Tensor, name: str = name) -> None:
            y.register_hook(slopes[name].append)  # type: ignore[no-untyped-call]

        module.get_submodule(name).register_forward_hook(caught)
    language_loss(module, batches).backward()
    terms = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    for name in sites:
        assert close(found[name].gradient[0], module.get_parameter(f"{name}.weight").grad), name  # type: ignore[arg-type]
        squares = torch.cat([slope.flatten(0, 1) for slope in slopes[name]]) * terms
        assert close(found[name].output_curvature[0], squares.double().square().sum(0) / terms), name
        assert found[name].tokens == len(squares)
    assert found["shared"].tokens == 3 * found["before"].tokens


class Masked(nn.Module):
    """Predicts from the token before alone; takes a mask it does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embed(input_ids))))


def test_hidden_tokens_are_neither_predicted_nor_counted() -> None:
    tokens = ids(1)[0]
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    mask[1, :2] = 0
    module = seeded(Masked)
    batch = {"input_ids": tokens, "attention_mask": mask}
    graph, sites = traced(module, batch)
    loss = NextToken()
    assert loss.count(batch) == 3 + 3 + 5 + 5
    found = expand(graph, [batch], sites, loss, frozenset(sites))
    language_loss(lambda batch: module(batch, mask), [tokens], mask).backward()  # type: ignore[arg-type]
    assert close(found["inner"].gradient[0], module.inner.weight.grad)  # type: ignore[union-attr, arg-type]
    hidden = padding(batch)
    assert hidden is not None
    assert found["inner"].tokens == len(hidden.shown) == int(mask.sum())


def test_a_batch_without_a_term_or_with_a_loss_that_is_not_finite_is_refused() -> None:
    tokens = ids(1)[0]
    module = seeded(Masked)
    batch = {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)}
    graph, sites = traced(module, batch)
    with pytest.raises(CalibrationError, match="no term on any calibration batch"):
        expand(graph, [batch], sites, NextToken())
    module.head.weight.data[0, 0] = float("nan")  # type: ignore[union-attr]
    batch["attention_mask"] += 1
    with pytest.raises(CalibrationError, match="the model's loss is nan on calibration batch 0"):
        expand(graph, [batch], sites, NextToken())


class HalfUsed(nn.Module):
    """A convolution of two groups, of which the second goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(8, 8, 1, groups=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x)[:, :4].mean((2, 3)))


def test_a_group_without_gradient_leaves_the_weighed_inputs_of_the_others_and_is_told() -> None:
    module, x = seeded(HalfUsed), torch.randn(6, 8, 5, 5, generator=torch.Generator().manual_seed(2))
    graph, sites = traced(module, x)
    found = expand(graph, [x], sites, shifted(module, [x])[0], frozenset(["conv"]))["conv"]
    cpu = torch.device("cpu")
    first, second = (found.of_group(group, cpu) for group in (0, 1))
    assert first.inputs is not None
    assert second.inputs is None
    assert not second.output_curvature.any()
    assert bool(first.output_curvature.all())
    notes = []
    for group, expansion in enumerate((first, second)):
        rows = x[:, 4 * group : 4 * group + 4].double().movedim(1, 3).reshape(-1, 4)
        weight = graph.weight(sites["conv"])[group]
        gram = Gram(rows.T @ rows / len(rows), len(rows))
        problem = LayerProblem("conv", weight, Unstructured(), 0.5, gram=gram, expansion=expansion)
        notes.append(WoodTaylor(curvature="fisher").prune(problem).notes)
    assert not any("Fisher" in note for note in notes[0])
    assert (
        "woodtaylor: no gradient weighs this layer's inputs: the Gram matrix stands in for the Fisher matrix"
        in (notes[1])
    )


def test_the_users_module_is_left_without_gradients() -> None:
    module, batches = seeded(Mlp), mlp_batches(1)
    graph, sites = traced(module, batches[0])
    expand(graph, batches, sites, shifted(module, batches)[0])
    assert all(parameter.grad is None for parameter in module.parameters())
