"""The quadratic that greedy removal and swaps work on: damped, scaled to a unit diagonal, around its own minimiser."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune.algebra import checked_gram, damped_cholesky
from sparsify_compiler.pattern import Block, Pattern
from sparsify_compiler.problem import LayerProblem


def tile_of(pattern: Pattern) -> tuple[int, int]:
    """Return the (rows, columns) that are kept or removed together."""
    return (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)


@dataclass(frozen=True)
class _Shared:
    """What sites with the same input share, in the units of `DampedQuadratic`; `ridge` is in the Gram's."""

    scale: Tensor
    matrix: Tensor
    inverse: Tensor
    ridge: float
    damp: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DampedQuadratic:
    """What to minimise over sparse ŵ, row by row: (ŵ − start)ᵀ matrix (ŵ − start), up to a constant the layer's loss.

    Units are those in which the damped Gram has a unit diagonal: a weight is `scale` (in,) times its value here.
    `matrix` and `inverse` (in, in), `start` and `moment` = `start` · `matrix` (out, in) are float64. `start` is the
    dense weight or, with dense targets, the minimiser (G + ridge)⁻¹ (C w + ridge · w): ridge = `damp` · mean diagonal
    holds the weights to the dense ones. Weights of the `dead` inputs, which never fired, are 0.
    """

    matrix: Tensor
    inverse: Tensor
    scale: Tensor
    start: Tensor
    moment: Tensor
    damp: float
    dead: int
    notes: tuple[str, ...]


def _shared(gram: Tensor, damp: float) -> _Shared:
    lower, used, notes = damped_cholesky(gram, damp)
    ridge = used * float(gram.diagonal().mean())
    matrix = gram.clone()
    matrix.diagonal().add_(ridge)
    scale = matrix.diagonal().rsqrt()
    inverse = torch.cholesky_inverse(lower) / scale[:, None] / scale
    return _Shared(scale, matrix * scale[:, None] * scale, inverse, ridge, used, notes)


def damped_quadratic(layer: LayerProblem, damp: float, method: str) -> DampedQuadratic:
    """Build the damped quadratic of `layer`; messages name `method`.

    Raises:
        DataError: the problem carries no Gram matrix.
        CalibrationError: the Gram matrix is not finite.
        SingularGramError: it stayed indefinite at every damping up to 1, or is all zero.
        PatternError: a pattern that does not fit the weight.
    """
    gram = checked_gram(layer, method)
    try:
        shared = gram.cached(f"inverse at damp {damp!r}, unit diagonal", lambda: _shared(gram.matrix, damp))
    except CalibrationError as error:  # SingularGramError is one
        raise type(error)(f"layer {layer.name!r}: {method}: {error}") from None
    dead = gram.matrix.diagonal() == 0
    dense = layer.weight.to(gram.matrix).masked_fill(dead, 0.0)
    if layer.targets is None:
        start = dense / shared.scale
        moment = start @ shared.matrix
    else:
        moment = (dense @ layer.targets.cross.t() + shared.ridge * dense) * shared.scale
        start = moment @ shared.inverse
    return DampedQuadratic(
        shared.matrix, shared.inverse, shared.scale, start, moment, shared.damp, int(dead.sum()), shared.notes
    )
