"""Compressed sparse rows through PyTorch: MKL on a CPU, cuSPARSE on a GPU. Any pattern."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.epilogue import finish
from sparsify_compiler.runtime.formats import LARGEST_COUNT, kept_entries
from sparsify_compiler.runtime.refusals import dtype_name, not_in, not_on, older_than


@dataclass(frozen=True)
class TorchCsr:
    """W x with W in CSR with int32 indices, then one transposing copy of the result to row-major order.

    The other order, x Wᵀ, is 2 to 10 times slower in MKL from 16 tokens on (1536x576, 2 cores, torch 2.13).
    """

    name: str = "torch_csr"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, dtype or size PyTorch has no CSR product for, or None."""
        if reason := not_on(spec, "cpu", "cuda"):
            return reason
        if spec.device.type == "cpu":
            reason = not_in(spec, (torch.float32, torch.float64), " on a CPU") or _without_mkl()
        else:
            needs = {torch.float16: (5, 3), torch.bfloat16: (8, 0)}.get(spec.dtype, (0, 0))
            reason = older_than(spec, needs, dtype_name(spec.dtype))
        kept = round(spec.out * spec.in_ * spec.density)
        if reason is None and max(kept, spec.in_) > LARGEST_COUNT:
            return f"{kept} kept entries do not fit int32 indices; split the layer"
        return reason

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """One variant only."""
        return ("",)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return (row starts int32, columns int32, values) on `spec.device`."""
        keep, values = kept_entries(packed)
        starts = torch.nn.functional.pad(keep.sum(dim=1).cumsum(0), (1, 0)).int()
        columns = keep.nonzero()[:, 1].int()
        tensors = (starts.to(spec.device), columns.to(spec.device), values.to(spec.device, spec.dtype))
        # PyTorch warns once a process that CSR is in beta. Said here, where it is known, instead of in every program.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            torch.sparse_csr_tensor(*tensors, packed.shape, check_invariants=True)
        return Prepared(self.name, packed.shape, tensors)

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        starts, columns, values = prepared.tensors
        weight = torch.sparse_csr_tensor(starts, columns, values, prepared.shape, check_invariants=False)
        y: Tensor = (weight @ x.T).T  # (tokens, out), column after column
        return finish(y.contiguous(), bias, activation)


def _without_mkl() -> str | None:
    """Say that this PyTorch lacks the library that has the product on a CPU, or None."""
    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return None
    return "this PyTorch was built without MKL, so it has no CSR product on a CPU"
