"""One layer, several kernels: each takes the token counts at which it was measured to be the fastest.

Its name says which: "nm24_mma@64+cusparselt" runs nm24_mma up to 64 tokens and cusparselt above. The price is the
memory of every component's own order of the weight; tensors that two components prepare alike are kept once.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.variants import read_variants, write_variants

MOST_PARTS = 8
_PART = re.compile(r"([\w.\-]+)(?:@(\d+))?")


@dataclass(frozen=True)
class Routed:
    """Kernels by token count: (up to and including so many tokens, kernel), ascending; the last has no bound (None).

    Raises:
        KernelError: fewer than two parts, bounds that do not ascend, or a bound missing before the last part.
    """

    parts: tuple[tuple[int | None, Kernel], ...]

    def __post_init__(self) -> None:
        _check(tuple((bound, kernel.name) for bound, kernel in self.parts))

    @property
    def name(self) -> str:
        """The components' names with their bounds; `routed_named` reads it."""
        return routed_name([(bound, kernel.name) for bound, kernel in self.parts])

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Return the first component's refusal under its name, or None."""
        for _, kernel in self.parts:
            if reason := kernel.rejects(spec):
                return f"{kernel.name}: {reason}"
        return None

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the variants of the component that runs `tokens` rows."""
        return self.parts[self._part(tokens)][1].variants(spec, tokens)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Prepare the weight for every component.

        The tensors are one header a component and then the components' own, each kept once. A header is empty: its
        shape is (0, i, j, ...), where i, j, ... are the places of the component's tensors among those that follow
        the headers. So the places travel with the tensors and are read without looking at a device's memory.
        """
        kept: list[Tensor] = []
        headers = []
        for _, kernel in self.parts:
            places = [_place(tensor, kept) for tensor in kernel.prepare(packed, spec).tensors]
            headers.append(torch.empty((0, *places), dtype=torch.uint8, device=spec.device))
        return Prepared(self.name, packed.shape, (*headers, *kept))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in), by the component of that token count."""
        number = self._part(x.shape[0])
        kernel = self.parts[number][1]
        count = len(self.parts)
        tensors = tuple(prepared.tensors[count + place] for place in prepared.tensors[number].shape[1:])
        low = 0 if number == 0 else self.parts[number - 1][0] or 0
        own = _variants_between(prepared.variants, low, self.parts[number][0])
        return kernel.run(Prepared(kernel.name, prepared.shape, tensors, own), x, bias, activation)

    def _part(self, tokens: int) -> int:
        return next(i for i, (bound, _) in enumerate(self.parts) if bound is None or tokens <= bound)


def routed_name(parts: Sequence[tuple[int | None, str]]) -> str:
    """Write (bound, kernel name) pairs as one name.

    >>> routed_name([(64, "nm24_mma"), (None, "cusparselt")])
    'nm24_mma@64+cusparselt'
    """
    return "+".join(name if bound is None else f"{name}@{bound}" for bound, name in parts)


def is_routed(name: str) -> bool:
    """Say whether a kernel's name is that of a `Routed`."""
    return "+" in name or "@" in name


@functools.lru_cache(maxsize=1024)
def routed_named(name: str, find: Callable[[str], Kernel]) -> Routed:
    """Return the routed kernel of that name; `find` returns its components by their names.

    Raises:
        KernelError: the name is not of that form, or `find` knows no such kernel.
    """
    parts = []
    for text in name.split("+"):
        match = _PART.fullmatch(text)
        if match is None:
            raise KernelError(f"kernel {name!r}: {text!r} is not <kernel>@<tokens>; compile the model again")
        parts.append((int(match[2]) if match[2] else None, match[1]))
    _check(tuple(parts))
    return Routed(tuple((bound, find(component)) for bound, component in parts))


def _check(parts: tuple[tuple[int | None, str], ...]) -> None:
    *bounded, last = parts or ((None, ""),)
    bounds = [bound for bound, _ in bounded if bound is not None]
    ascending = all(a < b for a, b in itertools.pairwise(bounds)) and all(b > 0 for b in bounds)
    nested = any(is_routed(name) for _, name in parts)
    whole = len(bounds) == len(bounded) and last[0] is None and 2 <= len(parts) <= MOST_PARTS
    if nested or not ascending or not whole:
        raise KernelError(
            f"routed kernel {routed_name(parts)!r}: needs 2 to {MOST_PARTS} kernels, all but the last with a bound in "
            f"tokens, ascending, as in 'nm24_mma@64+cusparselt'; compile the model again"
        )


def _place(tensor: Tensor, kept: list[Tensor]) -> int:
    """Return where `tensor` is in `kept`, by its content, appending it where it is not."""
    for place, other in enumerate(kept):
        alike = tensor.dtype == other.dtype and tensor.shape == other.shape and tensor.device == other.device
        if alike and (tensor.data_ptr() == other.data_ptr() or torch.equal(tensor, other)):
            return place
    kept.append(tensor)
    return len(kept) - 1


@functools.lru_cache(maxsize=4096)
def _variants_between(text: str, low: int, high: int | None) -> str:
    """Return the entries of `text` for more than `low` and at most `high` tokens (None: any)."""
    return write_variants({n: name for n, name in read_variants(text) if n > low and (high is None or n <= high)})
