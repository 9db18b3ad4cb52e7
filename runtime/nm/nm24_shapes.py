"""The shapes that the sparse warpgroup kernels can be compiled for, and which of them should suit a product.

Two kernels (runtime/cuda). "few" (nm24_wgmma.cu) shares the columns out over a cluster and stages x itself. "many" and
"direct" (nm24_wgmma_many.cu) read x once for a cluster of row blocks, from tiles that tile_tokens.cu has made; "direct"
takes the weights past shared memory. The times are predictions from the limits named at `predicted_us`, to order the
shapes; the tuner measures.
"""

import functools
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.nm.fragments import RECORD_BYTES
from sparsify_compiler.runtime.rows import round_up

SHARED_BYTES = 227 * 1024
MOST_STAGES = 8
EACH_WAY = 4
WORSE = 1.7
MOST_SUMS, MOST_HELD = 128, 208
"""Registers of a thread that may hold sums, and sums and weights: beyond, the compiler spills."""

FRAGMENT_REGISTERS = 9

TOKEN_TILES = (8, 16, 32, 64, 128, 256)
ROW_TILES = (64, 128, 256, 512)
SPLITS = (1, 2, 4, 8)
CLUSTERS = (1, 2, 4)

# An H200: what shared/kernels measured of its memory, and assumed for the rest (NOTES.md, "Sparse warpgroup products").
MULTIPROCESSORS = 132
MEMORY_BYTES_PER_US = 4.0e6
CACHE_BYTES_PER_US = 5.5e6
CLOCKS_PER_US = 1750
SHARED_BYTES_PER_CLOCK = 128
LEAST_CLOCKS_PER_CHUNK = 300
LAUNCH_US = 2.5

Way = Literal["few", "many", "direct"]

_NAME = re.compile(r"(few|many|direct)\.r(\d+)\.t(\d+)\.s(\d+)(?:\.c(\d+))?")


