"""Block-sparse weights in float32 on a CPU, compiled by Numba: the kept tiles of a tile row, one after the other."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.bits import unpack_bits
from sparsify_compiler.runtime.cpu import cpu_compiled
from sparsify_compiler.runtime.cpu.numba_csr import chosen_width, width_variants
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.rows import round_up
from sparsify_compiler.runtime.variants import variant_for

WIDTHS = (16, 64, 128)


@dataclass(frozen=True)
class NumbaBlock:
    """Four rows by four columns of a tile at a time, over a tile of tokens; for one token a dot product a row.

    Sums of a row run in the order of its columns, in groups of four (one token: of a vector), whatever the threads.
    """

    name: str = "numba_block"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern, dtype or missing library stands in the way, or None."""
        if reason := cpu_compiled.elsewhere(spec):
            return reason
        if not isinstance(spec.pattern, Block):
            return f"runs block patterns; found {spec.pattern}"
        if spec.pattern.rows % 4 or spec.pattern.cols % 4:
            return f"needs tiles whose sides are multiples of 4; found {spec.pattern}"
        return cpu_compiled.rejects(spec)

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the tile widths worth timing."""
        return width_variants(tokens, WIDTHS)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (row starts int32 over tiles, tile columns int32, tiles (kept, rows, cols)).

        Raises:
            KernelError: the weight is not packed as blocks.
        """
        if packed.layout != "block" or not isinstance(packed.pattern, Block):
            raise KernelError(f"numba_block reads the layout 'block'; found {packed.layout!r} of {packed.pattern}")
        (out, in_), pattern = packed.shape, packed.pattern
        mask = unpack_bits(packed.tensors["mask"], -(-in_ // pattern.cols))  # (tile rows, tile cols)
        starts = functional.pad(mask.sum(dim=1).cumsum(0), (1, 0)).int()
        columns = mask.nonzero()[:, 1].int()
        values = packed.tensors["values"].to(spec.device, spec.dtype).contiguous()
        return Prepared(self.name, (out, in_), (starts.to(spec.device), columns.to(spec.device), values))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        out, in_ = prepared.shape
        tokens, (starts, columns, values) = x.shape[0], prepared.tensors
        y = x.new_empty(tokens, out)
        if tokens == 0 or out == 0:
            return y
        kept, rows, cols = values.shape
        wide = round_up(in_, cols)
        bias = None if bias is None else bias.contiguous()
        weight = (starts, columns, values, kept, rows, cols, bias, out, wide)
        if tokens == 1:
            row = functional.pad(x, (0, wide - in_)).contiguous()
            cpu_compiled.launch(_one_token(), (*weight, row, y))
        else:
            width = chosen_width(variant_for(prepared.variants, tokens), tokens, WIDTHS)
            tiles = cpu_compiled.token_tiles(x, width, wide)
            cpu_compiled.launch(_many_tokens(width), (*weight, tiles, y, tokens))
        return activate(y, activation)


@functools.cache
def _one_token() -> Any:
    tools = cpu_compiled.toolbox()
    carray, floats, ints, rank, team = tools.carray, tools.floats, tools.ints, tools.rank, tools.team

    def product(arguments: Any) -> None:
        a = carray(arguments, 11)
        kept, rows, cols, out = a[3], a[4], a[5], a[7]
        high = -(-out // rows)
        starts, columns = carray(ints(a[0]), high + 1), carray(ints(a[1]), kept)
        values, bias = carray(floats(a[2]), (kept, rows, cols)), carray(floats(a[6]), out)
        x, y = carray(floats(a[9]), a[8]), carray(floats(a[10]), out)
        for tile_row in range(rank(), high, team()):
            first = tile_row * rows
            for row in range(first, min(first + rows, out)):
                y[row] = bias[row] if a[6] != 0 else np.float32(0)
            for k in range(starts[tile_row], starts[tile_row + 1]):
                piece = x[columns[k] * cols : columns[k] * cols + cols]
                for row in range(first, min(first + rows, out)):
                    line = values[k, row - first]
                    total = np.float32(0)
                    for c in range(cols):
                        total += line[c] * piece[c]
                    y[row] += total

    return tools.entry(product, any_order=True)


@functools.cache
def _many_tokens(width: int) -> Any:
    tools = cpu_compiled.toolbox()
    carray, floats, ints, rank, team = tools.carray, tools.floats, tools.ints, tools.rank, tools.team

    def multiply(tile: Any, x: Any, sums: Any, rows: int, cols: int) -> None:
        for r in range(0, rows, 4):
            s0, s1, s2, s3 = sums[r], sums[r + 1], sums[r + 2], sums[r + 3]
            for c in range(0, cols, 4):  # 16 weights stay in registers while four columns of x pass once
                x0, x1, x2, x3 = x[c], x[c + 1], x[c + 2], x[c + 3]
                w00, w01, w02, w03 = tile[r, c], tile[r, c + 1], tile[r, c + 2], tile[r, c + 3]
                w10, w11, w12, w13 = tile[r + 1, c], tile[r + 1, c + 1], tile[r + 1, c + 2], tile[r + 1, c + 3]
                w20, w21, w22, w23 = tile[r + 2, c], tile[r + 2, c + 1], tile[r + 2, c + 2], tile[r + 2, c + 3]
                w30, w31, w32, w33 = tile[r + 3, c], tile[r + 3, c + 1], tile[r + 3, c + 2], tile[r + 3, c + 3]
                for t in range(width):
                    y0, y1, y2, y3 = x0[t], x1[t], x2[t], x3[t]
                    s0[t] += (w00 * y0 + w01 * y1) + (w02 * y2 + w03 * y3)
                    s1[t] += (w10 * y0 + w11 * y1) + (w12 * y2 + w13 * y3)
                    s2[t] += (w20 * y0 + w21 * y1) + (w22 * y2 + w23 * y3)
                    s3[t] += (w30 * y0 + w31 * y1) + (w32 * y2 + w33 * y3)

    add_tile = tools.inner(multiply)

    def product(arguments: Any) -> None:
        a = carray(arguments, 12)
        kept, rows, cols, out, wide, tokens = a[3], a[4], a[5], a[7], a[8], a[11]
        high, tiles = -(-out // rows), -(-tokens // width)
        starts, columns = carray(ints(a[0]), high + 1), carray(ints(a[1]), kept)
        values, bias = carray(floats(a[2]), (kept, rows, cols)), carray(floats(a[6]), out)
        x, y = carray(floats(a[9]), (tiles, wide, width)), carray(floats(a[10]), (tokens, out))
        sums = np.empty((rows, width), np.float32)
        for job in range(rank(), tiles * high, team()):
            tile, tile_row = job // high, job % high
            first, token = tile_row * rows, tile * width
            used = min(rows, out - first)
            for r in range(rows):
                sums[r] = bias[first + r] if a[6] != 0 and r < used else np.float32(0)
            for k in range(starts[tile_row], starts[tile_row + 1]):
                column = columns[k] * cols
                add_tile(values[k], x[tile, column : column + cols], sums, rows, cols)
            for t in range(min(width, tokens - token)):
                for r in range(used):
                    y[token + t, first + r] = sums[r, t]

    return tools.entry(product)
