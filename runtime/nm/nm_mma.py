"""N:M weights for a few tokens on tensor cores: nm_mma.cu, which puts the zeros back in registers.

Made for 1 to 64 tokens, where reading the weight is the work; more tokens run in tiles of 64, each reading it again.
"""

import functools
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import kept_entries
from sparsify_compiler.runtime.launch import CupyLauncher, Launcher, Program
from sparsify_compiler.runtime.launch_limits import CLUSTERS_FROM, can_cluster, missing_for, most_shared
from sparsify_compiler.runtime.nm.nm_runs import CHUNK, RUN, TILE_ROWS, RunOrder, order_of, to_runs
from sparsify_compiler.runtime.refusals import not_on
from sparsify_compiler.runtime.rows import aligned_rows, element_defines, round_up
from sparsify_compiler.runtime.variants import variant_for

TABLE_BYTES = 32768
MOST_WARPS = 16
"""Warps of a block: 128 registers a thread."""
_FULL_GPU = 132
"""Multiprocessors of the GPU that the first choice is made for (H200); the tuner measures others."""
_VARIANT = re.compile(r"tiles([124])\.warps(\d+)\.chunks([1248])\.split([1248])\.stages([2-8])")


@dataclass(frozen=True)
class _Cut:
    """`tiles` of 16 rows a warp, `warps` side by side; `chunks` warps and `split` blocks share the columns."""

    tiles: int
    warps: int
    chunks: int
    split: int
    stages: int

    def __str__(self) -> str:
        return f"tiles{self.tiles}.warps{self.warps}.chunks{self.chunks}.split{self.split}.stages{self.stages}"

    def shared_bytes(self, order: RunOrder, eights: int) -> int:
        """Bytes of shared memory: the table and the stages, or the sums that overwrite both."""
        weights = self.warps * self.chunks * self.tiles * (2 * order.row_words + 2) * 128
        inputs = self.chunks * eights * 8 * 256
        sums = self.chunks * eights * 8 * (self.warps * self.tiles * TILE_ROWS + 4) * 4
        return max(TABLE_BYTES + self.stages * (weights + inputs), sums)


