"""The lists that every test of layouts and kernels runs over: a new one is one line here."""

import pytest
import torch

from sparsify_compiler.kernel import Kernel, MatmulSpec
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.cpu.block_gather import BlockGather
from sparsify_compiler.runtime.cpu.csr import TorchCsr
from sparsify_compiler.runtime.cpu.numba_block import NumbaBlock
from sparsify_compiler.runtime.cpu.numba_csr import NumbaCsr
from sparsify_compiler.runtime.dense import Dense

# Those that run on a CPU as they are; doubles.py lists those made for a GPU with what stands in for it.
KERNELS: tuple[Kernel, ...] = (Dense(), TorchCsr(), NumbaCsr(), NumbaBlock(), BlockGather())

# One pattern of every layout, those with tails, odd tiles and one entry a tile, and every kernel's own.
LAYOUT_PATTERNS: tuple[Pattern, ...] = (
    Unstructured(),
    NM(2, 4),
    NM(1, 3),
    NM(5, 8),
    NM(8, 16),
    NM(16, 32),
    NM(8, 32),
    Block(1, 1),
    Block(4, 4),
    Block(3, 5),
    Block(16, 8),
    Block(16, 16),
    Block(32, 32),
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accepted(kernel: Kernel, device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Pattern]:
    """Return the patterns of the list that a kernel runs on `device` in some dtype; a CUDA device is taken for 9.0."""
    capability = (9, 0) if device.type == "cuda" else None
    specs = [
        (pattern, MatmulSpec(64, 64, dtype, pattern, 0.5, (1,), device, capability))
        for pattern in LAYOUT_PATTERNS
        for dtype in dtypes
    ]
    return list(dict.fromkeys(pattern for pattern, spec in specs if kernel.rejects(spec) is None))


def skip_without_mkl(kernel: str) -> None:
    """Skip a CPU test of torch_csr where PyTorch has no MKL, and so no such product."""
    if kernel == "torch_csr" and not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch was built without MKL, so torch_csr cannot run on the CPU")


def choose(pattern: Pattern, weight: torch.Tensor, sparsity: float = 0.5) -> torch.Tensor:
    """Return a keep mask (out, in) of the pattern; blocks that do not tile are chosen on the padded weight."""
    scores = weight.double().abs()
    if not isinstance(pattern, Block):
        return pattern.select(scores, sparsity)
    out, in_ = weight.shape
    padded = torch.nn.functional.pad(scores, (0, -in_ % pattern.cols, 0, -out % pattern.rows))
    return pattern.select(padded, sparsity)[:out, :in_]
