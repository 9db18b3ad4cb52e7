"""The shapes of block that the 2:4 kernel of runtime/cuda/nm24.cu can be built in, and which to try first.

The order follows a prediction in processor cycles: the longest of reading the weights from memory, moving weights and x
through L2, moving them through shared memory, and multiplying, each over all processors; stretched where too few bytes
are in flight or the blocks do not fill the processors evenly; plus a fixed cost for each round of blocks. The tuner
measures, so a wrong prediction costs only when nothing was tuned.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.launch_limits import most_shared
from sparsify_compiler.runtime.nm.fragments import RECORD_BYTES
from sparsify_compiler.runtime.rows import round_up

MOST_VARIANTS = 20
HOPELESS = 1.5
MOST_TOKENS = 64  # of one block
DIRECT_TOKENS = 16
TOKEN_TILES = (8, 16, 32, 64)
SUMS_PADDING = 4  # floats: PITCH in nm24.cu
REGISTERS = 65536  # of a processor
HOPPER = (9, 0)

_NAME = re.compile(r"(direct|staged)\.rows(\d+)\.warps(\d+)\.stages(\d+)\.k(\d+)\.tokens(\d+)\.cluster(\d+)")


@dataclass(frozen=True)
class Variant:
    """One way to build the kernel; nm24.cu explains the two kinds.

    A warp has `tiles` row tiles of 16, a block `tokens` tokens, a stage 64 * `steps` columns; `cluster` blocks share
    the columns.
    """

    kind: Literal["direct", "staged"]
    tiles: int
    warps: int
    stages: int
    steps: int
    tokens: int
    cluster: int

    @property
    def name(self) -> str:
        """As in `Prepared.variants`: direct.rows32.warps8.stages3.k64.tokens8.cluster2, rows being those of a warp."""
        return (
            f"{self.kind}.rows{16 * self.tiles}.warps{self.warps}.stages{self.stages}.k{64 * self.steps}"
            f".tokens{self.tokens}.cluster{self.cluster}"
        )

    @property
    def rows(self) -> int:
        """Rows of the weight in a block."""
        return 16 * self.tiles * (self.warps if self.kind == "staged" else 1)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: stages or rings, and later the sums in their place."""
        x_bytes, pitch = self.tokens * 128, 4 * (self.rows + SUMS_PADDING)
        if self.kind == "direct":
            return self.warps * self.tokens * max(self.stages * 128, pitch)
        stage = self.steps * (self.warps * self.tiles * RECORD_BYTES + x_bytes)
        return max(self.stages * stage, self.tokens * pitch)

    @property
    def registers(self) -> int:
        """About how many a thread needs: sums, weights in flight, addresses; nvcc 13 takes from 50 less to 35 more."""
        sums, weights = self.tiles * self.tokens // 2, self.tiles * 9
        return sums + weights * (self.stages if self.kind == "direct" else 1) + (80 if self.tokens > 8 else 70)

    @property
    def blocks(self) -> int:
        """How many blocks fit one processor, at most 4: what the compiler is asked to keep room for."""
        by_registers = REGISTERS // (round_up(self.registers, 8) * self.threads)
        return max(1, min(4, by_registers, most_shared(HOPPER) // (self.shared_bytes + 1024)))


def variants_for(out: int, in_: int, tokens: int, capability: tuple[int, int]) -> tuple[Variant, ...]:
    """Return at most `MOST_VARIANTS` for an (out, in) weight and `tokens` rows, the predicted fastest first.

    Variants that differ only in their stages are one family. The best of every family come first, then the second best,
    so that those worth timing are not all alike; none is predicted to take more than `HOPELESS` times the best.
    """
    cycles = {v: _cycles(v, out, in_, tokens, capability) for v in _candidates(tokens, capability)}
    ordered = sorted(cycles, key=lambda v: (cycles[v], v.name))
    places: dict[Variant, int] = {}
    seen: Counter[tuple[str, int, int, int]] = Counter()
    for v in ordered:
        family = (v.kind, v.tiles, v.warps, v.cluster)
        places[v] = seen[family]
        seen[family] += 1
    worth = [v for v in ordered if cycles[v] <= HOPELESS * cycles[ordered[0]]]
    return tuple(sorted(worth, key=lambda v: places[v])[:MOST_VARIANTS])


@functools.lru_cache(maxsize=4096)
def first_variant(out: int, in_: int, tokens: int, capability: tuple[int, int]) -> Variant:
    """Return the predicted fastest; counts that share a tile of tokens share it, so that few programs are built."""
    tile = next((size for size in TOKEN_TILES if tokens <= size), round_up(tokens, MOST_TOKENS))
    return variants_for(out, in_, tile, capability)[0]


@functools.lru_cache(maxsize=1024)
def variant_named(name: str) -> Variant:
    """Return the variant that `Variant.name` wrote.

    Raises:
        KernelError: no such variant can be built.
    """
    match = _NAME.fullmatch(name)
    if match is not None:
        rows, warps, stages, columns, tokens, cluster = (int(word) for word in match.groups()[1:])
        kind: Literal["direct", "staged"] = "direct" if match[1] == "direct" else "staged"
        variant = Variant(kind, rows // 16, warps, stages, columns // 64, tokens, cluster)
        sound = variant.name == name and min(variant.tiles, warps, variant.steps, tokens, cluster) > 0
        if sound and variant.tiles <= 4 and stages >= 2 and tokens % 8 == 0 and warps <= 32 and cluster <= 8:
            return variant
    raise KernelError(f"2:4 kernel variant {name!r} cannot be built by this version; tune or compile the model again")


def _candidates(tokens: int, capability: tuple[int, int]) -> Iterator[Variant]:
    clusters = (1, 2, 4, 8) if capability >= HOPPER else (1,)
    tile = next((size for size in TOKEN_TILES if tokens <= size), MOST_TOKENS)
    limit = most_shared(capability)
    found: list[Variant] = []
    if tile <= DIRECT_TOKENS:
        shapes = product((1, 2, 4), (4, 8, 16), (2, 3, 4), clusters)
        found += [Variant("direct", *shape[:3], 1, tile, shape[3]) for shape in shapes]
    if tokens > 4:
        staged = product((1, 2, 4), (4, 8), (3, 4, 6), (1, 2), clusters)
        found += [Variant("staged", *shape[:4], tile, shape[4]) for shape in staged]
    for variant in found:
        fits = variant.registers <= min(255, REGISTERS // variant.threads) and variant.shared_bytes <= limit
        if fits:
            yield variant


def _cycles(v: Variant, out: int, in_: int, tokens: int, capability: tuple[int, int]) -> float:
    """Predict the cycles of a call; the rates are those of an H200 (NOTES.md), or near enough an A100's."""
    processors = 132 if capability >= HOPPER else 108
    if v.cluster > 2:  # a cluster lies in one group of 16 or 18 processors, which fours and eights may not fill
        processors -= 4
    row_blocks, token_blocks, steps = -(-out // v.rows), -(-tokens // v.tokens), -(-in_ // 64)
    block_tiles = v.rows // 16
    weights = row_blocks * block_tiles * steps * RECORD_BYTES
    x_bytes = row_blocks * min(tokens, v.tokens * token_blocks) * steps * 128
    wavefronts = 18 * block_tiles + v.tokens * (v.warps + 1) if v.kind == "staged" else 9 * block_tiles + 4 * v.tokens
    memory = weights / 17.3  # bytes a cycle and processor: 4.0 TB/s
    cache = (weights * token_blocks + x_bytes) / 24.0  # 5.5 TB/s
    shared = wavefronts * row_blocks * token_blocks * steps
    tensor = row_blocks * block_tiles * token_blocks * steps * v.tokens / 8 * 2 * 1.6
    blocks = row_blocks * token_blocks * v.cluster
    here = min(v.blocks, -(-blocks // processors))
    steps_ahead = v.stages * v.warps * v.tiles if v.kind == "direct" else (v.stages - 1) * v.steps * block_tiles
    in_flight = here * steps_ahead * RECORD_BYTES
    rounds = -(-blocks // (processors * v.blocks))
    uneven = -(-blocks // processors) * processors / blocks
    stretch = (max(1.0, 56e3 / in_flight) + 1e3 / in_flight) * (0.5 + 0.5 * uneven)
    reduction = 800 * (v.cluster > 1) + v.rows * v.tokens / v.threads * (2 if v.kind == "staged" else v.warps / 2)
    return max(memory, cache, 1.3 * shared, 1.3 * tensor) / processors * stretch + rounds * 1500 + reduction
