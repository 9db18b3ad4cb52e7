"""The Triton kernels of many_tokens.py, which imports this file inside functions only; empty where Triton is absent.

Words: a band is ROWS rows of the weight, a step 64 columns of it (see `Bands` in runtime/block/bands.py), a tile
TOKENS rows of x. Two things matter more than they look:

- The column of the next step is read one step ahead and carried round the loop. Read where it is used, Triton takes it
  as one more level of loads to overlap and gives it half of the stages: half the depth for the loads that count.
- Offsets from a tile's first element fit int32; only the tile's own address is taken in int64.
"""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    SLAB = tl.constexpr(64)

    @triton.jit  # type: ignore[untyped-decorator]
    def finish(total: tl.tensor, bias: tl.tensor, at: tl.tensor, out: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
        """Return activation(total + bias) in float32; the numbers of runtime/rows.py."""
        if bias is not None:
            total += tl.load(bias + at, mask=at < out, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == 1:
            total = tl.where(total < 0.0, 0.0, total)  # NaN stays NaN
        elif ACTIVATION == 2:
            total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
        elif ACTIVATION == 3:
            total = total / (1.0 + tl.exp(-total))
        return total

    @triton.jit  # type: ignore[untyped-decorator]
    def store(
        y: tl.tensor,
        total: tl.tensor,
        token: tl.tensor,
        at: tl.tensor,
        tokens: tl.tensor,
        out: tl.tensor,
        TOKENS: tl.constexpr,
    ) -> None:
        """Write a tile (TOKENS, ROWS) to y (tokens, out), rounded once; `at` are its columns."""
        row = tl.arange(0, TOKENS)[:, None]
        place = y + token.to(tl.int64) * out + row * out + at[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=(row < tokens - token) & (at[None, :] < out))

    @triton.jit  # type: ignore[untyped-decorator]
    def sum_by_maps(
        x: tl.tensor,
        values: tl.tensor,
        columns: tl.tensor,
        token: tl.tensor,
        start: tl.tensor,
        stop: tl.tensor,
        total: tl.tensor,
        ROWS: tl.constexpr,
    ) -> tl.tensor:
        """Add the products of steps start to stop for the tile at `token`; x and values are tensor descriptors."""
        column = tl.load(columns + start)
        for step in range(start, stop):
            following = tl.load(columns + step + 1)
            tile = x.load([token, column * SLAB])
            slab = values.load([step * ROWS, 0])
            total = tl.dot(tile, slab.T, total)
            column = following
        return total

    @triton.jit  # type: ignore[untyped-decorator]
    def sum_by_addresses(
        x: tl.tensor,
        values: tl.tensor,
        columns: tl.tensor,
        token: tl.tensor,
        start: tl.tensor,
        stop: tl.tensor,
        total: tl.tensor,
        tokens: tl.tensor,
        width: tl.tensor,
        PARTS: tl.constexpr,
    ) -> tl.tensor:
        """Add the products of steps start to stop for the tile at `token`; a step is PARTS grains, each anywhere."""
        GRAIN: tl.constexpr = SLAB // PARTS
        ROWS: tl.constexpr = total.shape[1]
        k = tl.arange(0, SLAB)
        row = tl.arange(0, total.shape[0])[:, None]
        some = row < tokens - token
        own = x + token.to(tl.int64) * width + row * width
        slabs = values + start.to(tl.int64) * (ROWS * SLAB) + tl.arange(0, ROWS)[None, :] * SLAB + k[:, None]
        places = columns + start * PARTS
        if PARTS > 1:
            places += k // GRAIN  # one for each of the 64 columns
        grain = tl.load(places)
        for _ in range(start, stop):
            places += PARTS
            following = tl.load(places)
            column = tl.max_contiguous(tl.multiple_of(grain * GRAIN + k % GRAIN, GRAIN), GRAIN)
            tile = tl.load(own + column[None, :], mask=some, other=0.0)
            slab = tl.load(slabs)
            slabs += ROWS * SLAB
            total = tl.dot(tile, slab, total)
            grain = following
        return total

    @triton.jit(do_not_specialize=["tokens", "bands", "group"])  # type: ignore[untyped-decorator]
    def block_product(
        x: tl.tensor,
        values: tl.tensor,
        columns: tl.tensor,
        table: tl.tensor,
        bias: tl.tensor,
        y: tl.tensor,
        tokens: tl.tensor,
        width: tl.tensor,
        out: tl.tensor,
        bands: tl.tensor,
        group: tl.tensor,
        TOKENS: tl.constexpr,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
        SPLIT: tl.constexpr,
        DESCRIPTORS: tl.constexpr,
        ACTIVATION: tl.constexpr,
    ) -> None:
        """One program a band, a tile and, if SPLIT > 1, a part of the steps: then y is (SPLIT, tokens, out) float32.

        Programs take `group` tiles of the longest band, then of the next, so that a group's x stays in L2.
        """
        tiles = tl.cdiv(tokens, TOKENS)
        program = tl.program_id(0)
        first = program // (group * bands) * group
        inside = program % (group * bands)
        here = tl.minimum(tiles - first, group)
        rank = inside // here
        token = (first + inside % here) * TOKENS
        part = tl.program_id(1)
        start = tl.load(table + rank * 4)
        steps = tl.load(table + rank * 4 + 1)
        at = tl.load(table + rank * 4 + 2) * ROWS + tl.arange(0, ROWS)
        stop = start + steps * (part + 1) // SPLIT
        start += steps * part // SPLIT
        total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        if DESCRIPTORS:
            total = sum_by_maps(x, values, columns, token, start, stop, total, ROWS)
        else:
            total = sum_by_addresses(x, values, columns, token, start, stop, total, tokens, width, PARTS)
        if SPLIT == 1:
            store(y, finish(total, bias, at, out, ACTIVATION), token, at, tokens, out, TOKENS)
        else:
            store(y + part.to(tl.int64) * tokens * out, total, token, at, tokens, out, TOKENS)

    @triton.jit(do_not_specialize=["tokens", "bands", "group"])  # type: ignore[untyped-decorator]
    def block_stream(
        x: tl.tensor,
        values: tl.tensor,
        columns: tl.tensor,
        table: tl.tensor,
        bias: tl.tensor,
        y: tl.tensor,
        tokens: tl.tensor,
        out: tl.tensor,
        bands: tl.tensor,
        group: tl.tensor,
        TOKENS: tl.constexpr,
        ROWS: tl.constexpr,
        ACTIVATION: tl.constexpr,
    ) -> None:
        """One program a band and `group` tiles, in one loop: the next tile's loads run under this one's last steps."""
        program = tl.program_id(0)
        rank = program % bands
        token = program // bands * group * TOKENS
        tiles = tl.minimum(group, tl.cdiv(tokens - token, TOKENS))
        start = tl.load(table + rank * 4)
        steps = tl.load(table + rank * 4 + 1)
        at = tl.load(table + rank * 4 + 2) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        if steps == 0:
            for tile in range(tiles):
                empty = finish(total, bias, at, out, ACTIVATION)
                store(y, empty, token + tile * TOKENS, at, tokens, out, TOKENS)
        step = start
        column = tl.load(columns + start)
        for _ in range(steps * tiles):
            tile = x.load([token, column * SLAB])
            slab = values.load([step * ROWS, 0])
            total = tl.dot(tile, slab.T, total)
            here = token
            last = step + 1 == start + steps
            token += tl.where(last, TOKENS, 0)
            step = tl.where(last, start, step + 1)
            column = tl.load(columns + step)
            if last:
                store(y, finish(total, bias, at, out, ACTIVATION), here, at, tokens, out, TOKENS)
                total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)

    @triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
    def block_sum(
        parts: tl.tensor,
        bias: tl.tensor,
        y: tl.tensor,
        tokens: tl.tensor,
        out: tl.tensor,
        SPLIT: tl.constexpr,
        WIDTH: tl.constexpr,
        ACTIVATION: tl.constexpr,
    ) -> None:
        """Add `parts` (SPLIT, tokens, out) float32 in order, then bias and activation, into y (tokens, out)."""
        across = tl.cdiv(out, WIDTH)
        program = tl.program_id(0)
        token = program // across
        at = program % across * WIDTH + tl.arange(0, WIDTH)
        place = parts + token.to(tl.int64) * out + at[None, :]
        total = tl.zeros((1, WIDTH), dtype=tl.float32)
        for _ in tl.static_range(SPLIT):
            total += tl.load(place, mask=at[None, :] < out, other=0.0)
            place += tokens.to(tl.int64) * out
        store(y, finish(total, bias, at, out, ACTIVATION), token, at, tokens, out, 1)
