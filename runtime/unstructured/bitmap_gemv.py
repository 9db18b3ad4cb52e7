"""Unstructured weights for up to eight tokens at a time: bitmap_gemv.cu, one lane a row.

Limited by memory at one token; runtime/NOTES.md has the limits by sparsity and why kept values carry distances here
where the standard layout has bits.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.formats import kept_entries
from sparsify_compiler.runtime.launch import CupyLauncher, Launcher, Program
from sparsify_compiler.runtime.launch_limits import CLUSTERS_FROM, can_cluster, missing_for, token_slices
from sparsify_compiler.runtime.rows import aligned_rows, element_defines, round_up
from sparsify_compiler.runtime.unstructured.bitmap_gemv_packing import (
    MOST_SPAN,
    PACKET,
    TILE_ROWS,
    Strands,
    span_of,
    to_strands,
)
from sparsify_compiler.runtime.variants import variant_for

_VARIANT = re.compile(r"split([1248])\.tokens([1248])")
_FULL_GPU = 132
"""Blocks that put one on every multiprocessor of a large GPU."""


@dataclass(frozen=True)
class _Cut:
    """`split` blocks a cluster share the parts of 32 rows; `tokens` at a time."""

    split: int
    tokens: int

    def __str__(self) -> str:
        return f"split{self.split}.tokens{self.tokens}"


@dataclass(frozen=True)
class BitmapGemv:
    """Any pattern, in float16 or bfloat16, with sums in float32 in a fixed order."""

    name: str = "bitmap_gemv"
    launcher: Launcher = field(default_factory=CupyLauncher)

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device or dtype it cannot run, or None."""
        return missing_for(spec, self.launcher)

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name ways to share the parts of a tile among blocks, and tokens a pass."""
        parts = _parts(-(-spec.out // TILE_ROWS), spec.in_)
        clusters = spec.capability is not None and spec.capability >= CLUSTERS_FROM
        best = _choose(parts, tokens, clusters)
        splits = [split for split in (1, 2, 4, 8) if parts % split == 0] if clusters else [1]
        others = [_Cut(split, best.tokens) for split in splits]
        others += [_Cut(best.split, passed) for passed in (1, 2, 4, 8) if passed < 2 * tokens]
        return tuple(dict.fromkeys(str(cut) for cut in (best, *others)))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return the tensors of `Strands` (runtime/unstructured/bitmap_gemv_packing.py) on `spec.device`.

        Raises:
            KernelError: as `kept_entries`.
        """
        keep, values = kept_entries(packed)
        out, in_ = packed.shape
        tiles = -(-out // TILE_ROWS)
        parts = _parts(tiles, in_)
        warps = _warps(tiles * parts, values.numel() / max(out * parts * PACKET, 1))
        made = to_strands(keep.to(spec.device), values.to(spec.device, spec.dtype), parts, warps)
        return Prepared(self.name, packed.shape, (made.packets, made.firsts, made.starts, made.rows))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        strands = Strands(*prepared.tensors)
        (out, in_), tokens, parts = prepared.shape, x.shape[0], strands.parts
        y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
        if y.numel() == 0:
            return y
        name = variant_for(prepared.variants, tokens)
        clusters = can_cluster(x.device)
        cut = _parse(name, clusters) if name else _choose(parts, tokens, clusters)
        defines = (("GAP_BITS", strands.gap_bits), ("TOKENS", cut.tokens), ("WARPS", strands.warps))
        dtype_defines = element_defines(x.dtype, activation)
        program = Program("bitmap_gemv.cu", "bitmap_gemv", (*defines, ("SPLIT", cut.split), *dtype_defines))
        span, columns = span_of(in_, parts), round_up(in_, 8)
        shared = max(span * max(4, 2 * cut.tokens), strands.warps * cut.tokens * 128)
        blocks = strands.firsts.shape[0] * cut.split
        x, bias = aligned_rows(x, columns), None if bias is None else bias.contiguous()
        for start, stop in token_slices(tokens, cut.tokens):
            grid = (blocks, -(-(stop - start) // cut.tokens), 1)
            sizes = (stop - start, out, columns, span, parts)
            arguments = (*prepared.tensors, x[start:stop], bias, y[start:stop], *sizes)
            self.launcher.launch(program, grid, strands.warps * 32, shared, arguments, x.device)
        return y


def _parts(tiles: int, in_: int) -> int:
    """Cut columns into parts of at most MOST_SPAN, and further while multiprocessors would stay idle."""
    parts = 1
    while parts < 8 and (in_ > parts * MOST_SPAN or (tiles * parts < _FULL_GPU and in_ >= parts * 1024)):
        parts *= 2
    return parts if in_ <= parts * MOST_SPAN else round_up(-(-in_ // MOST_SPAN), 8)


def _warps(blocks: int, packets: float) -> int:
    """Warps a block: about 3,000 in all, 60 KiB in flight on a multiprocessor, with two packets or more for each."""
    most = 16 if blocks < 2 * _FULL_GPU else 8 if blocks < 6 * _FULL_GPU else 4
    while most > 1 and packets < 2 * most:
        most //= 2
    return most


def _choose(parts: int, tokens: int, clusters: bool) -> _Cut:
    """A block for each part up to eight; as many tokens a pass as there are, up to eight."""
    return _Cut(min(parts, 8) if clusters else 1, next((t for t in (1, 2, 4) if tokens <= t), 8))


def _parse(name: str, clusters: bool) -> _Cut:
    match = _VARIANT.fullmatch(name)
    cut = _Cut(int(match[1]), int(match[2])) if match else None
    if cut is None or (cut.split > 1 and not clusters):
        raise KernelError(f"bitmap_gemv cannot run variant {name!r} on this device; compile the model again for it")
    return cut