@dataclass(frozen=True)
class Shape:
    """`rows` x `tokens` a block; `split` blocks share the columns out, and `cluster` read x together (1 for "few")."""

    way: Way
    rows: int
    tokens: int
    split: int
    cluster: int = 1

    @property
    def name(self) -> str:
        """The variant's name, as `read_shape` reads it."""
        cluster = f".c{self.cluster}" if self.many else ""
        return f"{self.way}.r{self.rows}.t{self.tokens}.s{self.split}{cluster}"

    @property
    def many(self) -> bool:
        """Whether x comes in tiles, once for a cluster."""
        return self.way != "few"

    @property
    def warpgroups(self) -> int:
        """Warpgroups that multiply."""
        return 1 if self.rows == 64 else 2

    @property
    def tiles(self) -> int:
        """Products of 64 rows that each warpgroup does a step."""
        return self.rows // (64 * self.warpgroups)

    @property
    def threads(self) -> int:
        """Threads a block: one more warpgroup where it only copies."""
        return 128 * (self.warpgroups + int(self.many))

    @property
    def slot_bytes(self) -> int:
        """Shared memory of 64 columns: of x, then of the weights."""
        return round_up(self.tokens * 128 + self._staged, 1024)

    @property
    def stages(self) -> int:
        """Slots that fit in shared memory, up to MOST_STAGES."""
        return min(MOST_STAGES, (SHARED_BYTES - self._reserved) // self.slot_bytes)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the slots, later the sums, and the barriers before them."""
        return self._reserved + max(self.stages * self.slot_bytes, self.tokens * (self.rows + 4) * 4)

    @property
    def _staged(self) -> int:
        return 0 if self.way == "direct" else self.rows // 16 * RECORD_BYTES

    @property
    def _reserved(self) -> int:
        return 1024 if self.many else 0

    @property
    def possible(self) -> bool:
        """Whether registers and shared memory suffice."""
        sums, sets = self.tiles * self.tokens // 2, 3 if self.way == "direct" else 2
        most = MOST_SUMS if self.threads >= 256 else MOST_SUMS // 2  # 128 threads have as many copies each to address
        fits = sums <= most and sums + sets * FRAGMENT_REGISTERS * self.tiles <= MOST_HELD
        return fits and self.stages >= 3 and self.split * self.cluster <= 8 and (not self.many or self.tokens >= 32)

    def grid(self, out: int, tokens: int) -> tuple[int, int, int]:
        """Return the blocks along each axis."""
        token_tiles, tall = -(-tokens // self.tokens), self.rows * self.cluster
        if self.many:
            return self.cluster * -(-out // tall) * token_tiles, self.split, 1
        return self.split * -(-out // tall) * token_tiles, 1, 1

    def defines(self) -> tuple[tuple[str, int], ...]:
        """Return what the sources are compiled with, beside the dtype and the activation."""
        sizes = (("WARPGROUPS", self.warpgroups), ("TILES", self.tiles), ("TOKENS", self.tokens))
        ring = (("STAGES", self.stages), ("SPLIT", self.split))
        shared = (("CLUSTER", self.cluster), ("DIRECT", int(self.way == "direct")))
        return (*sizes, *ring, *shared) if self.many else (*sizes, *ring)

    def predicted_us(self, out: int, in_: int, tokens: int) -> float:
        """Return the time that the tightest limit allows: memory, L2, or shared memory with the launch's own cost.

        64 columns of a block go to shared memory once, the weights (but of "direct") are read from it once and x once
        for every 64 rows, at 128 bytes a clock; that is more than the tensor cores alone would take.
        """
        chunks = -(-in_ // 64)
        token_tiles, row_tiles = -(-tokens // self.tokens), -(-out // self.rows)
        weights, x = row_tiles * self.rows // 16 * chunks * RECORD_BYTES, token_tiles * self.tokens * chunks * 128
        memory = (out // 16 * chunks * RECORD_BYTES + 2 * tokens * (in_ + out)) / MEMORY_BYTES_PER_US
        cache = (token_tiles * weights + row_tiles * x / self.cluster) / CACHE_BYTES_PER_US
        moved = self.tokens * 128 * (1 + self.rows // 64) + 2 * self._staged
        clocks = max(moved / SHARED_BYTES_PER_CLOCK, LEAST_CLOCKS_PER_CHUNK)
        grid = self.grid(out, tokens)
        rounds = -(-grid[0] * grid[1] // MULTIPROCESSORS)
        sums = 2 * self.rows * self.tokens * 4 / SHARED_BYTES_PER_CLOCK * (1 if self.split == 1 else 2)
        busy = rounds * (-(-chunks // self.split) * clocks + sums) / CLOCKS_PER_US
        tiling = (LAUNCH_US + 2 * x / MEMORY_BYTES_PER_US) if self.many else 0.0
        return LAUNCH_US + tiling + max(memory, cache, busy)


@functools.lru_cache(maxsize=1024)
def read_shape(name: str) -> Shape:
    """Read a variant's name.

    Raises:
        KernelError: it names no shape that can be compiled.
    """
    if match := _NAME.fullmatch(name):
        shape = Shape(cast(Way, match[1]), int(match[2]), int(match[3]), int(match[4]), int(match[5] or 1))
        sides = shape.rows in ROW_TILES and shape.tokens in TOKEN_TILES
        known = sides and shape.split in SPLITS and shape.cluster in CLUSTERS
        if known and shape.name == name and shape.possible:
            return shape
    raise KernelError(
        f"nm24_wgmma has no variant {name!r}; one is few.r<rows>.t<tokens>.s<split>, "
        f"many.r<rows>.t<tokens>.s<split>.c<cluster> or direct.(the same); tune the layer again"
    )


@functools.lru_cache(maxsize=4096)
def shapes_for(out: int, in_: int, tokens: int) -> tuple[Shape, ...]:
    """Return the shapes worth timing for `tokens` rows of x, that with the least predicted time first.

    Of each way at most EACH_WAY, none that should take WORSE times as long as the best: the predictions are rough.
    """
    chunks = -(-in_ // 64)
    shapes = [
        Shape(way, rows, tile, split, cluster)
        for way in get_args(Way)
        for rows in ROW_TILES
        for tile in TOKEN_TILES
        for split in SPLITS
        for cluster in ((1,) if way == "few" else CLUSTERS)
        if tile < 2 * max(tokens, 8)  # at most half of the last tile is padding
        and split <= max(1, chunks // 4)
    ]
    timed = [(shape.predicted_us(out, in_, tokens), shape) for shape in shapes if shape.possible]
    timed.sort(key=lambda pair: pair[0])
    kept: list[Shape] = []
    for time_us, shape in timed:
        if time_us <= WORSE * timed[0][0] and sum(shape.way == other.way for other in kept) < EACH_WAY:
            kept.append(shape)
    return tuple(kept)
