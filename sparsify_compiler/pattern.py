"""Sparsity patterns: from scores to an exact keep mask, and to and from text.

A pattern acts on a weight of shape (out, in). `run` is the number of columns after which the meaning of a column
starts again: `in` for a linear weight, the input channels of one kernel tap for a convolution (tap-major columns).
N:M groups and block columns never cross from one run into the next, because sparse tensor cores reduce over input
channels at one tap.

    >>> NM(keep=2, of=4).select(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), sparsity=0.5)
    tensor([[ True, False, False,  True]])
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify_compiler.errors import PatternError

Scope = Literal["layer", "row"]

SHORT_ROW, MANY_ROWS, LONG_ROW = 32, 1 << 14, 1 << 16
"""In so many rows of so few entries, comparing all pairs is 2 to 4 times as fast as a selection, and needs no block a
row on a GPU. From the last on, CUDA finds the largest by many blocks a row, where its `kthvalue` walks it in one."""


@dataclass(frozen=True)
class Unstructured:
    """Any entry may go: the `round(entries * sparsity)` entries of lowest score are removed."""

    def __str__(self) -> str:
        return "unstructured"

    def fixed_sparsity(self) -> float | None:
        """None: the sparsity is the rule's to choose."""
        return None

    def misfit(self, out: int, in_: int, run: int | None = None) -> str | None:
        """None: every weight fits."""
        return None

    def removed(self, out: int, in_: int, sparsity: float, run: int | None = None, scope: Scope = "layer") -> int:
        """Count the entries that `select` removes from an (out, in) weight."""
        _check_sparsity(sparsity)
        return out * round(in_ * sparsity) if scope == "row" else round(out * in_ * sparsity)

    def select(self, scores: Tensor, sparsity: float, run: int | None = None, scope: Scope = "layer") -> Tensor:
        """Return the keep mask, bool (out, in), for `scores` (out, in): higher survives, ties keep the lowest index.

        `scope` "row" removes the same count from every row, "layer" compares all entries with each other.
        """
        _check_sparsity(sparsity)
        _check_scores(scores)
        out, in_ = scores.shape
        if scope == "row":
            return keep_largest(scores, in_ - round(in_ * sparsity))
        kept = out * in_ - self.removed(out, in_, sparsity)
        return keep_largest(scores.reshape(1, -1), kept).reshape(out, in_)


