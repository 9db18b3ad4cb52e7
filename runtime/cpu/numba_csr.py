"""Compressed sparse rows in float32 on a CPU, compiled by Numba. Any pattern; made for 80 to 95 % zeros."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.cpu import cpu_compiled
from sparsify_compiler.runtime.cpu.csr import TorchCsr
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.formats import LARGEST_COUNT
from sparsify_compiler.runtime.variants import variant_for

WIDTHS = (16, 64, 128)
"""Tokens a tile: their sums of one row stay in the first cache, and so do eight columns of x."""

ROWS = 16
"""Rows that are written together: 64 bytes of every token's output."""


@dataclass(frozen=True)
class NumbaCsr:
    """Rows in parallel. Many tokens: x is cut into tiles of tokens, column by column; one: a dot product a row.

    Sums of a row run in the order of its columns in groups of eight (four for one token), whatever the threads.
    """

    name: str = "numba_csr"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, dtype, size or missing library stands in the way, or None."""
        reason = cpu_compiled.rejects(spec)
        kept = round(spec.out * spec.in_ * spec.density)
        if reason is None and max(kept, spec.in_) > LARGEST_COUNT:
            return f"{kept} kept entries do not fit int32 indices; split the layer"
        return reason

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the tile widths worth timing."""
        return width_variants(tokens, WIDTHS)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (row starts int32, columns int32, values)."""
        starts, columns, values = TorchCsr().prepare(packed, spec).tensors
        return Prepared(self.name, packed.shape, (starts, columns, values.contiguous()))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        out, in_ = prepared.shape
        tokens, (starts, columns, values) = x.shape[0], prepared.tensors
        y = x.new_empty(tokens, out)
        if tokens == 0 or out == 0:
            return y
        bias = None if bias is None else bias.contiguous()
        weight = (starts, columns, values, values.numel(), out, in_, bias)
        if tokens == 1:
            row = x.contiguous()
            cpu_compiled.launch(_one_token(), (*weight, row, y))
        else:
            width = chosen_width(variant_for(prepared.variants, tokens), tokens, WIDTHS)
            tiles = cpu_compiled.token_tiles(x, width, in_)
            cpu_compiled.launch(_many_tokens(width), (*weight, tiles, y, tokens))
        return activate(y, activation)


def width_variants(tokens: int, widths: tuple[int, ...]) -> tuple[str, ...]:
    """Name the widths for `tokens` rows, our own choice first; wider tiles than half empty ones are left out."""
    if tokens <= 1:
        return ("",)
    own = chosen_width("", tokens, widths)
    others = (width for width in widths if width != own and width < 2 * tokens)
    return (f"t{own}", *(f"t{width}" for width in others))


def chosen_width(variant: str, tokens: int, widths: tuple[int, ...]) -> int:
    """Return the width that `variant` names, or our own choice: the least that holds all tokens, else the widest."""
    named = {f"t{width}": width for width in widths}
    if variant in named:
        return named[variant]
    return next((width for width in widths if tokens <= width), widths[-1])


@functools.cache
def _one_token() -> Any:
    tools = cpu_compiled.toolbox()
    carray, floats, ints, rank, team = tools.carray, tools.floats, tools.ints, tools.rank, tools.team

    def product(arguments: Any) -> None:
        a = carray(arguments, 9)
        kept, out = a[3], a[4]
        starts, columns, values = carray(ints(a[0]), out + 1), carray(ints(a[1]), kept), carray(floats(a[2]), kept)
        x, y = carray(floats(a[7]), a[5]), carray(floats(a[8]), out)
        bias = carray(floats(a[6]), out)
        me, threads = rank(), team()
        # Every thread takes rows that hold as many values, for rows may be of any length.
        first = np.searchsorted(starts, kept * me // threads)
        last = np.searchsorted(starts, kept * (me + 1) // threads) if me + 1 < threads else out
        for row in range(first, last):
            k, end = starts[row], starts[row + 1]
            s0 = bias[row] if a[6] != 0 else np.float32(0)
            s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0)
            while k + 4 <= end:  # four sums, so that an addition need not wait for the one before
                s0 += values[k] * x[columns[k]]
                s1 += values[k + 1] * x[columns[k + 1]]
                s2 += values[k + 2] * x[columns[k + 2]]
                s3 += values[k + 3] * x[columns[k + 3]]
                k += 4
            while k < end:
                s0 += values[k] * x[columns[k]]
                k += 1
            y[row] = (s0 + s1) + (s2 + s3)

    return tools.entry(product)


@functools.cache
def _many_tokens(width: int) -> Any:
    tools = cpu_compiled.toolbox()
    carray, floats, ints, rank, team = tools.carray, tools.floats, tools.ints, tools.rank, tools.team

    def row_sums(columns: Any, values: Any, x: Any, sums: Any) -> None:
        k, end = 0, len(values)
        while k + 8 <= end:  # the sums are read and written once for eight columns of x
            v0, v1, v2, v3 = values[k], values[k + 1], values[k + 2], values[k + 3]
            v4, v5, v6, v7 = values[k + 4], values[k + 5], values[k + 6], values[k + 7]
            x0, x1, x2, x3 = x[columns[k]], x[columns[k + 1]], x[columns[k + 2]], x[columns[k + 3]]
            x4, x5, x6, x7 = x[columns[k + 4]], x[columns[k + 5]], x[columns[k + 6]], x[columns[k + 7]]
            for t in range(width):
                low = (v0 * x0[t] + v1 * x1[t]) + (v2 * x2[t] + v3 * x3[t])
                sums[t] += low + ((v4 * x4[t] + v5 * x5[t]) + (v6 * x6[t] + v7 * x7[t]))
            k += 8
        while k < end:
            value, column = values[k], x[columns[k]]
            for t in range(width):
                sums[t] += value * column[t]
            k += 1

    add_row = tools.inner(row_sums)

    def product(arguments: Any) -> None:
        a = carray(arguments, 10)
        kept, out, in_, tokens = a[3], a[4], a[5], a[9]
        starts, columns, values = carray(ints(a[0]), out + 1), carray(ints(a[1]), kept), carray(floats(a[2]), kept)
        tiles, groups = -(-tokens // width), -(-out // ROWS)
        x, y = carray(floats(a[7]), (tiles, in_, width)), carray(floats(a[8]), (tokens, out))
        bias = carray(floats(a[6]), out)
        sums = np.empty((ROWS, width), np.float32)
        for job in range(rank(), tiles * groups, team()):
            tile, row = job // groups, job % groups * ROWS
            rows, token = min(ROWS, out - row), tile * width
            for r in range(rows):
                sums[r] = bias[row + r] if a[6] != 0 else np.float32(0)
                start, end = starts[row + r], starts[row + r + 1]
                add_row(columns[start:end], values[start:end], x[tile], sums[r])
            for t in range(min(width, tokens - token)):
                for r in range(rows):
                    y[token + t, row + r] = sums[r, t]

    return tools.entry(product)
