"""Packed in memory, dense for the product: for many tokens, where only the memory can be saved."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.bits import pack_bits
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.formats import kept_entries
from sparsify_compiler.runtime.launch import CupyLauncher, Launcher, Program
from sparsify_compiler.runtime.refusals import not_in, not_on, older_than
from sparsify_compiler.runtime.rows import ALIGNMENT, round_up

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST = (8, 0)
WARPS = 8
COLUMNS = 1024
"""Columns of a row that a warp expands, and for which `starts` has an entry."""


@dataclass(frozen=True)
class ExpandDense:
    """Expand the whole weight at every call, then multiply by `torch.nn.functional.linear`.

    It saves memory, not time: between calls the weight takes its kept values and one bit an entry (and 8 bytes every
    1024 entries); a call takes dense time, the time to write the dense weight once, and a dense weight of scratch.
    """

    name: str = "expand_dense"
    launcher: Launcher = field(default_factory=CupyLauncher)

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern or dtype it cannot run, or None."""
        if reason := not_on(spec, "cuda"):
            return reason
        if isinstance(spec.pattern, Block):
            return f"runs n:m and unstructured patterns; found {spec.pattern}"
        return not_in(spec, DTYPES) or older_than(spec, LEAST) or self.launcher.unavailable()

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """One variant only."""
        return ("",)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return on `spec.device`: values (kept,), keep (out, ceil(in / 32)) int32 as bits, starts (out, chunks) int64.

        `starts` counts the values before every 1024 columns of a row. The values are those packed where they are on
        the device already.

        Raises:
            KernelError: as `kept_entries`.
        """
        keep, values = kept_entries(packed)
        keep = keep.to(spec.device)
        words = pack_bits(functional.pad(keep, (0, -keep.shape[1] % 32))).view(torch.int32)
        rows, chunks = keep.shape[0], -(-keep.shape[1] // COLUMNS)
        counts = functional.pad(keep, (0, -keep.shape[1] % COLUMNS)).view(rows, chunks, COLUMNS).sum(dim=2).view(-1)
        starts = (counts.cumsum(0) - counts).view(rows, chunks)
        return Prepared(self.name, packed.shape, (values.to(spec.device, spec.dtype), words, starts))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        return activate(functional.linear(x, self.expand(prepared), bias), activation)

    def expand(self, prepared: Prepared) -> Tensor:
        """Return the dense weight (out, in), its rows at multiples of 16 bytes, in memory of its own."""
        values, words, starts = prepared.tensors
        (rows, chunks), columns = starts.shape, prepared.shape[1]
        stride = round_up(columns, ALIGNMENT // values.element_size())
        dense = torch.empty(rows, stride, dtype=values.dtype, device=values.device)
        if dense.numel():
            program = Program("expand.cu", "expand", (("WARPS", WARPS), ("ELEMENT_BITS", 8 * values.element_size())))
            grid = (-(-rows * chunks // WARPS), 1, 1)
            arguments = (values, words, starts, dense, rows, words.shape[1], chunks, stride)
            self.launcher.launch(program, grid, WARPS * 32, 0, arguments, dense.device)
        return dense[:, :columns]