@dataclass(frozen=True)
class NM:
    """Keep `keep` of every `of` consecutive inputs of a row; a tail of r columns keeps min(keep, r)."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise PatternError(f"pattern {self.keep}:{self.of}: needs 0 < keep < of, as in 2:4 (2 kept of every 4)")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def fixed_sparsity(self) -> float | None:
        """The share removed that the pattern implies."""
        return 1 - self.keep / self.of

    def misfit(self, out: int, in_: int, run: int | None = None) -> str | None:
        """Say why an (out, in) weight cannot take the pattern, or None."""
        if (run or in_) < self.of:
            what = f"{run} input channels a tap" if run and run != in_ else f"{in_} inputs"
            return f"{self} needs at least {self.of} inputs to choose from; found {what}"
        return None

    def groups(self, in_: int, run: int | None = None) -> list[tuple[int, int]]:
        """List the (start, stop) columns of every group, tails included, in column order."""
        run = run or in_
        return [
            (first + start, first + min(start + self.of, run))
            for first in range(0, in_, run)
            for start in range(0, run, self.of)
        ]

    def removed(self, out: int, in_: int, sparsity: float, run: int | None = None, scope: Scope = "layer") -> int:
        """Count the entries that `select` removes from an (out, in) weight."""
        return out * sum(max(stop - start - self.keep, 0) for start, stop in self.groups(in_, run))

    def select(self, scores: Tensor, sparsity: float, run: int | None = None, scope: Scope = "layer") -> Tensor:
        """Return the keep mask, bool (out, in), for `scores` (out, in): the best `keep` of every group survive.

        `sparsity` and `scope` are implied by the pattern and not read.
        """
        _check_scores(scores)
        out, in_ = scores.shape
        run = run or in_
        lanes = scores.reshape(out * (in_ // run), run)
        whole = run - run % self.of
        keep = torch.ones_like(lanes, dtype=torch.bool)
        if whole:
            groups = lanes[:, :whole].reshape(-1, self.of)
            keep[:, :whole] = keep_largest(groups, self.keep).reshape(-1, whole)
        if run - whole > self.keep:
            keep[:, whole:] = keep_largest(lanes[:, whole:], self.keep)
        return keep.reshape(out, in_)


@dataclass(frozen=True)
class Block:
    """Whole `rows` x `cols` tiles stay or go: `round(tiles * sparsity)` tiles of lowest summed score are removed."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise PatternError(f"pattern {self.rows}x{self.cols}: both sides must be at least 1, as in 64x64")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    def fixed_sparsity(self) -> float | None:
        """None: the sparsity is the rule's to choose."""
        return None

    def misfit(self, out: int, in_: int, run: int | None = None) -> str | None:
        """Say why an (out, in) weight cannot take the pattern, or None."""
        if out % self.rows == 0 and (run or in_) % self.cols == 0:
            return None
        inputs = f"{in_} inputs" if not run or run == in_ else f"{run} input channels a tap"
        return (
            f"Block({self.rows}, {self.cols}) does not tile weight ({out}, {in_}) with {inputs}; "
            f"rows must divide {out} and cols {run or in_}"
        )

    def removed(self, out: int, in_: int, sparsity: float, run: int | None = None, scope: Scope = "layer") -> int:
        """Count the entries that `select` removes from an (out, in) weight."""
        _check_sparsity(sparsity)
        tile_rows, tile_cols = out // self.rows, in_ // self.cols
        tiles = tile_rows * round(tile_cols * sparsity) if scope == "row" else round(tile_rows * tile_cols * sparsity)
        return tiles * self.rows * self.cols

    def pool(self, scores: Tensor) -> Tensor:
        """Sum `scores` (out, in) over each tile: (out / rows, in / cols)."""
        out, in_ = scores.shape
        return scores.reshape(out // self.rows, self.rows, in_ // self.cols, self.cols).sum(dim=(1, 3))

    def expand(self, tiles: Tensor) -> Tensor:
        """Repeat a per-tile tensor (out / rows, in / cols) over its entries: (out, in)."""
        return tiles.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)

    def select(self, scores: Tensor, sparsity: float, run: int | None = None, scope: Scope = "layer") -> Tensor:
        """Return the keep mask, bool (out, in), for `scores` (out, in): tiles of higher summed score survive."""
        _check_scores(scores)
        out, in_ = scores.shape
        if reason := self.misfit(out, in_, run):
            raise PatternError(reason)
        return self.expand(Unstructured().select(self.pool(scores), sparsity, scope=scope))


Pattern = Unstructured | NM | Block


def parse_pattern(text: str) -> Pattern:
    """Read "unstructured", "2:4" (kept:of) or "64x64" (rows x cols); `str(pattern)` is the inverse.

    Raises:
        PatternError: the text is none of these, or the numbers are impossible.
    """
    text = text.strip().lower()
    if text == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(keep=int(match[1]), of=int(match[2]))
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(rows=int(match[1]), cols=int(match[2]))
    raise PatternError(f"pattern {text!r}: write unstructured, kept:of as in 2:4, or rows x cols as in 64x64")


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest entries of every row of `scores` (rows, n); ties keep the lowest index.

    Long rows take linear time: the `count`-th largest value is a threshold, and only ties with it are counted.
    """
    n = scores.shape[1]
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if n <= SHORT_ROW and len(scores) >= MANY_ROWS:
        return _keep_by_rank(scores, count)
    if scores.is_cuda and n >= LONG_ROW:
        threshold = scores.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    else:
        threshold = scores.kthvalue(n - count + 1, dim=1, keepdim=True).values  # (rows, 1)
    above = scores > threshold
    tied = scores == threshold
    room = count - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


def _keep_by_rank(scores: Tensor, count: int) -> Tensor:
    """Count for every entry those ahead of it in its row: larger ones, and equal ones of lower index."""
    columns = scores.t().contiguous()  # (n, rows)
    ahead = torch.zeros_like(columns, dtype=torch.int8)
    for apart in range(1, len(columns)):
        later_wins = columns[apart:] > columns[:-apart]
        ahead[:-apart] += later_wins
        ahead[apart:] += ~later_wins
    return (ahead < count).t().contiguous()


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise PatternError(f"sparsity {sparsity}: must lie in [0, 1), the share removed (0.5 removes half)")


def _check_scores(scores: Tensor) -> None:
    if torch.isnan(scores).any():
        raise PatternError(f"scores of shape {tuple(scores.shape)} contain NaN; check the weight and the statistics")
