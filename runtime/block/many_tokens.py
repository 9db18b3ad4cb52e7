"""Block weights for many tokens: kept tiles against tiles of x on the tensor cores, by Triton."""

import contextlib
import importlib
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.block.bands import cut_bands, grain_mask, largest_power, merge_bands
from sparsify_compiler.runtime.launch_limits import most_shared
from sparsify_compiler.runtime.refusals import not_in, not_on, older_than
from sparsify_compiler.runtime.rows import ACTIVATION_CODES, HALF_DTYPES, aligned_rows, round_up
from sparsify_compiler.runtime.variants import variant_for

SLAB = 64
"""Columns of a step: 128 bytes, what a wgmma operand and a tensor map's row hold at most without more pieces."""
MOST_ROWS = 128
"""Rows of a band: with 256 tokens, the sums of two warpgroups fill their registers."""
LEAST_SIDE = 16
MULTIPROCESSORS = 132
"""Of an H200: the default variant is chosen for it."""
GROUP_BYTES = 8 * 2**20
"""Of x that programs in flight share: an L2 half (30 MB) holds them beside the weights."""
_NAME = re.compile(r"tokens(\d+)\.warps(\d+)\.stages(\d+)\.(ptr|tma|run\d+)\.split(\d+)")


@dataclass(frozen=True)
class _Variant:
    """How to launch: a tile's tokens, warps, stages of loads in flight, how x is read, parts of a band's steps.

    `way`: "ptr" by addresses; "tma" by tensor maps; "run4" the same with four tiles a program.
    """

    tokens: int
    warps: int
    stages: int
    way: str = "ptr"
    split: int = 1

    def __str__(self) -> str:
        return f"tokens{self.tokens}.warps{self.warps}.stages{self.stages}.{self.way}.split{self.split}"

    def shared_bytes(self, rows: int) -> int:
        """Bytes of shared memory: the stages, and for "run" the results on their way out beside them."""
        return self.stages * ((self.tokens + rows) * SLAB * 2 + 16) + (32768 if self.way.startswith("run") else 0)


