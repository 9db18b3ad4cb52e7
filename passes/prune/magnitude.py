"""Magnitude pruning: the smallest weights go. Needs no data."""

from dataclasses import dataclass

from sparsify_compiler.pattern import Block
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs


@dataclass(frozen=True)
class Magnitude:
    """Remove the weights of smallest |w|, or the tiles of smallest Σ w², over the whole layer."""

    @property
    def name(self) -> str:
        """The word in recipes."""
        return "magnitude"

    @property
    def needs(self) -> Needs:
        """No statistics."""
        return Needs.NOTHING

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Select by size; the kept weights stay as they are.

        Raises:
            PatternError: a Block that does not tile the weight, or a weight with NaN.
        """
        scores = layer.weight.abs()
        if isinstance(layer.pattern, Block):
            scores = scores.double().square()
        keep = layer.pattern.select(scores, layer.sparsity, layer.run)
        weight = layer.weight.float().masked_fill(~keep, 0.0)
        loss = layer.loss(weight)
        return LayerSolution(weight, keep, loss_selected=loss, loss=loss)
