"""Block weights for 1 to 32 tokens: kept tiles straight into the tensor cores, by runtime/cuda/block_decode.cu."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.block.bands import cut_bands, grain_mask, largest_power
from sparsify_compiler.runtime.launch import CupyLauncher, Launcher, Program
from sparsify_compiler.runtime.launch_limits import missing_for
from sparsify_compiler.runtime.refusals import not_on
from sparsify_compiler.runtime.rows import aligned_rows, element_defines, round_up
from sparsify_compiler.runtime.variants import variant_for

STEP = 32
"""Columns of a tile row that a warp multiplies at once."""
BAND = 8
"""Rows of the weight in one tensor-core instruction."""
MULTIPROCESSORS = 132
"""Of an H200: the default variant is chosen for it."""
_NAME = re.compile(r"rows(\d+)\.warps(\d+)\.split(\d+)\.steps(\d+)")


@dataclass(frozen=True)
class _Variant:
    """A block's rows (8 to 64) and warps, how many blocks of a cluster share its work, the steps a warp loads ahead."""

    rows: int
    warps: int
    split: int
    steps: int

    def __str__(self) -> str:
        return f"rows{self.rows}.warps{self.warps}.split{self.split}.steps{self.steps}"


@dataclass(frozen=True)
class BlockDecode:
    """Tiles whose sides are multiples of 8, float16 or bfloat16; made for few tokens, right for any number.

    The prepared tensors are `Bands` of the tile's own rows: table, columns and values, the values of a step and eight
    rows in the order of the lanes that read them.
    """

    name: str = "block_decode"
    launcher: Launcher = field(default_factory=CupyLauncher)

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say what speaks against it: device, pattern, dtype, or what is missing to compile for it."""
        if reason := not_on(spec, "cuda"):
            return reason
        if not isinstance(spec.pattern, Block) or spec.pattern.rows % BAND or spec.pattern.cols % BAND:
            return f"runs block patterns whose sides are multiples of {BAND}; found {spec.pattern}"
        return missing_for(spec, self.launcher)

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name block heights, warps, clusters and steps ahead, the default for this density first."""
        assert isinstance(spec.pattern, Block)
        tile_rows = -(-spec.out // spec.pattern.rows)
        steps = max(1.0, spec.density * spec.in_ / STEP)  # of a tile row, on average
        clusters = spec.capability is not None and spec.capability >= (9, 0)
        chosen = _default(spec.pattern.rows, tile_rows, steps, clusters)
        found = [chosen]
        for rows in _heights(spec.pattern.rows)[:2]:
            for warps, split, ahead in ((8, 1, 2), (4, 1, 4), (8, 2, 2), (8, 4, 2)):
                if split == 1 or (clusters and steps >= warps * split):
                    found.append(_Variant(rows, warps, split, ahead))
        return tuple(dict.fromkeys(str(variant) for variant in found))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (table, columns, values) on `spec.device`.

        Raises:
            KernelError: the packed tensors are broken.
        """
        pattern = packed.pattern
        if not isinstance(pattern, Block):
            raise KernelError(f"{self.name} needs a block pattern; found {pattern}; choose another kernel")
        width = largest_power(pattern.cols, STEP)
        bands = cut_bands(packed, grain_mask(packed, pattern.rows, width), pattern.rows, width, STEP // width)
        values = lane_order(bands.values.to(spec.dtype))
        tensors = (bands.table, bands.columns, values)
        return Prepared(self.name, packed.shape, tuple(tensor.to(spec.device) for tensor in tensors))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        table, columns, values = prepared.tensors
        out, in_ = prepared.shape
        tokens = x.shape[0]
        y = x.new_empty(tokens, out)
        if y.numel() == 0:
            return y
        tile_rows, parts, rows = table.shape[0], columns.shape[1], values.shape[1] * BAND
        x = aligned_rows(x, round_up(in_, STEP // parts))
        variant = self._variant(prepared, tokens, rows, x.device)
        tile = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
        defines = (
            *element_defines(x.dtype, activation),
            *(("ROWS", rows), ("BANDS", variant.rows // BAND), ("PARTS", parts), ("TOKENS", tile)),
            *(("WARPS", variant.warps), ("SPLIT", variant.split), ("UNROLL", variant.steps)),
        )
        blocks = -(-tokens // tile) * tile_rows * (rows // variant.rows) * variant.split
        pitch = BAND if variant.rows == BAND else variant.rows + BAND  # PITCH of the source
        self.launcher.launch(
            Program("block_decode.cu", "block_decode", defines),
            (blocks, 1, 1),
            variant.warps * 32,
            variant.warps * tile * pitch * 4,
            (values, table, columns, x, bias, y, tile_rows, x.shape[1], out, tokens),
            x.device,
        )
        return y

    def _variant(self, prepared: Prepared, tokens: int, rows: int, device: torch.device) -> _Variant:
        """Read the tuner's choice, or make one; a choice made for clusters is refused by GPUs without them."""
        clusters = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
        name = variant_for(prepared.variants, tokens)
        if not name:
            tile_rows, steps = prepared.tensors[0].shape[0], prepared.tensors[1].shape[0]
            return _default(rows, tile_rows, steps / max(tile_rows, 1), clusters)
        match = _NAME.fullmatch(name)
        variant = _Variant(*(int(number) for number in match.groups())) if match else None
        if variant is None or variant.rows not in _heights(rows) or (variant.split > 1 and not clusters):
            raise KernelError(
                f"{self.name}: variant {name!r} does not fit tiles of {rows} rows on this device; compile again"
            )
        return variant


def lane_order(values: Tensor) -> Tensor:
    """Bring `Bands.values` (steps, grains, rows, width) to (steps, rows / 8, 32 lanes, 8).

    Lane 4 q + c holds of row q the columns 8 c / grains and following of every grain, 8 in all.
    """
    steps, grains, rows, width = values.shape
    split = values.reshape(steps, grains, rows // BAND, BAND, 4, width // 4)
    return split.permute(0, 2, 3, 4, 1, 5).reshape(steps, rows // BAND, 32, 8).contiguous()


def _heights(rows: int) -> list[int]:
    """List the rows a block may take of a tile row, from 32 down, then 64."""
    return [height for height in (32, 16, 64, 8) if rows % height == 0]


def _default(rows: int, tile_rows: int, steps: float, clusters: bool) -> _Variant:
    """Choose for a memory-bound product: about 4 KiB in flight a warp, at least three blocks for two multiprocessors.

    Tall blocks read x less often, so the tallest height that still gives as many blocks; where none does, 16 rows, and
    the cluster grows while every warp keeps two steps.
    """
    heights = sorted((height for height in _heights(rows) if height <= 32), reverse=True)
    wanted = 3 * MULTIPROCESSORS // 2
    height = next((h for h in heights if tile_rows * (rows // h) >= wanted), min(heights, key=lambda h: abs(h - 16)))
    warps = 8 if steps >= 8 else 4
    split = 1
    while clusters and split < 8 and tile_rows * (rows // height) * split < wanted and steps >= 4 * warps * split:
        split *= 2
    return _Variant(height, warps, split, 2 if height > 16 else 4)