@dataclass(frozen=True)
class NmMma:
    """Any N:M whose groups divide 32 columns, in float16 or bfloat16, with sums in float32 in a fixed order."""

    name: str = "nm_mma"
    launcher: Launcher = field(default_factory=CupyLauncher)

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern or dtype it cannot run, or None."""
        if reason := not_on(spec, "cuda"):
            return reason
        if not isinstance(spec.pattern, NM) or RUN % spec.pattern.of:
            return f"runs N:M patterns whose groups divide {RUN} columns, as 4:8 or 16:32; found {spec.pattern}"
        return missing_for(spec, self.launcher)

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name ways to share rows and columns among warps and blocks that fit shared memory and fill the GPU."""
        order = _expected_order(spec)
        tiles, chunks, eights = -(-spec.out // TILE_ROWS), -(-spec.in_ // CHUNK), _eights(tokens)
        clusters = spec.capability is not None and spec.capability >= CLUSTERS_FROM
        room = most_shared(spec.capability or (0, 0))
        best = _choose(order, tiles, chunks, eights, clusters, room)
        cuts = [
            _fit(_Cut(held, warps, shared, split, 6), order, eights, room)
            for held in (1, 2)
            for warps, shared in ((8, 1), (7, 1), (4, 1), (4, 2))
            for split in ((1, 2, 4, 8) if clusters else (1,))
        ]
        least = _FULL_GPU // 2 if clusters else 1
        useful = [cut for cut in cuts if cut and _worth(cut, tiles, chunks, -(-tokens // (8 * eights)), least)]
        return tuple(dict.fromkeys(str(cut) for cut in (best, *useful)))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return words and masks, both int32, on `spec.device`; see runtime/nm/nm_runs.py.

        Raises:
            KernelError: as `kept_entries`.
        """
        keep, values = kept_entries(packed)
        runs = to_runs(keep.to(spec.device), values.to(spec.device, spec.dtype))
        return Prepared(self.name, packed.shape, (runs.words, runs.masks))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in).

        Raises:
            KernelError: the variant chosen for these tokens is none of this kernel's, or the launch failed.
        """
        words, masks = prepared.tensors
        (out, in_), tokens = prepared.shape, x.shape[0]
        y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
        if not tokens or not out:
            return y
        order, columns = order_of(words), round_up(in_, 8)
        tiles, chunks = words.shape[:2]
        cut, eights = _cut(prepared.variants, order, tiles, chunks, tokens, x.device)
        defines = (
            *(("GROUP", order.group), ("COUNT", order.count), ("TILES", cut.tiles), ("WARPS", cut.warps)),
            *(("CHUNK_WARPS", cut.chunks), ("SPLIT", cut.split), ("STAGES", cut.stages), ("EIGHTS", eights)),
        )
        program = Program("nm_mma.cu", "nm_mma", (*defines, *element_defines(x.dtype, activation)))
        x = aligned_rows(x, columns)
        token_tiles, row_blocks = -(-tokens // (eights * 8)), -(-tiles // (cut.warps * cut.tiles))
        grid = (row_blocks * token_tiles, cut.split, 1)
        arguments = (words, masks, x, bias, y, tiles, chunks, tokens, out, columns, token_tiles)
        threads, shared = cut.warps * cut.chunks * 32, cut.shared_bytes(order, eights)
        self.launcher.launch(program, grid, threads, shared, arguments, x.device)
        return y


def _eights(tokens: int) -> int:
    """Eights of tokens a block takes: 1, 2, 4 or 8."""
    return next((eights for eights in (1, 2, 4) if tokens <= 8 * eights), 8)


def _expected_order(spec: MatmulSpec) -> RunOrder:
    """Guess the order from the pattern, for sizes: the smallest group that holds an even count."""
    assert isinstance(spec.pattern, NM)
    for group in (8, 16, 32):
        count = spec.pattern.keep * group // spec.pattern.of
        if group % spec.pattern.of == 0 and count % 2 == 0:
            return RunOrder(group, count)
    return RunOrder(32, spec.pattern.keep + 1)


def _choose(order: RunOrder, tiles: int, chunks: int, eights: int, clusters: bool, room: int) -> _Cut:
    """Two blocks a multiprocessor where they fit; with clusters the columns are shared until all places are taken.

    Where reads of x from shared memory weigh much (more tokens, fewer weights) a warp takes two tiles, which halves
    them, and a block four warps. Without clusters, warps of a block share the columns.
    """
    half = room // 2 - 1024  # two blocks a multiprocessor, each with 1 KiB the driver takes
    wanted = (2, 8, 1, room) if eights == 8 else (2, 4, 1, half)
    if eights == 1 and order.count > 0.38 * order.group:
        wanted = (1, 8, 1, half)
    smaller: tuple[tuple[int, int, int, int], ...] = ((1, 4, 1, room), (1, 2, 1, room))
    if not clusters:
        wanted, smaller = (2 if eights > 2 else 1, 2, 4, room), ((1, 4, 2, room), (1, 2, 2, room), *smaller)
    for held, warps, shared, most in (wanted, *smaller):
        blocks, split = -(-tiles // (held * warps)), 1
        places = _FULL_GPU * (2 if most == half else 1)
        while clusters and split < 8 and 2 * split * blocks <= places and 4 * split * shared <= chunks:
            split *= 2
        if cut := _fit(_Cut(held, warps, shared, split, 6), order, eights, most):
            return cut
    return _Cut(1, 2, 1, 1, 2)  # 81 KiB at 64 tokens and full groups


def _fit(cut: _Cut, order: RunOrder, eights: int, room: int, least: int = 3) -> _Cut | None:
    """Return `cut` with as many of its stages as fit `room` bytes, `least` of them; None where they do not."""
    for stages in range(cut.stages, least - 1, -1):
        fewer = _Cut(cut.tiles, cut.warps, cut.chunks, cut.split, stages)
        if fewer.shared_bytes(order, eights) <= room:
            return fewer
    return None


def _worth(cut: _Cut, tiles: int, chunks: int, token_tiles: int, least: int) -> bool:
    """Whether a cut leaves every warp a chunk and starts `least` blocks to four a multiprocessor."""
    blocks = -(-tiles // (cut.tiles * cut.warps)) * cut.split
    return cut.split * cut.chunks <= chunks and least <= blocks * token_tiles and blocks <= 4 * _FULL_GPU


@functools.lru_cache(maxsize=4096)
def _cut(
    variants: str, order: RunOrder, tiles: int, chunks: int, tokens: int, device: torch.device
) -> tuple[_Cut, int]:
    """Return the variant measured best for `tokens`, or the kernel's own choice, and the eights of tokens of a block.

    A variant measured for fewer tokens may leave no room for as many as could be taken; then it takes fewer.
    """
    clusters, name = can_cluster(device), variant_for(variants, tokens)
    room = most_shared(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    eights = _eights(tokens)
    if not name:
        return _choose(order, tiles, chunks, eights, clusters, room), eights
    match = _VARIANT.fullmatch(name)
    cut = _Cut(*(int(number) for number in match.groups())) if match else None
    if cut and (clusters or cut.split == 1) and cut.warps * cut.chunks <= MOST_WARPS:
        while eights:
            if fitting := _fit(cut, order, eights, room, least=2):
                return fitting, eights
            eights //= 2
    raise KernelError(f"nm_mma cannot run variant {name!r} on this device; compile the model again for it")
