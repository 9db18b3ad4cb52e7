"""WoodTaylor: a Newton step on the model's own loss, then a one-shot method on the curvature of that loss."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparsify_compiler.errors import DataError
from sparsify_compiler.passes.prune.algebra import checked_gram
from sparsify_compiler.passes.prune.curvature import DenseCurvature, damped_curvature
from sparsify_compiler.passes.prune.iobs_layer import SOLVERS
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs


@dataclass(frozen=True)
class WoodTaylor:
    """Wu et al. 2024 (I-OBS), Alg. 1 and section 3.3, on the loss of the whole model: one step for one layer.

    The second reading of the paper's "learning rate" η: with g the gradient of the model's loss at the weight θ_t that
    the round found (`LayerProblem.start`, else the dense weight) and H its curvature there, the step goes to
    θ⁺ = θ_t − η H⁻¹ g, and `solver` approaches argmin ‖θ − θ⁺‖_H over the weights that the pattern allows.
    With g = 0 that is WoodFisher, with all weights but one kept it is both methods as published.

    H keeps a block for each row r of the weight, h_r · M (Martens & Grosse 2015, K-FAC, with a diagonal output factor):
    h_r is the squared gradient by output r summed over tokens (`Expansion`), M with `curvature` "gram" the layer's Gram
    matrix. "fisher" is the empirical Fisher matrix, whose block Σ d_tr² x_t x_tᵀ weighs tokens row by row, with the
    weights of a row shared by all: Σ_r d_tr², so that the sum of the blocks over rows is exact, and each block where
    there is one row. That is the choice between what is too large, a block of in x in a row, and its two usual cuts:
    blocks along the inputs drop the correlations that make up for a removed weight, and the rank of a few hundred
    sampled gradients (CHITA) leaves a layer of thousands of inputs mostly undetermined. This keeps both, streams over
    all tokens, and every solver can use it: row r enters it times √h_r, and is divided by that again.

    Both factors are damped by `damp` in (0, 1] times their mean: a row without gradient must not be free to go
    anywhere. For M that is raised tenfold (and noted) where M + ridge is indefinite; the solver damps by the same.

    What the gradient adds is what no layer objective knows: how the whole model, as pruned by now, does. The fixed
    point of iobs (a round that returns what it was given) is left as soon as that gradient is not zero.

    η = `step` · s / sites. The steps of all sites are taken at once from one gradient and do not know of each other:
    where they all agree, the curvature along the joint step is as many times what their own blocks say, so a share of
    1 / sites is what cannot overshoot; `step` in (0, 1] is a share of that. s in [0, 1] is how much of the layer's
    Newton step is signal (`_signal`): with more weights than tokens a gradient is mostly noise at the dense model, and
    mostly signal once the model was pruned. NOTES.md has what was measured. An exact re-solve afterwards goes back to
    the layer's own optimum, so a recipe leaves it out unless it says `refit = true`.

    It gains on a model of 2.6e5 weights and harms SmolLM2-135M: one round with ALPS inside leaves a perplexity of 141
    where ALPS alone leaves 52.7 (NOTES.md). Compare it with its solver before trusting it on a large model.
    """

    step: float = 0.7
    damp: float = 0.01
    curvature: Literal["gram", "fisher"] = "gram"
    solver: str = "sparsegpt"

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step {self.step}: must lie in (0, 1], its share of the longest safe Newton step")
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie in (0, 1], a share of the curvature's mean diagonal")
        if self.curvature not in ("gram", "fisher"):
            raise ValueError(f"curvature {self.curvature!r}: must be gram or fisher")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r}: must be one of {', '.join(SOLVERS)}")

    @property
    def name(self) -> str:
        """The word in recipes."""
        return "woodtaylor"

    @property
    def needs(self) -> Needs:
        """An expansion of the model's loss, with weighted inputs for the Fisher matrix."""
        return Needs.FISHER if self.curvature == "fisher" else Needs.GRADIENT

    def undone_by_refit(self, rounds: int) -> bool:
        """Always: a re-solve knows nothing of the model's own loss."""
        return True

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Step in float64, then prune the float32 θ⁺; both losses are those of `layer`, against the dense outputs.

        Without an `expansion` the gradient is taken to be zero and every row to count alike, as for a loss that
        compares with the dense model, at the dense model: the result is the solver's, and a note says so. `stats` gain
        "moved", ‖θ⁺ − θ_t‖ / ‖θ_t‖, and "trusted", s.

        Raises:
            DataError: the problem carries no Gram matrix, or a weight pruned before and no expansion: there the
                gradient is not zero, and without it the round would return what it was given.
            CalibrationError, SingularGramError, PatternError: as the solver does; also a curvature that is indefinite
                at every damping up to 1.
        """
        gram = checked_gram(layer, self.name)
        solver = SOLVERS[self.solver](self.damp)
        if layer.expansion is None:
            if layer.start is not None:
                raise DataError(
                    f"layer {layer.name!r}: woodtaylor needs the gradient of the model's loss at a pruned weight, "
                    "found none; let the pipeline take it, or choose iobs"
                )
            solution = solver.prune(layer)
            note = f"woodtaylor: no gradient of the model's loss was given: pruned by {self.solver} alone"
            return replace(solution, notes=(*solution.notes, note))
        matrix, weighed = self._matrix(gram, layer.expansion.inputs)
        scale, dead = _output_factor(layer.expansion.output_curvature, self.damp)
        curvature = damped_curvature(matrix, self.damp, f"layer {layer.name!r}: woodtaylor")
        start = (layer.weight if layer.start is None else layer.start).to(matrix.matrix)
        newton = curvature.solve(layer.expansion.gradient) / scale[:, None]
        trusted = _signal(layer.expansion.gradient, newton, _freedom(matrix, curvature) / layer.expansion.terms)
        target = start - self.step / layer.expansion.sites * trusted * newton
        share = (scale / scale.mean()).sqrt()[:, None]
        solution = solver.prune(_inner(layer, matrix, target * share))
        weight = (solution.weight / share).float().masked_fill_(~solution.keep, 0.0)
        loss = layer.loss(weight)
        moved = float((target - start).norm() / start.norm().clamp_min(1e-300))
        notes = dict.fromkeys((*curvature.notes, *dead, *weighed, *solution.notes))
        stats = {**solution.stats, "moved": moved, "trusted": trusted}
        return LayerSolution(weight, solution.keep, loss, loss, stats, tuple(notes))

    def _matrix(self, gram: Gram, inputs: Gram | None) -> tuple[Gram, tuple[str, ...]]:
        """Return M, and a note where it is not what was asked for."""
        if self.curvature == "gram":
            return gram, ()
        if inputs is None:
            note = "woodtaylor: no gradient weighs this layer's inputs: the Gram matrix stands in for the Fisher matrix"
            return gram, (note,)
        return inputs, ()


def _output_factor(output_curvature: Tensor, damp: float) -> tuple[Tensor, tuple[str, ...]]:
    """Return h + damp · mean h (out,), ones where no row has any, and a note then."""
    mean = output_curvature.mean()
    if not float(mean) > 0:
        return torch.ones_like(output_curvature), ("woodtaylor: no gradient of the model's loss reaches this layer",)
    return output_curvature + damp * mean, ()


def _freedom(gram: Gram, curvature: DenseCurvature) -> float:
    """Return tr M (M + λI)⁻¹, the directions of a row that the damping leaves free; computed once for a shared M."""
    key = f"degrees of freedom at ridge {float(curvature.ridge)!r}"
    return gram.cached(key, lambda: float(curvature.solve(gram.matrix).trace()))


def _signal(gradient: Tensor, newton: Tensor, noise: float) -> float:
    """Return the share of the Newton step H⁻¹g (out, in) that is not noise: 1 − E[noise] / gᵀH⁻¹g, at least 0.

    A gradient that is pure noise of N terms has the covariance H / N, so gᵀH⁻¹g = tr M (M + λI)⁻¹ / N a row on average,
    which is `noise`. The share is Stein's (James & Stein 1961, positive part).
    """
    found = float((gradient.to(newton) * newton).sum())
    return max(0.0, 1 - noise * len(newton) / found) if found > 0 else 0.0


def _inner(layer: LayerProblem, gram: Gram, target: Tensor) -> LayerProblem:
    """Return the problem that the solver sees: `target` (out, in) float64 on the curvature, nothing of later rounds."""
    return LayerProblem(
        name=layer.name,
        weight=target.float(),
        pattern=layer.pattern,
        sparsity=layer.sparsity,
        run=layer.run,
        mean_square=gram.matrix.diagonal(),
        gram=gram,
    )
