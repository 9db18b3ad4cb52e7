"""Square tiles in block compressed rows through cuSPARSE, plans kept between calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.cusparse.library import (
    BASE_ZERO,
    DATA_TYPES,
    INDEX_32I,
    Calls,
    Order,
    SpMM,
    SpMV,
    too_old,
)
from sparsify_compiler.runtime.cusparse.plans import InstalledLibrary, Library
from sparsify_compiler.runtime.cusparse.product import Choice, apply, refusal
from sparsify_compiler.runtime.formats import kept_entries
from sparsify_compiler.runtime.refusals import not_on

NEEDS: Mapping[torch.dtype, tuple[int, int]] = {
    torch.float16: (5, 3),
    torch.bfloat16: (8, 0),
    torch.float32: (0, 0),
    torch.float64: (0, 0),
}
"""Compute capability by dtype."""

MATRIX_VERSION = (12, 5, 1)
"""The first release whose header names CUSPARSE_SPMM_BSR_ALG1 (CUDA 12.5, update 1)."""

VECTOR_VERSION = (12, 6, 3)
"""The first release whose header names CUSPARSE_SPMV_BSR_ALG1 (CUDA 13.0, update 1)."""


@dataclass(frozen=True)
class BsrMatrix:
    """W in BSR: tensors are tile row starts (tile rows + 1,) int32, tile columns (tiles,) int32, tiles (tiles, b, b).

    Tiles are stored row by row: cuSPARSE multiplies no others. `tiles` counts tile rows and tile columns of W.
    """

    tiles: tuple[int, int]
    block: int

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
        sizes = (*self.tiles, tensors[1].numel(), self.block, self.block)
        addresses = [tensor.data_ptr() for tensor in tensors]
        kinds = (INDEX_32I, INDEX_32I, BASE_ZERO, DATA_TYPES[tensors[2].dtype], Order.ROW)
        return calls.create("cusparseCreateBsr", *sizes, *addresses, *kinds)


@dataclass(frozen=True)
class CusparseBsr:
    """BSR by SpMM, or by SpMV for one token where the library has it. Deterministic by NVIDIA's documentation."""

    name: str = "cusparse_bsr"
    library: Library = field(default_factory=InstalledLibrary)

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern, dtype, size or library is in the way, or None."""
        if reason := not_on(spec, "cuda"):
            return reason
        pattern = spec.pattern
        if not isinstance(pattern, Block) or pattern.rows != pattern.cols:
            return f"runs square blocks; found {pattern}"
        if reason := refusal(spec, self.library, NEEDS):
            return reason
        return too_old(self.library.plans().calls, MATRIX_VERSION, "SpMM with a BSR matrix")

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the one algorithm in every order of the dense operands, and SpMV for one token."""
        own = self._own()
        matrices = tuple(f"alg{SpMM.BSR:d}.{way}" for way in ("rows", "cols", "mixed"))
        return matrices if tokens > 1 or own.one in matrices else (own.one, *matrices)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (tile row starts int32, tile columns int32, tiles) on `spec.device`; the tiles are the packed ones."""
        tiles = kept_tiles(packed)
        starts = torch.nn.functional.pad(tiles.sum(dim=1).cumsum(0), (1, 0)).int()
        columns = tiles.nonzero()[:, 1].int()
        tensors = (starts, columns, packed.tensors["values"].contiguous())
        starts, columns, values = (tensor.to(spec.device) for tensor in tensors)
        return Prepared(self.name, packed.shape, (starts, columns, values.to(spec.dtype)))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        starts, _, values = prepared.tensors
        block = values.shape[1]
        matrix = BsrMatrix((starts.numel() - 1, -(-prepared.shape[1] // block)), block)
        return apply(self.library, matrix, self._own(), prepared, x, bias, activation)

    def _own(self) -> Choice:
        more = f"alg{SpMM.BSR:d}.rows"
        has_vectors = self.library.plans().calls.version >= VECTOR_VERSION
        return Choice(f"spmv{SpMV.BSR:d}" if has_vectors else more, more)


def kept_tiles(packed: Packed) -> Tensor:
    """Return which tiles a block layout keeps, bool (tile rows, tile columns).

    Raises:
        KernelError: the packed tensors are missing, misshapen or contradict each other.
    """
    pattern = packed.pattern
    assert isinstance(pattern, Block)
    keep, _ = kept_entries(packed)
    return keep[:: pattern.rows, :: pattern.cols]  # every tile, cut at an edge or not, has its first entry
