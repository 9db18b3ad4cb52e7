"""Compressed sparse rows through cuSPARSE's generic calls, plans kept between calls. Any pattern."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.cusparse.library import BASE_ZERO, DATA_TYPES, INDEX_32I, Calls, SpMM, SpMV
from sparsify_compiler.runtime.cusparse.plans import InstalledLibrary, Library
from sparsify_compiler.runtime.cusparse.product import Choice, apply, refusal
from sparsify_compiler.runtime.formats import kept_entries

NEEDS: Mapping[torch.dtype, tuple[int, int]] = {
    torch.float16: (5, 3),
    torch.bfloat16: (8, 0),
    torch.float32: (0, 0),
    torch.float64: (0, 0),
}
"""Compute capability by dtype."""

VECTOR_TOKENS = 4
"""Tokens up to which single vectors are worth timing against one product of matrices."""

OWN = Choice(f"spmv{SpMV.CSR_2:d}", f"alg{SpMM.CSR_3:d}.rows")


@dataclass(frozen=True)
class CsrMatrix:
    """W in CSR: tensors are row starts (rows + 1,) int32, columns (kept,) int32 by row, values (kept,)."""

    shape: tuple[int, int]

    @property
    def analysed(self) -> bool:
        """True: algorithms 1 and 3 keep what they find."""
        return True

    def create(self, calls: Calls, tensors: Sequence[Tensor]) -> int:
        """Return the descriptor."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        kinds = (INDEX_32I, INDEX_32I, BASE_ZERO, DATA_TYPES[tensors[2].dtype])
        return calls.create("cusparseCreateCsr", *self.shape, tensors[2].numel(), *addresses, *kinds)


@dataclass(frozen=True)
class CusparseCsr:
    """CSR by SpMM, or by SpMV for one token.

    The kernel's own choice gives the same bits in every run. "alg4", "alg6" and "spmv2" may not (NVIDIA's
    documentation of the algorithms). For SpMM that concerns float32 and float64 only: 16-bit products run as alg12
    whatever is asked for, so they have fewer variants.
    """

    name: str = "cusparse_csr"
    library: Library = field(default_factory=InstalledLibrary)

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, dtype, size or missing library is in the way, or None."""
        return refusal(spec, self.library, NEEDS)

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the algorithms, each with the order of the dense operands it is made for and one without copies."""
        vectors = (OWN.one, f"spmv{SpMV.CSR_1:d}") if tokens <= VECTOR_TOKENS else ()
        matrices = (OWN.more, f"alg{SpMM.CSR_3:d}.cols", f"alg{SpMM.CSR_3:d}.mixed")
        others = (f"alg{SpMM.CSR_2:d}.rows", f"alg{SpMM.CSR_2:d}.mixed", f"alg{SpMM.CSR_1:d}.cols")
        known = (*matrices, *(others if spec.dtype in (torch.float32, torch.float64) else ()))
        return (*vectors, *known) if tokens == 1 else (*known, *vectors)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (row starts int32, columns int32, values) on `spec.device`; the values are the packed ones."""
        keep, values = kept_entries(packed)
        starts = torch.nn.functional.pad(keep.sum(dim=1).cumsum(0), (1, 0)).int()
        columns = keep.nonzero()[:, 1].int()
        tensors = (starts.to(spec.device), columns.to(spec.device), values.to(spec.device, spec.dtype))
        return Prepared(self.name, packed.shape, tensors)

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        return apply(self.library, CsrMatrix(prepared.shape), OWN, prepared, x, bias, activation)
