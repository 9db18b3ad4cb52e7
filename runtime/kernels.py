"""The kernels of this release, and the specification of a product from a packed weight."""

import functools

import torch

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Kernel, MatmulSpec, Packed
from sparsify_compiler.runtime.block.few_tokens import BlockDecode
from sparsify_compiler.runtime.block.many_tokens import BlockTriton
from sparsify_compiler.runtime.cpu.block_gather import BlockGather
from sparsify_compiler.runtime.cpu.csr import TorchCsr
from sparsify_compiler.runtime.cpu.numba_block import NumbaBlock
from sparsify_compiler.runtime.cpu.numba_csr import NumbaCsr
from sparsify_compiler.runtime.cusparse.blocked_ell import CusparseBlockedEll
from sparsify_compiler.runtime.cusparse.bsr import CusparseBsr
from sparsify_compiler.runtime.cusparse.csr import CusparseCsr
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.formats import kept_entries
from sparsify_compiler.runtime.nm.cusparselt import CuSparseLt
from sparsify_compiler.runtime.nm.nm24 import Nm24Mma
from sparsify_compiler.runtime.nm.nm24_wgmma import Nm24Wgmma
from sparsify_compiler.runtime.nm.nm_gemv import NmGemv
from sparsify_compiler.runtime.nm.nm_mma import NmMma
from sparsify_compiler.runtime.routed import is_routed, routed_named
from sparsify_compiler.runtime.unstructured.bitmap_gemv import BitmapGemv
from sparsify_compiler.runtime.unstructured.expand import ExpandDense


def kernels() -> tuple[Kernel, ...]:
    """Return every kernel, dense first; where each runs is its own to say."""
    return (
        Dense(),
        # 2:4
        Nm24Mma(),
        Nm24Wgmma(),
        CuSparseLt(),
        # n:m of up to 32
        NmGemv(),
        NmMma(),
        # blocks
        BlockDecode(),
        BlockTriton(),
        CusparseBlockedEll(),
        CusparseBsr(),
        # any pattern
        BitmapGemv(),
        ExpandDense(),
        CusparseCsr(),
        TorchCsr(),
        # on a CPU
        NumbaCsr(),
        NumbaBlock(),
        BlockGather(),
    )


@functools.lru_cache(maxsize=256)
def kernel_named(name: str) -> Kernel:
    """Return the kernel that reports call `name`; the same object every time, for eager calls find it by name.

    A routed name (runtime/routed.py) gives the route over the kernels that it names.

    Raises:
        KernelError: there is none in this version.
    """
    if is_routed(name):
        return routed_named(name, kernel_named)
    for kernel in kernels():
        if kernel.name == name:
            return kernel
    known = ", ".join(kernel.name for kernel in kernels())
    raise KernelError(f"kernel {name!r}: this version has {known}; compile the model again with this version")


def spec_for(
    packed: Packed, tokens: tuple[int, ...], device: torch.device | None = None, run: int | None = None
) -> MatmulSpec:
    """Describe the product with a packed weight for kernels, on `device` (None: where its values are).

    `run` is the pattern's, as the weight was packed with; see `MatmulSpec`.

    Raises:
        KernelError: the packed tensors are missing, misshapen or contradict each other.
    """
    out, in_ = packed.shape
    keep, values = kept_entries(packed)
    device = device or values.device
    density = float(keep.sum()) / max(out * in_, 1)
    return MatmulSpec(out, in_, values.dtype, packed.pattern, density, tokens, device, capability(device), run)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the CUDA compute capability of a device, or None for any other."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor
