"""What a pruning method is given and what it returns: tensors in, tensors out, no module and no device string."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor

from sparsify_compiler.pattern import Pattern

T = TypeVar("T")


class Needs(Enum):
    """The statistics a method reads. Up to GRAM each level includes the ones before it; the others include GRAM.

    GRADIENT is an `Expansion` of the model's own loss, FISHER one that weighs the inputs as well.
    """

    NOTHING = "nothing"
    NORMS = "norms"
    GRAM = "gram"
    LOOKAHEAD = "lookahead"
    GRADIENT = "gradient"
    FISHER = "fisher"


@dataclass(frozen=True)
class Gram:
    """Second moments of a site's input, shared by every site that reads the same tensor.

    `matrix` is (in, in) float64, XᵀX / tokens, unit activation². `cached` keeps what was derived from it (a
    factorisation, say) for the next site that shares it, so each is computed once.
    """

    matrix: Tensor
    tokens: int
    _memo: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    def cached(self, key: str, compute: Callable[[], T]) -> T:
        """Return what `compute` gave the first time `key` was asked for."""
        if key not in self._memo:
            self._memo[key] = compute()
        return cast(T, self._memo[key])


@dataclass(frozen=True)
class Targets:
    """Dense targets for inputs that come from the pruned prefix (both from the same tokens).

    `cross` (in, in) float64 is X_prunedᵀ X_dense / tokens; `energy` is ‖X_dense Wᵀ‖² / tokens.
    """

    cross: Tensor
    energy: float


@dataclass(frozen=True)
class Expansion:
    """The model's own loss around one weight to second order, per predicted token (or sample); float64.

    `gradient` (out, in) is taken at the weight the round found. The Hessian of row r of the weight is about
    `output_curvature`[r] · M: the squared gradient of the loss by output r, summed over tokens, times the second moment
    of the inputs. M is `inputs`, in which every token counts by its squared gradient, or the problem's Gram matrix
    where `inputs` is None. The gradient is the mean of `terms` terms of the loss (infinite: it is exact), and was taken
    for `sites` weights at the same point.
    """

    gradient: Tensor
    output_curvature: Tensor
    inputs: Gram | None = None
    terms: float = math.inf
    sites: int = 1


@dataclass(frozen=True)
class LayerProblem:
    """One weight to prune.

    `weight` (out, in) float32; `run` columns share one kernel tap (None: all of them); `mean_square` (in,) float64,
    mean of x² per input; `gram` and `targets` as their classes say. None where the method did not ask for it.
    `weight` is the dense one; `start` (out, in) where an earlier round left off, None in the first. `objective` maps
    (out, in) to a loss per token, differentiably, where the loss reaches beyond the layer (a slice of the graph).
    `expansion` is of the model's own loss, around `start`, or `weight` in the first round.
    """

    name: str
    weight: Tensor
    pattern: Pattern
    sparsity: float
    run: int | None = None
    mean_square: Tensor | None = None
    gram: Gram | None = None
    targets: Targets | None = None
    start: Tensor | None = None
    objective: Callable[[Tensor], Tensor] | None = None
    expansion: Expansion | None = None

    def loss(self, weight: Tensor) -> float | None:
        """Return ‖X (W − Ŵ)ᵀ‖² / tokens for Ŵ = `weight` (out, in), in float64, or None without a Gram matrix.

        With `targets`, ‖X_dense Wᵀ − X Ŵᵀ‖² / tokens; with an `objective`, its value.
        """
        if self.objective is not None:
            return float(self.objective(weight).detach())
        if self.gram is None:
            return None
        matrix = self.gram.matrix
        if self.targets is None:
            delta = (weight - self.weight).to(matrix)
            return float(((delta @ matrix) * delta).sum())
        new, dense = weight.to(matrix), self.weight.to(matrix)
        quadratic = ((new @ matrix) * new).sum()
        linear = ((new @ self.targets.cross) * dense).sum()
        return float(quadratic - 2 * linear) + self.targets.energy

    def energy(self) -> float | None:
        """Return ‖X Wᵀ‖² / tokens, the loss of the all-zero weight, or None without a Gram matrix."""
        return self.loss(self.weight.new_zeros(self.weight.shape))


@dataclass(frozen=True)
class LayerSolution:
    """A pruned weight: `weight` (out, in) float32 is exactly zero where `keep` (out, in) bool is False.

    `loss_selected` is the loss as the selector left it, `loss` the loss of `weight` (equal without a re-solve). Both
    are None without a Gram matrix. `notes` say in words what a reader should know, such as damping that was raised.
    """

    weight: Tensor
    keep: Tensor
    loss_selected: float | None = None
    loss: float | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class OwnStep(Protocol):
    """A method with a step that a re-solve of the kept weights can undo: that goes to the layer's optimum again."""

    def undone_by_refit(self, rounds: int) -> bool:
        """Say whether it would where the network is pruned `rounds` times: the weights are then best left alone."""
        ...


class Pruner(Protocol):
    """One site at a time. An implementation is a frozen dataclass whose fields are its hyper-parameters."""

    @property
    def name(self) -> str:
        """The word for the method in recipes and reports."""
        ...

    @property
    def needs(self) -> Needs:
        """The statistics `prune` reads."""
        ...

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Return the pruned weight. The problem's tensors are not modified."""
        ...


class ModelProblem(Protocol):
    """All chosen sites of one model."""

    def layers(self) -> Iterator[LayerProblem]:
        """Yield every problem front to back, statistics taken through the already accepted prefix."""
        ...

    def accept(self, name: str, solution: LayerSolution) -> None:
        """Put a solution into the model, so that later statistics see it."""
        ...

    def loss(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """Return mean ‖y − y_dense‖² over the outputs for batch number `batch`, differentiable in `weights`.

        `weights` maps problem names to (out, in) tensors; sites that are not named keep their current weight.
        """
        ...


class ModelPruner(Protocol):
    """All sites at once: global budgets, masks learned through the whole network."""

    def prune_model(self, model: ModelProblem) -> dict[str, LayerSolution]:
        """Prune the model and return every solution by problem name."""
        ...


@dataclass(frozen=True)
class Layerwise:
    """Lift a `Pruner` to a `ModelPruner`: front to back, each layer seeing the pruned ones before it."""

    pruner: Pruner

    def prune_model(self, model: ModelProblem) -> dict[str, LayerSolution]:
        """Prune layer after layer."""
        solutions = {}
        for layer in model.layers():
            solutions[layer.name] = self.pruner.prune(layer)
            model.accept(layer.name, solutions[layer.name])
        return solutions
