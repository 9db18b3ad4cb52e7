"""2:4 weights on Hopper's tensor cores by warpgroup products with a sparse operand, for 16 to many thousand tokens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.launch import CupyLauncher, Launcher, Program
from sparsify_compiler.runtime.nm.fragments import pack_fragments
from sparsify_compiler.runtime.nm.nm24_shapes import Shape, read_shape, shapes_for
from sparsify_compiler.runtime.refusals import capability_name, not_in, not_on, not_two_of_four
from sparsify_compiler.runtime.rows import HALF_DTYPES, aligned_rows, element_defines, round_up
from sparsify_compiler.runtime.variants import variant_for

HOPPER = (9, 0)

TILING_THREADS = 256


@dataclass(frozen=True)
class Nm24Wgmma:
    """y = x Wᵀ in float16 or bfloat16 with float32 sums; bias and activation before the one rounding.

    Works on the packed weight of runtime/nm/fragments.py, as the kernel for few tokens does. Variants are the shapes of
    runtime/nm/nm24_shapes.py; each computes any number of tokens. Deterministic: blocks that share the columns out add
    their sums in a fixed order.
    """

    launcher: Launcher = field(default_factory=CupyLauncher)
    name: str = "nm24_wgmma"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern, dtype or compiler does not do, or None."""
        if reason := not_on(spec, "cuda") or not_two_of_four(spec) or not_in(spec, HALF_DTYPES):
            return reason
        if spec.capability != HOPPER:
            found = capability_name(spec)
            return f"needs compute capability 9.0 exactly (Hopper's warpgroup products); found {found}"
        return self.launcher.unavailable()

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the shapes with the least predicted time for `tokens` rows."""
        return tuple(shape.name for shape in shapes_for(spec.out, spec.in_, max(tokens, 1)))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return one tensor: the records of runtime/nm/fragments.py, 9/16 of the dense weight's bytes."""
        return Prepared(self.name, packed.shape, (pack_fragments(packed, spec.device, spec.dtype),))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in).

        Raises:
            KernelError: `prepared` names a variant that this version has not, or the product is too large to launch.
        """
        (records,) = prepared.tensors
        tokens, (out, in_) = x.shape[0], prepared.shape
        y = x.new_empty((tokens, out))
        if y.numel() == 0:
            return y
        name = variant_for(prepared.variants, tokens)
        shape = read_shape(name) if name else shapes_for(out, in_, tokens)[0]
        x = aligned_rows(x, round_up(in_, 8))
        bias = None if bias is None else bias.contiguous()
        if shape.grid(out, tokens)[0] >= 2**31 or tokens >= 2**31 - 512:
            raise KernelError(f"nm24_wgmma: {tokens} tokens of a weight {prepared.shape} are too many for one launch")
        defines = (*element_defines(x.dtype, activation), *shape.defines())
        self._launch(shape, defines, (records, x, bias, y), tokens)
        return y

    def _launch(
        self,
        shape: Shape,
        defines: tuple[tuple[str, int], ...],
        tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
        tokens: int,
    ) -> None:
        records, x, bias, y = tensors
        out, columns, chunks = y.shape[1], x.shape[1], records.shape[1]
        grid = shape.grid(out, tokens)
        if not shape.many:
            program = Program("nm24_wgmma.cu", "nm24_wgmma", defines, "a")
            few = (records, x, bias, y, out, columns, tokens, chunks)
            self.launcher.launch(program, grid, shape.threads, shape.shared_bytes, few, x.device)
            return
        count = -(-tokens // shape.tokens) * chunks
        tiles = torch.empty(count * shape.tokens * 128, dtype=torch.uint8, device=x.device)
        tiling = Program("tile_tokens.cu", "tile_tokens", (*element_defines(x.dtype), ("TOKENS", shape.tokens)))
        blocks = (count * (shape.tokens // 32), 1, 1)
        self.launcher.launch(tiling, blocks, TILING_THREADS, 0, (x, tiles, columns, tokens, chunks), x.device)
        program = Program("nm24_wgmma_many.cu", "nm24_wgmma_many", defines, "a")
        many = (records, tiles, bias, y, out, tokens, chunks)
        self.launcher.launch(program, grid, shape.threads, shape.shared_bytes, many, x.device)
