"""The lists that every test of layouts and kernels runs over: a new one is one line here."""

import pytest
import torch

from sparsify_compiler.kernel import Kernel
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.csr import TorchCsr
from sparsify_compiler.runtime.dense import Dense

KERNELS: tuple[Kernel, ...] = (Dense(), TorchCsr())

# One pattern of every layout, and those with tails, odd tiles and one entry a tile.
LAYOUT_PATTERNS: tuple[Pattern, ...] = (
    Unstructured(),
    NM(2, 4),
    NM(1, 3),
    NM(5, 8),
    NM(16, 32),
    Block(1, 1),
    Block(4, 4),
    Block(3, 5),
    Block(16, 8),
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
