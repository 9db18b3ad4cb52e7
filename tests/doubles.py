"""The kernels made for a GPU, with what stands in for it: an emulator of CUDA, fakes of NVIDIA's libraries."""

from collections.abc import Callable
from dataclasses import dataclass

from cusparse_cases import over
from cusparselt_stand_in import StandIn
from emulated import EmulatedLauncher

from sparsify_compiler.kernel import Kernel
from sparsify_compiler.runtime.block.few_tokens import BlockDecode
from sparsify_compiler.runtime.cusparse.blocked_ell import CusparseBlockedEll
from sparsify_compiler.runtime.cusparse.bsr import CusparseBsr
from sparsify_compiler.runtime.cusparse.csr import CusparseCsr
from sparsify_compiler.runtime.nm.cusparselt import CuSparseLt
from sparsify_compiler.runtime.nm.cusparselt_plans import Plans
from sparsify_compiler.runtime.nm.nm24 import Nm24Mma
from sparsify_compiler.runtime.nm.nm24_wgmma import Nm24Wgmma
from sparsify_compiler.runtime.nm.nm_gemv import NmGemv
from sparsify_compiler.runtime.nm.nm_mma import NmMma
from sparsify_compiler.runtime.unstructured.bitmap_gemv import BitmapGemv
from sparsify_compiler.runtime.unstructured.expand import ExpandDense


@dataclass(frozen=True)
class Double:
    """A kernel's name, and how to make it so that it runs on CPU tensors. `emulated`: it needs g++."""

    name: str
    make: Callable[[], Kernel]
    emulated: bool = True


DOUBLES = (
    Double("nm24_mma", lambda: Nm24Mma(launcher=EmulatedLauncher())),
    Double("nm24_wgmma", lambda: Nm24Wgmma(launcher=EmulatedLauncher())),
    Double("cusparselt", lambda: CuSparseLt(Plans(StandIn())), emulated=False),
    Double("nm_gemv", lambda: NmGemv(launcher=EmulatedLauncher())),
    Double("nm_mma", lambda: NmMma(launcher=EmulatedLauncher())),
    Double("block_decode", lambda: BlockDecode(launcher=EmulatedLauncher())),
    Double("cusparse_blocked_ell", lambda: over(CusparseBlockedEll), emulated=False),
    Double("cusparse_bsr", lambda: over(CusparseBsr), emulated=False),
    Double("bitmap_gemv", lambda: BitmapGemv(launcher=EmulatedLauncher())),
    Double("expand_dense", lambda: ExpandDense(launcher=EmulatedLauncher())),
    Double("cusparse_csr", lambda: over(CusparseCsr), emulated=False),
)
