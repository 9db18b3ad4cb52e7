"""Layer problems: the loss is that of the data, a Gram's derived values are computed once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from methods import Case, inputs, problem_from, problem_of, with_targets

from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Layerwise


def test_the_loss_is_the_squared_output_difference_per_token() -> None:
    x = inputs(50, 9)
    weight, other = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    problem = problem_from(x, weight, Unstructured(), 0.5)
    direct = float((x @ (weight - other).double().T).square().sum() / 50)
    assert problem.loss(other) == pytest.approx(direct, rel=1e-12)  # the same float64 sums in another order
    assert problem.loss(weight) == 0.0


def test_the_energy_is_the_squared_output_per_token() -> None:
    x = inputs(50, 9)
    problem = problem_from(x, torch.ones(4, 9), Unstructured(), 0.5)
    assert problem.energy() == pytest.approx(float(4 * x.sum(1).square().sum() / 50), rel=1e-12)


def test_with_targets_the_loss_compares_with_the_dense_inputs() -> None:
    x_dense = inputs(50, 9)
    x = x_dense + 0.1 * inputs(50, 9, seed=1)
    weight, other = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    problem = with_targets(problem_from(x, weight, Unstructured(), 0.5), x, x_dense)
    direct = float((x_dense @ weight.double().T - x @ other.double().T).square().sum() / 50)
    assert problem.loss(other) == pytest.approx(direct, rel=1e-12)
    assert problem.energy() == pytest.approx(float((x_dense @ weight.double().T).square().sum() / 50), rel=1e-12)


def test_without_a_gram_matrix_there_is_no_loss() -> None:
    problem = LayerProblem("layer", torch.ones(2, 4), NM(2, 4), 0.5)
    assert problem.loss(problem.weight) is None
    assert problem.energy() is None


def test_a_gram_computes_each_derived_value_once() -> None:
    gram, calls = Gram(torch.eye(2), 5), []
    for key in ("a", "a", "b", "a"):
        assert gram.cached(key, lambda key=key: calls.append(key) or f"value {key}") == f"value {key}"  # type: ignore[misc]
    assert calls == ["a", "b"]


def test_a_failed_computation_is_not_remembered() -> None:
    gram = Gram(torch.eye(2), 5)

    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        gram.cached("a", fail)
    assert gram.cached("a", lambda: 3) == 3


def test_two_grams_never_share_what_they_remember() -> None:
    first, second = Gram(torch.eye(2), 5), Gram(torch.eye(2), 5)
    first.cached("a", lambda: 1)
    assert second.cached("a", lambda: 2) == 2


@dataclass
class Recorder:
    """A model of two layers that records the order of events."""

    events: list[str] = field(default_factory=list)

    def layers(self) -> Iterator[LayerProblem]:
        for name in ("first", "second"):
            self.events.append(f"statistics of {name}")
            problem = problem_of(Case(NM(2, 4), 0.5, 2, 8))
            yield LayerProblem(name, problem.weight, problem.pattern, 0.5)

    def accept(self, name: str, solution: LayerSolution) -> None:
        assert int(solution.keep.sum()) == 8
        self.events.append(f"accept {name}")

    def loss(self, weights: object, batch: int) -> torch.Tensor:
        raise AssertionError("a layer-wise method asks for no model loss")


def test_layerwise_prunes_front_to_back_through_the_accepted_prefix() -> None:
    model = Recorder()
    solutions = Layerwise(Magnitude()).prune_model(model)
    assert list(solutions) == ["first", "second"]
    assert model.events == ["statistics of first", "accept first", "statistics of second", "accept second"]
