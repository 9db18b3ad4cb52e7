"""N:M weights for up to eight tokens at a time: nm_gemv.cu, one lane a row.

Limited by memory up to two tokens at 50 % and four at 75 %; runtime/NOTES.md has the arithmetic.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import kept_entries
from sparsify_compiler.runtime.launch import CupyLauncher, Launcher, Program
from sparsify_compiler.runtime.launch_limits import CLUSTERS_FROM, can_cluster, missing_for, token_slices
from sparsify_compiler.runtime.nm.nm_gemv_packing import GROUP, TILE_ROWS, kept_of_group, to_lane_order
from sparsify_compiler.runtime.refusals import not_on
from sparsify_compiler.runtime.rows import aligned_rows, element_defines, round_up
from sparsify_compiler.runtime.variants import variant_for

_VARIANT = re.compile(r"warps(4|8|16)\.split([1248])\.tokens([1248])")
_FULL_GPU = 2048
"""Warps that keep a large GPU's memory busy: 132 multiprocessors with 16 each, 72 KiB in flight on every one."""


@dataclass(frozen=True)
class _Cut:
    """`warps` a block and `split` blocks a cluster share the columns of 32 rows; `tokens` at a time."""

    warps: int
    split: int
    tokens: int

    def __str__(self) -> str:
        return f"warps{self.warps}.split{self.split}.tokens{self.tokens}"


@dataclass(frozen=True)
class NmGemv:
    """Any N:M whose groups divide 32 columns, in float16 or bfloat16, with sums in float32 in a fixed order."""

    name: str = "nm_gemv"
    launcher: Launcher = field(default_factory=CupyLauncher)

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern or dtype it cannot run, or None."""
        if reason := not_on(spec, "cuda"):
            return reason
        if not isinstance(spec.pattern, NM) or GROUP % spec.pattern.of:
            return f"runs N:M patterns whose groups divide {GROUP} columns, as 2:4 or 16:32; found {spec.pattern}"
        return missing_for(spec, self.launcher)

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name ways to share the columns of 32 rows among warps and blocks, and tokens a pass."""
        chunks, tiles = -(-spec.in_ // 128), -(-spec.out // TILE_ROWS)
        clusters = spec.capability is not None and spec.capability >= CLUSTERS_FROM
        best = _choose(tiles, chunks, tokens, clusters)
        splits = (1, 2, 4, 8) if clusters else (1,)
        others = [_Cut(warps, split, best.tokens) for warps in (4, 8, 16) for split in splits]
        others += [_Cut(best.warps, best.split, passed) for passed in (1, 2, 4, 8) if passed < 2 * tokens]
        # A warp needs a chunk of its own, and no GPU gains from eight times as many warps as fill it.
        useful = [cut for cut in others if cut.warps * cut.split <= chunks and _near(tiles * cut.warps * cut.split)]
        return tuple(dict.fromkeys(str(cut) for cut in (best, *useful)))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return one int32 tensor on `spec.device`; see runtime/nm/nm_gemv_packing.py.

        Raises:
            KernelError: as `kept_entries`.
        """
        keep, values = kept_entries(packed)
        words = to_lane_order(keep.to(spec.device), values.to(spec.device, spec.dtype))
        return Prepared(self.name, packed.shape, (words,))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        (words,) = prepared.tensors
        (out, in_), tokens = prepared.shape, x.shape[0]
        y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
        if not tokens or not out:
            return y
        tiles, chunks = words.shape[:2]
        kept = kept_of_group(words)
        name = variant_for(prepared.variants, tokens)
        clusters = can_cluster(x.device)
        cut = _parse(name, clusters) if name else _choose(tiles, chunks, tokens, clusters)
        defines = (("KEPT", kept), ("TOKENS", cut.tokens), ("WARPS", cut.warps), ("SPLIT", cut.split))
        program = Program("nm_gemv.cu", "nm_gemv", (*defines, *element_defines(x.dtype, activation)))
        shared = cut.warps * max(512 * max(1, cut.tokens // 2), 128 * cut.tokens)
        columns = round_up(in_, 8)
        x, bias = aligned_rows(x, columns), None if bias is None else bias.contiguous()
        for start, stop in token_slices(tokens, cut.tokens):
            grid = (tiles * cut.split, -(-(stop - start) // cut.tokens), 1)
            arguments = (words, x[start:stop], bias, y[start:stop], stop - start, out, columns, chunks)
            self.launcher.launch(program, grid, cut.warps * 32, shared, arguments, x.device)
        return y


def _choose(tiles: int, chunks: int, tokens: int, clusters: bool) -> _Cut:
    """Warps, then blocks of a cluster, until the GPU is full or a warp has one chunk; all tokens at once up to 8."""
    passed = next((count for count in (1, 2, 4) if tokens <= count), 8)
    warps, split = 4, 1
    for more_warps, more_split in ((8, 1), (8, 2), (8, 4), (16, 4), (16, 8)):
        if tiles * warps * split >= _FULL_GPU or more_warps * more_split > chunks or (more_split > 1 and not clusters):
            break
        warps, split = more_warps, more_split
    return _Cut(warps, split, passed)


def _near(warps: int) -> bool:
    return _FULL_GPU // 4 <= warps <= 4 * _FULL_GPU


def _parse(name: str, clusters: bool) -> _Cut:
    match = _VARIANT.fullmatch(name)
    cut = _Cut(*(int(number) for number in match.groups())) if match else None
    if cut is None or (cut.split > 1 and not clusters):
        raise KernelError(f"nm_gemv cannot run variant {name!r} on this device; compile the model again for it")
    return cut
