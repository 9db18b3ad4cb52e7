"""Axes of tensors as products of named factors, told apart or made one by what operations do with them.

An axis of length 1536 that a view splits into 24 heads of 64 is two factors, in order; two axes that an addition pairs
are the same factors; an axis of length 1 has none. What a factor's positions mean is the same wherever it occurs, so an
order of them is a choice for all of its places together.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Factors = tuple[int, ...]
"""Factors of one axis, slowest first, as `Axes` numbers them."""


@dataclass(frozen=True)
class Size:
    """A length: `number` times the lengths, by name and in order, that tracing left free."""

    number: int
    free: tuple[str, ...] = ()

    def over(self, other: "Size") -> "Size | None":
        """Return this length divided by `other`, or None where that is not known to be whole."""
        rest = Counter(self.free)
        rest.subtract(other.free)
        if not other.number or self.number % other.number or min(rest.values(), default=0) < 0:
            return None
        return Size(self.number // other.number, tuple(sorted(rest.elements())))


ONE = Size(1)


def size_of(length: int | torch.SymInt) -> Size:
    """Return a length of a traced shape; a sum or a power of free lengths counts as one free length of its own."""
    if isinstance(length, int):
        return Size(length)
    text = str(length.node.expr)
    parts = text.split("*")
    if not all(part.isidentifier() or part.isdigit() for part in parts):
        return Size(1, (text,))
    number = 1
    for part in parts:
        number *= int(part) if part.isdigit() else 1
    return Size(number, tuple(sorted(part for part in parts if not part.isdigit())))


class Axes:
    """Factors under unification: equal ones are merged, coarse ones split, and some are fixed with a reason."""

    def __init__(self) -> None:
        self._sizes: list[Size] = []
        self._same: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}
        self._reasons: dict[int, str] = {}

    def new(self, size: Size | int, fixed: str | None = None) -> Factors:
        """Make a factor of its own; `fixed` says why its order cannot change. A size of 1 needs none."""
        size = Size(size) if isinstance(size, int) else size
        if size == ONE:
            return ()
        self._sizes.append(size)
        self._same.append(len(self._same))
        if fixed is not None:
            self._reasons[self._same[-1]] = fixed
        return (self._same[-1],)

    def leaves(self, factors: Iterable[int]) -> Factors:
        """Return the factors as they are by now, split and merged."""
        found: list[int] = []
        for factor in factors:
            factor = self._find(factor)
            found.extend(self.leaves(self._parts[factor]) if factor in self._parts else (factor,))
        return tuple(found)

    def size(self, leaf: int) -> Size:
        """Return a leaf's length."""
        return self._sizes[self._find(leaf)]

    def reason(self, leaf: int) -> str | None:
        """Say why the order of a leaf's positions has to stay, or None where it is free."""
        return self._reasons.get(self._find(leaf))

    def fix(self, factors: Iterable[int], reason: str) -> None:
        """Say that positions along these factors have to stay in order. The first reason is the one kept."""
        for leaf in self.leaves(factors):
            self._reasons.setdefault(leaf, reason)

    def match(self, left: Iterable[int], right: Iterable[int], where: str) -> None:
        """Make two axes of one length the same factors. What cannot be paired is fixed: `where` names the operation."""
        ours, theirs = list(reversed(self.leaves(left))), list(reversed(self.leaves(right)))
        while ours and theirs:
            one, other = ours.pop(), theirs.pop()
            if one == other:
                continue
            if self.size(one) == self.size(other):
                self._merge(one, other)
            elif self._split(one, self.size(other)):
                ours.extend(reversed(self._parts[one]))
                theirs.append(other)
            elif self._split(other, self.size(one)):
                theirs.extend(reversed(self._parts[other]))
                ours.append(one)
            else:
                self.fix((one, other, *ours, *theirs), f"{where} divides its axis in another way")
                return
            # A split or a merge may concern what still waits in the two lists.
            ours, theirs = (list(reversed(self.leaves(reversed(rest)))) for rest in (ours, theirs))
        self.fix((*ours, *theirs), f"{where} pairs axes of other lengths")

    def regroup(self, factors: Iterable[int], sizes: Sequence[Size], where: str) -> tuple[Factors, ...]:
        """Divide factors, in order, among axes of the lengths `sizes`, as a view does."""
        waiting = list(reversed(self.leaves(factors)))
        axes: list[Factors] = []
        for length in sizes:
            taken: list[int] = []
            rest: Size | None = length
            while rest is not None and rest != ONE and waiting:
                leaf = waiting.pop()
                after = rest.over(self.size(leaf))
                if after is None and self._split(leaf, rest):
                    waiting.extend(reversed(self._parts[leaf]))
                    waiting = list(reversed(self.leaves(reversed(waiting))))
                    continue
                taken.append(leaf)
                rest = after
            if rest != ONE:
                reason = f"{where} divides its axis in another way"
                self.fix((*taken, *waiting), reason)
                waiting = []
                axes.append(self.new(length, reason))
                continue
            axes.append(tuple(taken))
        self.fix(waiting, f"{where} drops a part of it")
        return tuple(axes)

    def _find(self, factor: int) -> int:
        while self._same[factor] != factor:
            factor = self._same[factor]
        return factor

    def _merge(self, one: int, other: int) -> None:
        keep, gone = min(one, other), max(one, other)
        reason = self._reasons.pop(gone, None)
        if reason is not None:
            self._reasons.setdefault(keep, reason)
        self._same[gone] = keep

    def _split(self, leaf: int, first: Size) -> bool:
        """Split a leaf into `first` times the rest; say whether its length allows it."""
        rest = self.size(leaf).over(first)
        if rest is None or rest == ONE:
            return False
        reason = self._reasons.pop(leaf, None)
        (slow,), (fast,) = self.new(first, reason), self.new(rest, reason)
        self._parts[leaf] = (slow, fast)
        return True
