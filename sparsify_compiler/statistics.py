"""Streaming second moments of a site's inputs, in float64."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.batches import Padding
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.layout import LEAST_ROWS, row_chunks
from sparsify_compiler.graph import Layout, Site
from sparsify_compiler.problem import Gram, Needs

SLICE_ROWS = LEAST_ROWS
"""Rows multiplied in float32 before the product is added in float64: relative error about 3e-7."""

CPU_PANEL, GPU_PANEL = 128, 1024
"""Columns of the Gram matrix computed at a time; only panels on and below the diagonal are. Narrow ones waste less of
a product, and wide ones are few launches: at most 4 up to 4,096 inputs, and beyond each is work enough for a GPU."""


@dataclass(frozen=True)
class Estimate:
    """Bytes a walk will hold: statistics of the largest segment, and boundary activations of all batches."""

    statistics_bytes: int
    boundary_bytes: int


@dataclass
class Moments:
    """What is summed for one input: XᵀX (or only its diagonal) and, with dense targets, X_prunedᵀ X_dense.

    Give `add` the site's input as the layer sees it; `tokens` counts its rows without padding. Sums live on the input's
    device. Of XᵀX only panels on and below the diagonal are summed; the first `gram` mirrors them and ends the
    gathering.
    """

    layout: Layout
    groups: int
    in_: int
    needs: Needs
    tokens: int = 0
    cross: Tensor | None = None
    dense_second: Tensor | None = None
    _second: Tensor | None = None
    _grams: dict[int, Gram] = field(default_factory=dict)

    def add(self, x: Tensor, name: str, batch: int, padding: Padding | None = None) -> None:
        """Add the rows of one input tensor that are no padding. Raises CalibrationError where they are not finite."""
        if self._second is None:
            self._second = self._zeros(x.device)
        for rows in row_chunks(x, self.layout, padding):
            rows = rows.to(torch.float32)
            for start in range(0, rows.shape[1], SLICE_ROWS):
                chunk = rows[:, start : start + SLICE_ROWS]
                if self.needs is Needs.NORMS:
                    self._second += chunk.square().sum(1, dtype=torch.float64)
                else:
                    add_gram(self._second, chunk)
            self.tokens += rows.shape[1]
        _check_finite(self._diagonal(self._second), f"site {name!r}: its input", batch)

    def add_pair(self, x: Tensor, dense: Tensor, name: str, batch: int, padding: Padding | None = None) -> None:
        """Add X_prunedᵀ X_dense and X_denseᵀ X_dense for the same tokens, of which `add` has checked X_pruned.

        Raises CalibrationError where the dense model's are not finite.
        """
        if self.cross is None or self.dense_second is None:
            self.cross, self.dense_second = self._zeros(x.device, full=True), self._zeros(x.device, full=True)
        chunks = (row_chunks(each, self.layout, padding) for each in (x, dense))
        for rows, dense_rows in zip(*chunks, strict=True):
            for start in range(0, rows.shape[1], SLICE_ROWS):
                left = rows[:, start : start + SLICE_ROWS].to(torch.float32)
                right = dense_rows[:, start : start + SLICE_ROWS].to(torch.float32)
                self.cross += left.transpose(1, 2) @ right
                self.dense_second += right.transpose(1, 2) @ right
        _check_finite(self.dense_second.diagonal(dim1=1, dim2=2), f"site {name!r}: its input in the dense model", batch)

    def mean_square(self, group: int) -> Tensor:
        """Return the mean of x² per input, (in,) float64."""
        if group in self._grams:
            return self._grams[group].matrix.diagonal().clone()
        return self._diagonal(self._sums())[group] / self.tokens

    def gram(self, group: int) -> Gram:
        """Return XᵀX / tokens of one group: the same object every time, so that what is derived from it is shared."""
        if group not in self._grams:
            matrix = self._sums()[group]
            for start, stop in panels(self.in_, matrix.device):
                matrix[start:stop, stop:] = matrix[stop:, start:stop].t()
                corner = matrix[start:stop, start:stop]
                corner.copy_(corner.tril() + corner.tril(-1).t())  # a product need not round both halves alike
            self._grams[group] = Gram(matrix.div_(self.tokens), self.tokens)
        return self._grams[group]

    def _sums(self) -> Tensor:
        if self._second is None or not self.tokens:
            raise CalibrationError("no tokens were recorded; give calibration data that reaches this site")
        return self._second

    def _diagonal(self, second: Tensor) -> Tensor:
        return second if self.needs is Needs.NORMS else second.diagonal(dim1=1, dim2=2)

    def _zeros(self, device: torch.device, full: bool = False) -> Tensor:
        norms = self.needs is Needs.NORMS and not full
        shape = (self.groups, self.in_) if norms else (self.groups, self.in_, self.in_)
        return torch.zeros(shape, dtype=torch.float64, device=device)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to `total` (groups, in, in) float64 for rows (groups, tokens, in) float32, lower panels only.

    The product of float32 chunks is exact enough (error 3e-7 relative); the sum over chunks is kept in float64.
    """
    transposed = rows.transpose(1, 2)
    for start, stop in panels(rows.shape[2], rows.device):
        total[:, start:, start:stop] += transposed[:, start:] @ rows[:, :, start:stop]


def _check_finite(diagonal: Tensor, what: str, batch: int) -> None:
    if not torch.isfinite(diagonal).all():
        raise CalibrationError(
            f"{what} holds NaN or infinity in calibration batch {batch}; check the model's dtype (float16 overflows at "
            "65504) and the data"
        )


def panels(in_: int, device: torch.device) -> list[tuple[int, int]]:
    """List the (start, stop) columns of every panel of a Gram matrix on `device`."""
    width = GPU_PANEL if device.type == "cuda" else CPU_PANEL
    return [(start, min(start + width, in_)) for start in range(0, in_, width)]


def size_bytes(groups: int, in_: int, needs: Needs) -> int:
    """Bytes that `Moments` holds for one input."""
    if needs is Needs.NOTHING:
        return 0
    return groups * in_ * 8 * (1 if needs is Needs.NORMS else in_)


def largest_bytes(sites: Iterable[tuple[Site, Needs]]) -> int:
    """Bytes held for the segment that needs most; sites that read the same input share its statistics."""
    segments: dict[int, dict[str, int]] = {}
    for site, needs in sites:
        held = segments.setdefault(site.segment, {})
        held[site.reads] = max(held.get(site.reads, 0), size_bytes(site.groups, site.in_, needs))
    return max((sum(held.values()) for held in segments.values()), default=0)
