"""SparseGPT: one sweep over the columns; each removed weight is made up for by the columns that follow."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune.algebra import InverseFactor, checked_gram, inverse_factor
from sparsify_compiler.pattern import NM, Block, Pattern, keep_largest
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs

Span = tuple[int, int]
"""Columns start <= j < stop."""

Choice = Callable[[Tensor, Tensor, Span], Tensor]
"""(columns (width, out) as they now are, factor (width, width), where) -> removed, bool (width, out)."""


@dataclass(frozen=True)
class SparseGPT:
    """Frantar & Alistarh 2023, "SparseGPT", Alg. 1.

    `damp` in (0, 1] is the ridge as a share of the Gram's mean diagonal, raised tenfold (and noted) where the
    factorisation fails. `block_columns` is the paper's B and Bs: the columns whose mask is chosen together, and after
    which the update of the rest is done at once; rounded up to whole N:M groups and tiles.

    Departures: counts are exact over the layer, not rounded per column block; inputs that never fired lose their
    weights first; an N:M group never crosses a run; tiles of a Block pattern, which the paper does not treat, are
    compared by the exact error of removing them, ‖w_T U_TT⁻¹‖². Dense targets (`Targets`) are not read: the re-solve
    after the selection reads them.
    """

    damp: float = 0.01
    block_columns: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie in (0, 1], a share of the Gram's mean diagonal")
        if self.block_columns < 1:
            raise ValueError(f"block_columns {self.block_columns}: must be at least 1")

    @property
    def name(self) -> str:
        """The word in recipes."""
        return "sparsegpt"

    @property
    def needs(self) -> Needs:
        """The Gram matrix."""
        return Needs.GRAM

    def prune(self, layer: LayerProblem) -> LayerSolution:
        """Select and compensate; the factor is float64, the sweep float32.

        Raises:
            DataError: the problem carries no Gram matrix.
            CalibrationError: the Gram matrix is not finite.
            SingularGramError: it stayed indefinite at every damping up to 1, or is all zero.
            PatternError: a pattern that does not fit the weight.
        """
        gram = checked_gram(layer, self.name)
        factor = self._factor(layer.name, gram)
        columns = layer.weight.t().float().contiguous().clone()  # (in, out): an update touches whole rows of memory
        columns[factor.dead] = 0.0
        choose = _chooser(layer, factor.dead)
        removed = torch.zeros_like(columns, dtype=torch.bool)
        for pieces in _spans(layer.pattern, len(columns), layer.run, self.block_columns):
            _sweep(columns, removed, factor.upper, pieces, choose)
        keep = ~removed.t()
        weight = columns.t().contiguous()
        loss = layer.loss(weight)
        stats = {"damp": factor.damp, "dead_inputs": float(factor.dead.sum())}
        return LayerSolution(weight, keep.contiguous(), loss, loss, stats, factor.notes)

    def _factor(self, name: str, gram: Gram) -> InverseFactor:
        try:
            return gram.cached(f"inverse factor at damp {self.damp!r}", lambda: inverse_factor(gram.matrix, self.damp))
        except CalibrationError as error:  # SingularGramError is one
            raise type(error)(f"layer {name!r}: sparsegpt: {error}") from None


def _sweep(columns: Tensor, removed: Tensor, upper: Tensor, pieces: list[Span], choose: Choice) -> None:
    """Prune the columns of `pieces` (Alg. 1, lines 5 to 17), changing `columns` and `removed`, both (in, out).

    The mask of a piece is chosen when the sweep reaches it, from weights that already make up for what went before.
    """
    start, stop = pieces[0][0], pieces[-1][1]
    rows = columns[start:stop]
    errors = torch.empty_like(rows)
    reciprocal = upper.diagonal().reciprocal()
    for first, last in pieces:
        gone = choose(columns[first:last], upper[first:last, first:last], (first, last))
        removed[first:last] = gone
        share = gone * reciprocal[first:last, None]  # (width, out): 1 / U_jj where the weight goes, else 0
        for j in range(first, last):
            error = torch.mul(columns[j], share[j - first], out=errors[j - start])
            if j + 1 < stop:
                columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
    rows.masked_fill_(removed[start:stop], 0.0)
    if stop < len(columns):
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)


def _spans(pattern: Pattern, in_: int, run: int | None, width: int) -> list[list[Span]]:
    """Cut the columns into spans of about `width`, each a list of the pieces whose mask is chosen at once."""
    match pattern:
        case NM():
            spans: list[list[Span]] = [[]]
            for group in pattern.groups(in_, run):
                if spans[-1] and group[0] - spans[-1][0][0] >= width:
                    spans.append([])
                spans[-1].append(group)
            return spans
        case Block():
            width = -(-width // pattern.cols) * pattern.cols
    return [[(start, min(start + width, in_))] for start in range(0, in_, width)]


def _chooser(layer: LayerProblem, dead: Tensor) -> Choice:
    pattern, (out, in_) = layer.pattern, layer.weight.shape
    match pattern:
        case NM():
            return lambda columns, factor, _: ~keep_largest(_scores(columns, factor).t(), pattern.keep).t()
        case Block():
            tiles = pattern.removed(out, in_, layer.sparsity) // (pattern.rows * pattern.cols)
            return lambda columns, factor, span: _choose_tiles(pattern, columns, factor, _share(tiles, span, in_))
    budget = _budget(pattern.removed(out, in_, layer.sparsity), out, dead)
    return lambda columns, factor, span: _choose_entries(
        columns, factor, dead[slice(*span)], budget[span[1]] - budget[span[0]]
    )


def _choose_entries(columns: Tensor, factor: Tensor, dead: Tensor, count: int) -> Tensor:
    scores = _scores(columns, factor).masked_fill(dead[:, None], -1.0)
    width, out = columns.shape
    kept = keep_largest(scores.t().reshape(1, -1), width * out - count)
    return ~kept.reshape(out, width).t()


def _choose_tiles(pattern: Block, columns: Tensor, factor: Tensor, count: int) -> Tensor:
    """Remove `count` tiles: removing w_T and making up for it costs ‖w_T U_TT⁻¹‖² when later columns are free."""
    errors = torch.empty_like(columns)
    for start in range(0, len(columns), pattern.cols):
        tile = slice(start, start + pattern.cols)
        errors[tile] = torch.linalg.solve_triangular(factor[tile, tile].t(), columns[tile], upper=False)
    scores = pattern.pool(errors.t().double().square())  # (out / rows, width / cols)
    kept = keep_largest(scores.reshape(1, -1), scores.numel() - count).reshape(scores.shape)
    return ~pattern.expand(kept).t()


def _scores(columns: Tensor, factor: Tensor) -> Tensor:
    """Return the root of the error of removing each weight alone, |w| / U_jj (Alg. 1, line 7): (width, out).

    It orders as the error does, and where the layer's outputs fit float32, so does it: squares need not.
    """
    return (columns / factor.diagonal()[:, None]).abs()


def _share(total: int, span: Span, in_: int) -> int:
    return total * span[1] // in_ - total * span[0] // in_


def _budget(total: int, out: int, dead: Tensor) -> list[int]:
    """Return how many entries are gone before each column 0..in: dead inputs first, the rest in equal shares."""
    in_, dead_columns = len(dead), int(dead.sum())
    dead_before = [0, *dead.cumsum(0).tolist()]
    from_dead = min(total, dead_columns * out)
    from_live = total - from_dead
    live = max(in_ - dead_columns, 1)
    return [
        from_dead * gone // max(dead_columns, 1) + from_live * (column - gone) // live
        for column, gone in enumerate(dead_before)
    ]
