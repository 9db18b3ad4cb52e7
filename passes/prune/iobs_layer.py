"""One round of practical I-OBS on a layer: a step towards the layer's optimum, then a one-shot method from there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from sparsify_compiler.errors import DataError
from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.curvature import damped_curvature
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs, Pruner

SOLVERS: dict[str, Callable[[float], Pruner]] = {
    "sparsegpt": lambda damp: SparseGPT(damp=damp),
    "alps": lambda damp: ALPS(damp=damp),
    "obc": lambda damp: OBC(damp=damp),
    "wanda": lambda damp: Wanda(),
    "magnitude": lambda damp: Magnitude(),
}
"""The words for the method inside a round, each made with the round's damping where it takes one."""


@dataclass(frozen=True)
class IOBS:
    """Wu et al. 2024, "The Iterative Optimal Brain Surgeon", Alg. 2, one round of one layer; rounds come from outside.

    With f(Ŵ) = ‖X_dense Wᵀ − X Ŵᵀ‖² / (2 tokens), G the Gram matrix of X and W_t the weight the round before left
    (`LayerProblem.start`), the round goes to θ⁺ = W_t − η (G + λI)⁻¹ ∇f(W_t) and lets `solver` prune θ⁺ on G. This is
    the first of the two readings that the paper leaves open of its "learning rate" η = `step` in (0, 1]; the other one
    takes the gradient of the model's own loss. λ = `damp` · mean diagonal of G, `damp` in (0, 1], raised tenfold (and
    noted) where G + λI is indefinite; the solver takes the same `damp`. The first round has no W_t: it is the solver
    itself, bit for bit, whatever η is. The default of 0.5 is what NOTES.md found best; a full step lost accuracy.

    The fixed-point trap: on one X, G + λI → G, a full step (η = 1) from any W_t ends at the same θ⁺, the dense
    least-squares optimum, so a round returns what the round before did. What can make rounds differ: a new batch and
    its G; inputs through the newly pruned prefix, with the dense outputs kept as targets; η < 1, or directions with
    less curvature than λ, in which θ⁺ stays near W_t; a solver that depends on where it starts. The driver
    (rounds.py) says which of them a round had.
    """

    step: float = 0.5
    damp: float = 0.01
    solver: str = "sparsegpt"

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step {self.step}: must lie in (0, 1], the share of the Newton step that is taken")
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie in (0, 1], a share of the Gram's mean diagonal")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r}: must be one of {', '.join(SOLVERS)}")

    @property
    def name(self) -> str:
        """The word in recipes."""
        return "iobs"

    @property
    def needs(self) -> Needs:
        """The Gram matrix."""
        return Needs.GRAM

    def undone_by_refit(self, rounds: int) -> bool:
        """In later rounds: what a damped step gains over the layer's optimum is lost (NOTES.md, "Rounds")."""
        return rounds > 1

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Step in float64, then prune the float32 θ⁺; both losses are those of `layer`, against the dense outputs.

        `stats` gain "moved", ‖θ⁺ − W_t‖ / ‖W_t‖, in later rounds.

        Raises:
            DataError: the problem carries no Gram matrix.
            CalibrationError, SingularGramError, PatternError: as the solver does; also a Gram matrix that is
                indefinite at every damping up to 1.
        """
        solver = SOLVERS[self.solver](self.damp)
        if layer.gram is None:
            raise DataError(
                f"layer {layer.name!r}: iobs needs a Gram matrix, found none; give calibration data or choose magnitude"
            )
        if layer.start is None:
            return solver.prune(layer)
        curvature = damped_curvature(layer.gram, self.damp, f"layer {layer.name!r}: iobs")
        start = layer.start.to(curvature.matrix)
        target = start - self.step * curvature.solve(_gradient(layer, layer.gram.matrix, start))
        solution = solver.prune(replace(layer, weight=target.float(), targets=None, start=None, objective=None))
        loss = layer.loss(solution.weight)
        moved = float((target - start).square().sum().sqrt() / start.square().sum().sqrt().clamp_min(1e-300))
        return replace(
            solution,
            loss_selected=loss,
            loss=loss,
            stats={**solution.stats, "moved": moved},
            notes=tuple(dict.fromkeys((*curvature.notes, *solution.notes))),
        )


def _gradient(layer: LayerProblem, gram: Tensor, weight: Tensor) -> Tensor:
    """Return ∇f at `weight` (out, in): weight · G − W Cᵀ, C = XᵀX_dense / tokens (G without dense targets)."""
    dense = layer.weight.to(gram)
    if layer.targets is None:
        return (weight - dense) @ gram
    return weight @ gram - dense @ layer.targets.cross.t()
