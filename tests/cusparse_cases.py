"""The cuSPARSE kernels over the stand-in for the library, as the tests of kernels and plans use them."""

import dataclasses
from typing import Any

import torch
from fake_cusparse import Emulated, FakeLibrary
from kernels import choose

from sparsify_compiler.kernel import MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.cusparse.blocked_ell import CusparseBlockedEll
from sparsify_compiler.runtime.cusparse.bsr import CusparseBsr
from sparsify_compiler.runtime.cusparse.csr import CusparseCsr
from sparsify_compiler.runtime.formats import format_for

CusparseKernel = CusparseCsr | CusparseBsr | CusparseBlockedEll

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
CASES: tuple[tuple[type[CusparseKernel], Pattern], ...] = (
    (CusparseCsr, Unstructured()),
    (CusparseCsr, NM(2, 4)),
    (CusparseCsr, Block(3, 5)),
    (CusparseBsr, Block(1, 1)),
    (CusparseBsr, Block(4, 4)),
    (CusparseBsr, Block(16, 16)),
    (CusparseBlockedEll, Block(8, 8)),
    (CusparseBlockedEll, Block(32, 32)),
)


def over(kind: type[CusparseKernel], fake: FakeLibrary | None = None, **options: Any) -> CusparseKernel:
    library = Emulated(fake or FakeLibrary(), **options)
    return kind(library=library, most_padding=1e9) if kind is CusparseBlockedEll else kind(library=library)


def fake_of(kernel: CusparseKernel) -> FakeLibrary:
    assert isinstance(kernel.library, Emulated)
    return kernel.library.fake


def pack(pattern: Pattern, out: int, in_: int, dtype: torch.dtype = torch.float32, sparsity: float = 0.5) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out + in_)).to(dtype)
    return format_for(pattern).pack(weight, choose(pattern, weight, sparsity), pattern)


def spec_of(packed: Packed, device: torch.device = CPU, capability: tuple[int, int] | None = (9, 0)) -> MatmulSpec:
    dtype = packed.tensors["values"].dtype
    return MatmulSpec(*packed.shape, dtype, packed.pattern, 0.5, (1,), device, capability)


def chosen(prepared: Prepared, name: str) -> Prepared:
    return dataclasses.replace(prepared, variants=f"1={name}" if name else "")