@dataclass(frozen=True)
class BlockTriton:
    """Tiles whose sides are multiples of 16, float16 or bfloat16, any number of tokens.

    The prepared tensors are `Bands` of steps of 64 columns: table, columns (one more row than steps, which a kernel
    reads ahead), values (steps, rows of a band, 64). Low tiles are joined into higher bands where that costs less.
    """

    name: str = "block_triton"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say what speaks against it: device, pattern, dtype, or that Triton is missing."""
        if reason := not_on(spec, "cuda"):
            return reason
        pattern = spec.pattern
        if not isinstance(pattern, Block) or pattern.rows % LEAST_SIDE or pattern.cols % LEAST_SIDE:
            return f"runs block patterns whose sides are multiples of {LEAST_SIDE}; found {pattern}"
        if reason := not_in(spec, HALF_DTYPES) or older_than(spec, (8, 0)):
            return reason
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'sparsify-compiler[cuda]' (CUDA 13), or [cuda12]"
        return None

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name tiles, warps, stages, ways to read x and splits, the default first; all fit the GPU's shared memory."""
        assert isinstance(spec.pattern, Block)
        rows = largest_power(spec.pattern.rows, MOST_ROWS)
        maps = spec.pattern.cols % SLAB == 0 and _has_maps(spec.capability)
        bands, steps = -(-spec.out // rows), spec.density * spec.in_ / SLAB
        shared = most_shared(spec.capability)
        default = _default(tokens, bands, steps, rows, maps, shared)
        others = (variant for variant in _worth_timing(tokens, maps) if variant.shared_bytes(MOST_ROWS) <= shared)
        return tuple(dict.fromkeys(str(variant) for variant in (default, *others)))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (table, columns, values) on `spec.device`.

        Raises:
            KernelError: the packed tensors are broken.
        """
        pattern = packed.pattern
        if not isinstance(pattern, Block):
            raise KernelError(f"{self.name} needs a block pattern; found {pattern}; choose another kernel")
        height, width = largest_power(pattern.rows, MOST_ROWS), largest_power(pattern.cols, SLAB)
        kept = grain_mask(packed, height, width)
        joined = bands_to_join(kept, height)
        rows, parts = height * joined, SLAB // width
        bands = cut_bands(packed, merge_bands(kept, joined), rows, width, parts)
        values = bands.values.to(spec.dtype).transpose(1, 2).reshape(-1, rows, SLAB)
        if values.shape[0] == 0:
            values = values.new_zeros(1, rows, SLAB)  # a tensor map of nothing cannot be made
        columns = functional.pad(bands.columns, (0, 0, 0, 1))
        tensors = (bands.table, columns, values.contiguous())
        return Prepared(self.name, packed.shape, tuple(tensor.to(spec.device) for tensor in tensors))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in).

        Raises:
            KernelError: Triton cannot compile or launch the variant on this device.
        """
        y = x.new_empty(x.shape[0], prepared.shape[0])
        if y.numel() == 0:
            return y
        x = aligned_rows(x, round_up(prepared.shape[1], SLAB // prepared.tensors[1].shape[1]))
        variant = self._variant(prepared, x)
        errors = importlib.import_module("triton.errors")
        try:
            with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
                _launch(variant, prepared, x, bias, ACTIVATION_CODES[activation], y)
        except errors.TritonError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise KernelError(f"{self.name}: variant {variant} cannot run on {x.device}: {lines[0]}") from error
        return y

    def _variant(self, prepared: Prepared, x: Tensor) -> _Variant:
        """Read the tuner's choice, or make one."""
        table, columns, values = prepared.tensors
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        maps = columns.shape[1] == 1 and (not x.is_cuda or _has_maps(capability))
        name = variant_for(prepared.variants, x.shape[0])
        if not name:
            bands, steps = table.shape[0], (columns.shape[0] - 1) / max(table.shape[0], 1)
            return _default(x.shape[0], bands, steps, values.shape[1], maps, most_shared(capability))
        match = _NAME.fullmatch(name)
        if match is None or (match[4] != "ptr" and not maps):
            raise KernelError(f"{self.name}: variant {name!r} does not fit these tiles on this device; compile again")
        return _Variant(int(match[1]), int(match[2]), int(match[3]), match[4], int(match[5]))


def bands_to_join(kept: Tensor, height: int) -> int:
    """Choose how many neighbouring bands of `kept` (bands, grains) to multiply as one, up to MOST_ROWS rows.

    A step over b rows and 128 tokens reads 2 (128 + b) bytes a column through L2 and multiplies 256 b times; an H200
    does about 107 floating-point operations in the time of one byte from L2 (4.5e12 and 4.2e10 a second and
    multiprocessor). Joined bands read x less often, but multiply zeros where only one of them keeps a grain. Those
    zeros are stored too, so joining must save a fifth of the cost.
    """
    tokens, balance = 128, 107
    costs = {}
    count = 1
    while height * count <= MOST_ROWS:
        rows = height * count
        grains = int(merge_bands(kept, count).sum())
        costs[count] = grains * max(2 * (tokens + rows) * balance, 2 * tokens * rows)
        count *= 2
    best = min(costs, key=lambda count: (costs[count], count))
    return best if 5 * costs[best] <= 4 * costs[1] else 1


def _launch(variant: _Variant, prepared: Prepared, x: Tensor, bias: Tensor | None, activation: int, y: Tensor) -> None:
    """Put the kernels on the current stream."""
    kernels = importlib.import_module("sparsify_compiler.runtime.block.triton_kernels")
    table, columns, values = prepared.tensors
    (tokens, width), out, bands = x.shape, y.shape[1], table.shape[0]
    rows, parts = values.shape[1], columns.shape[1]
    tiles = -(-tokens // variant.tokens)
    options: dict[str, Any] = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    constants: dict[str, Any] = {"TOKENS": variant.tokens, "ROWS": rows, "ACTIVATION": activation}
    left, right = x, values
    if variant.way != "ptr":
        descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
        left = descriptor(x, [tokens, width], [width, 1], [variant.tokens, SLAB])
        right = descriptor(values, [values.shape[0] * rows, SLAB], [SLAB, 1], [rows, SLAB])
    if variant.way.startswith("run"):
        group = int(variant.way.removeprefix("run"))
        kernels.block_stream[(bands * -(-tiles // group),)](
            left, right, columns, table, bias, y, tokens, out, bands, group, **constants, **options
        )
        return
    group = min(tiles, max(1, GROUP_BYTES // (variant.tokens * width * 2)))
    target = y if variant.split == 1 else y.new_empty((variant.split, tokens, out), dtype=torch.float32)
    constants |= {"PARTS": parts, "SPLIT": variant.split, "DESCRIPTORS": variant.way == "tma"}
    kernels.block_product[(bands * tiles, variant.split)](
        left, right, columns, table, bias, target, tokens, width, out, bands, group, **constants, **options
    )
    if variant.split > 1:
        kernels.block_sum[(tokens * -(-out // 512),)](
            target, bias, y, tokens, out, SPLIT=variant.split, WIDTH=512, ACTIVATION=activation, num_warps=4
        )


def _has_maps(capability: tuple[int, int] | None) -> bool:
    """Whether the GPU has tensor maps, and this Triton the descriptors for them."""
    if capability is None or capability < (9, 0) or importlib.util.find_spec("triton") is None:
        return False
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def _default(tokens: int, bands: int, steps: float, rows: int, maps: bool, shared: int) -> _Variant:
    """Choose without measuring: the larger a tile, the less L2 traffic, as long as all multiprocessors have work."""
    way = "tma" if maps else "ptr"
    if tokens <= 64:
        variant = _Variant(max(LEAST_SIDE, 1 << (tokens - 1).bit_length()), 4, 4, way)
    elif tokens <= 2048:
        variant = _Variant(64 if tokens <= 512 else 128, 4 if tokens <= 512 else 8, 3, way)
    else:
        variant = _Variant(256, 8, 4 if maps else 3, way)
    while variant.shared_bytes(rows) > shared:
        small = variant.stages == 2
        variant = _Variant(
            variant.tokens // 2 if small else variant.tokens, variant.warps, 3 if small else variant.stages - 1, way
        )
    units = bands * -(-tokens // variant.tokens)
    split = 1
    while split < 8 and units * split < MULTIPROCESSORS and steps >= 4 * split:
        split *= 2
    return _Variant(variant.tokens, variant.warps, variant.stages, way, split)


def _worth_timing(tokens: int, maps: bool) -> tuple[_Variant, ...]:
    """List what may be best on a Hopper GPU: it has room for 2 to 4 blocks of small tiles, or 1 of the largest."""
    ways = ("tma", "ptr") if maps else ("ptr",)
    small = max(LEAST_SIDE, 1 << (min(tokens, 128) - 1).bit_length())
    if tokens <= 128:
        shapes = ((small, 4, 4), (max(small // 2, LEAST_SIDE), 4, 4))
        return tuple(
            _Variant(size, warps, stages, way, split)
            for split in (1, 2, 4)
            for size, warps, stages in shapes
            for way in ways
        )
    found = [_Variant(*shape, way) for shape in ((128, 8, 3), (128, 4, 3), (64, 4, 4)) for way in ways]
    if tokens > 256:
        found += [_Variant(256, 8, 4, "tma"), _Variant(256, 8, 3, "run2")] if maps else [_Variant(256, 8, 3)]
    if tokens > 1024 and maps:
        found += [_Variant(256, 8, 3, "run4"), _Variant(128, 8, 3, "run4"), _Variant(128, 4, 3, "run4")]
    if tokens <= 512:
        found += [_Variant(64, 4, 4, way, 2) for way in ways]
    return tuple(found)
