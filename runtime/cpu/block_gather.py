"""Block-sparse weights on a CPU by PyTorch alone: a tile row gathers its columns of x for one dense product.

Made for wide tiles and some tokens: every tile row costs two calls whatever its size, and the gathered columns are
written and read once more. It needs no compiler, so it is what there is where Numba or GNU OpenMP are not.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.bits import unpack_bits
from sparsify_compiler.runtime.cpu import cpu_compiled
from sparsify_compiler.runtime.epilogue import finish
from sparsify_compiler.runtime.refusals import not_in
from sparsify_compiler.runtime.rows import round_up

MOST_TILE_ROWS = 1024
"""Beyond it the calls alone, about 5 us a tile row, take longer than any dense product that this could beat."""


@dataclass(frozen=True)
class BlockGather:
    """W_r x_r for every tile row r, where W_r are its kept tiles side by side and x_r the columns of x they need."""

    name: str = "block_gather"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern, dtype or size stands in the way, or None."""
        if reason := cpu_compiled.elsewhere(spec):
            return reason
        if not isinstance(spec.pattern, Block):
            return f"runs block patterns; found {spec.pattern}"
        why = ", whose products a CPU multiplies as they are"
        if reason := not_in(spec, (torch.float32, torch.float64), why):
            return reason
        if (tile_rows := -(-spec.out // spec.pattern.rows)) > MOST_TILE_ROWS:
            return f"{tile_rows} tile rows cost two calls each, too many to win; choose tiles of more rows"
        return None

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """One variant only."""
        return ("",)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (row starts int64 over tiles, columns of x int64 (kept * cols,), tiles (kept * cols, rows)).

        Raises:
            KernelError: the weight is not packed as blocks.
        """
        if packed.layout != "block" or not isinstance(packed.pattern, Block):
            raise KernelError(f"block_gather reads the layout 'block'; found {packed.layout!r} of {packed.pattern}")
        (_, in_), pattern = packed.shape, packed.pattern
        mask = unpack_bits(packed.tensors["mask"], -(-in_ // pattern.cols))  # (tile rows, tile cols)
        starts = functional.pad(mask.sum(dim=1).cumsum(0), (1, 0))
        first = mask.nonzero()[:, 1:] * pattern.cols
        columns = (first + torch.arange(pattern.cols, device=first.device)).reshape(-1)
        tiles = packed.tensors["values"].to(spec.device, spec.dtype)
        values = tiles.transpose(1, 2).reshape(-1, pattern.rows)  # a tile row's weight, transposed, is contiguous
        return Prepared(self.name, packed.shape, (starts.to(spec.device), columns.to(spec.device), values.contiguous()))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        out, in_ = prepared.shape
        starts, columns, values = prepared.tensors
        rows = values.shape[1]
        high, kept = len(starts) - 1, int(starts[-1])
        cols = columns.numel() // max(kept, 1)
        lanes = functional.pad(x, (0, round_up(in_, cols) - in_)).T.contiguous() if cols else x.T
        y = x.new_empty(high * rows, x.shape[0])
        bounds = [start * cols for start in starts.tolist()]
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            part = y[number * rows : (number + 1) * rows]
            if start == stop:
                part.zero_()
                continue
            torch.mm(values[start:stop].T, lanes.index_select(0, columns[start:stop]), out=part)
        return finish(y[:out].T.contiguous(), bias, activation)
