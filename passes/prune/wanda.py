"""Wanda: weights that are small, or that only ever meet small inputs, go."""

from dataclasses import dataclass

import torch

from sparsify_compiler.errors import CalibrationError, DataError
from sparsify_compiler.pattern import Block
from sparsify_compiler.problem import LayerProblem, LayerSolution, Needs


@dataclass(frozen=True)
class Wanda:
    """Remove the weights of smallest |w_ij| · √(mean x_j²), the same count from every row.

    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1; √mean in place of the
    paper's root of the sum differs by a constant factor, which no selection sees. Block tiles, which the paper does
    not treat, are compared by the sum of squared scores over the whole layer.
    """

    @property
    def name(self) -> str:
        """The word in recipes."""
        return "wanda"

    @property
    def needs(self) -> Needs:
        """The mean square of every input."""
        return Needs.NORMS

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Select by score; the kept weights stay as they are. Reads `mean_square`, else the Gram's diagonal.

        Raises:
            DataError: the problem carries no statistics.
            CalibrationError: a mean square is not finite, or negative.
            PatternError: a Block that does not tile the weight, or a weight with NaN.
        """
        mean_square = layer.mean_square
        if mean_square is None and layer.gram is not None:
            mean_square = layer.gram.matrix.diagonal()
        if mean_square is None:
            raise DataError(
                f"layer {layer.name!r}: wanda needs the mean square of every input, found none; "
                "give calibration data or choose magnitude"
            )
        if not bool((torch.isfinite(mean_square) & (mean_square >= 0)).all()):
            raise CalibrationError(
                f"layer {layer.name!r}: wanda needs finite means of squares, found NaN, infinity or less than 0; "
                "check the calibration data and the model's activations on it"
            )
        scores = layer.weight.double().abs() * mean_square.double().sqrt()
        if isinstance(layer.pattern, Block):
            keep = layer.pattern.select(scores.square(), layer.sparsity, layer.run)
        else:
            keep = layer.pattern.select(scores, layer.sparsity, layer.run, scope="row")
        weight = layer.weight.float().masked_fill(~keep, 0.0)
        loss = layer.loss(weight)
        return LayerSolution(weight, keep, loss_selected=loss, loss=loss)
