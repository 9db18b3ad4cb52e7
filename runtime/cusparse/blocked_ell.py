"""Square tiles with equally many in every row of tiles (Blocked-ELL) through cuSPARSE, on tensor cores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.cusparse.bsr import kept_tiles
from sparsify_compiler.runtime.cusparse.library import BASE_ZERO, DATA_TYPES, INDEX_32I, Calls, SpMM
from sparsify_compiler.runtime.cusparse.plans import InstalledLibrary, Library
from sparsify_compiler.runtime.cusparse.product import Choice, apply, refusal
from sparsify_compiler.runtime.refusals import not_on

NEEDS: Mapping[torch.dtype, tuple[int, int]] = {torch.float16: (7, 0), torch.bfloat16: (8, 0), torch.float32: (8, 0)}
"""Compute capability by dtype, from NVIDIA's table of the format."""

BLOCKS = (8, 16, 32, 64, 128)
"""Tile sides: NVIDIA names powers of two as the fast ones."""

OWN = Choice(f"alg{SpMM.BLOCKED_ELL:d}.cols", f"alg{SpMM.BLOCKED_ELL:d}.cols")


@dataclass(frozen=True)
class BlockedEllMatrix:
    """W in Blocked-ELL: `width` tiles for each of `tiles[0]` rows of tiles, out of `tiles[1]` columns of tiles.

    The tensors are tile columns (tile rows, width) int32, -1 where there is none, and values (tile rows, block,
    width, block): each row of W beside the next, its tiles side by side.
    """

    tiles: tuple[int, int]
    block: int
    width: int

    @property
    def analysed(self) -> bool:
        """False: the format has nothing to find."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, padded to whole tiles."""
        return self.tiles[0] * self.block, self.tiles[1] * self.block

    def create(self, calls: Calls, tensors: Sequence[Tensor]) -> int:
        """Return the descriptor."""
        columns, values = tensors
        sizes = (*self.shape, self.block, self.width * self.block)
        kinds = (INDEX_32I, BASE_ZERO, DATA_TYPES[values.dtype])
        return calls.create("cusparseCreateBlockedEll", *sizes, columns.data_ptr(), values.data_ptr(), *kinds)


@dataclass(frozen=True)
class CusparseBlockedEll:
    """Blocked-ELL by SpMM. Rows of tiles are padded to the longest, at most to `most_padding` times the kept tiles."""

    name: str = "cusparse_blocked_ell"
    library: Library = field(default_factory=InstalledLibrary)
    most_padding: float = 2.0

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern, dtype, size or missing library is in the way, or None."""
        if reason := not_on(spec, "cuda"):
            return reason
        pattern = spec.pattern
        if not isinstance(pattern, Block) or pattern.rows != pattern.cols or pattern.rows not in BLOCKS:
            return f"runs square blocks of {', '.join(map(str, BLOCKS))}; found {pattern}"
        return refusal(spec, self.library, NEEDS)

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the one algorithm in every order of the dense operands."""
        return (OWN.more, f"alg{SpMM.BLOCKED_ELL:d}.rows", f"alg{SpMM.BLOCKED_ELL:d}.mixed")

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (tile columns int32, values) on `spec.device`; see `BlockedEllMatrix`.

        Raises:
            KernelError: padding the rows of tiles to the longest would multiply the stored tiles by more than
                `most_padding`.
        """
        kept = kept_tiles(packed)
        counts = kept.sum(dim=1)  # (tile rows,)
        tiles, width = int(counts.sum()), int(counts.max()) if counts.numel() else 0
        stored_tiles = kept.shape[0] * width
        if stored_tiles > self.most_padding * tiles:
            raise KernelError(
                f"Blocked-ELL stores for every row of tiles as many as the longest has: {kept.shape[0]} x {width} for "
                f"{tiles} kept, {stored_tiles / tiles:.2f} times as many, above the limit of {self.most_padding:g}; "
                f"use another kernel, or select equally many tiles in every row"
            )
        row, column = kept.nonzero(as_tuple=True)
        slot = (kept.cumsum(dim=1) - 1)[row, column]
        values = packed.tensors["values"]
        block = values.shape[1]
        columns = torch.full((kept.shape[0], width), -1, dtype=torch.int32, device=values.device)
        columns[row, slot] = column.int()
        stored = values.new_zeros(kept.shape[0], width, block, block)
        stored[row, slot] = values
        beside = stored.transpose(1, 2).contiguous()  # (tile rows, block, width, block)
        return Prepared(self.name, packed.shape, (columns.to(spec.device), beside.to(spec.device, spec.dtype)))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        tile_rows, block, width, _ = prepared.tensors[1].shape
        matrix = BlockedEllMatrix((tile_rows, -(-prepared.shape[1] // block)), block, width)
        return apply(self.library, matrix, OWN, prepared, x, bias, activation)
