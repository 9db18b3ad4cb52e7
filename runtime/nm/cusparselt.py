"""2:4 products by NVIDIA's cuSPARSELt, with the algorithm that the tuner found for each count of tokens."""

import functools
import re
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.nm.cusparselt_plans import Algorithm, Plans
from sparsify_compiler.runtime.refusals import not_in, not_on, not_two_of_four, older_than
from sparsify_compiler.runtime.rows import HALF_DTYPES, aligned_rows, round_up
from sparsify_compiler.runtime.variants import variant_for

SIDE_MULTIPLE, TOKEN_MULTIPLE = 16, 8
"""Of the weight's sides and of the tokens, in 16-bit dtypes (torch/sparse/semi_structured.py states the same)."""

MOST_ALGORITHMS = 16
MEASURED_ALGORITHMS = 6

_NAME = re.compile(r"alg(\d+)(?:\.splitk(-?\d+))?(?:\.mode(\d+))?")


class Products(Protocol):
    """A way to cuSPARSELt."""

    def unavailable(self) -> str | None:
        """Return None, or why it cannot be used here and what to install."""
        ...

    def compress(self, weight: Tensor) -> Tensor:
        """Compress `weight` (out, in), multiples of 16, at most 2 of every 4 entries not 0."""
        ...

    def multiply(
        self, compressed: Tensor, out: int, x: Tensor, bias: Tensor | None, relu: bool, algorithm: Algorithm
    ) -> Tensor:
        """Return relu(x Wᵀ + bias), (tokens, out), for `x` (tokens, in) contiguous; multiples of 8, 16 and 16.

        `bias` may be shorter than `out`: 0 beyond.
        """
        ...

    def algorithms(self, out: int, in_: int, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return how many algorithms may be asked for, from number 0."""
        ...


@dataclass(frozen=True)
class TorchProducts:
    """cuSPARSELt by PyTorch's own binding: right at once, but with new descriptors and a new plan at every call."""

    def unavailable(self) -> str | None:
        """Say that this PyTorch was built without it, or None."""
        if torch.backends.cusparselt.is_available():
            return None
        return "this PyTorch was built without cuSPARSELt; install its CUDA build for Linux"

    def compress(self, weight: Tensor) -> Tensor:
        """Compress; see `Products`."""
        return torch._cslt_compress(weight.contiguous())

    def multiply(
        self, compressed: Tensor, out: int, x: Tensor, bias: Tensor | None, relu: bool, algorithm: Algorithm
    ) -> Tensor:
        """Multiply; see `Products`."""
        if bias is not None:
            bias = functional.pad(bias, (0, out - bias.shape[0])).contiguous()
        y: Tensor = torch._cslt_sparse_mm(
            compressed,
            x.T,
            bias=bias,
            transpose_result=True,
            alg_id=algorithm.number,
            split_k=algorithm.split,
            split_k_mode=algorithm.mode,
        )
        return functional.relu(y) if relu else y

    def algorithms(self, out: int, in_: int, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return MEASURED_ALGORITHMS: the binding does not tell."""
        return MEASURED_ALGORITHMS


@dataclass(frozen=True)
class CuSparseLt:
    """y = x Wᵀ + bias in float16 or bfloat16, float32 sums, ReLU in the same pass.

    Its GELU is for int8 only, so GELU and SiLU follow as a pass of their own. Variants are algorithms: "alg3", with
    ".splitk<parts>" and ".mode<number>" as cusparseLt.h numbers them. Other sides than multiples of 16 and other
    token counts than multiples of 8 are padded, the latter with a copy of x. Deterministic for a given algorithm that
    does not split the columns; none of `variants` does.
    """

    products: Products = field(default_factory=Plans)
    name: str = "cusparselt"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say which device, pattern, dtype or library does not do, or None."""
        reason = not_on(spec, "cuda") or not_two_of_four(spec) or not_in(spec, HALF_DTYPES)
        return reason or older_than(spec, (8, 0)) or self.products.unavailable()

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name the library's algorithms for this product; those of the first measurements where it cannot be asked."""
        out, in_ = round_up(spec.out, SIDE_MULTIPLE), round_up(spec.in_, SIDE_MULTIPLE)
        count = MEASURED_ALGORITHMS
        if self.rejects(spec) is None:
            padded = round_up(max(tokens, 1), TOKEN_MULTIPLE)
            count = self.products.algorithms(out, in_, padded, spec.dtype, spec.device)
        return tuple(f"alg{number}" for number in range(max(1, min(count, MOST_ALGORITHMS))))

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return one tensor: the weight as the library compresses it.

        Raises:
            KernelError: groups of four columns keep more than two (counted), or the library fails.
        """
        out, in_ = packed.shape
        dense = unpack(packed).to(spec.device, spec.dtype)
        dense = functional.pad(dense, (0, -in_ % SIDE_MULTIPLE, 0, -out % SIDE_MULTIPLE))
        if broken := int(((dense.reshape(-1, 4) != 0).sum(dim=1) > 2).sum()):
            raise KernelError(
                f"weight {packed.shape} is not 2:4: {broken} groups of four columns hold more than two values; "
                f"prune with pattern 2:4"
            )
        return Prepared(self.name, packed.shape, (self.products.compress(dense),))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        (compressed,) = prepared.tensors
        tokens, (out, in_) = x.shape[0], prepared.shape
        if tokens == 0 or out == 0:
            return x.new_empty((tokens, out))
        algorithm = read_algorithm(variant_for(prepared.variants, tokens) or "alg0")
        if tokens % TOKEN_MULTIPLE:
            x = functional.pad(x, (0, 0, 0, -tokens % TOKEN_MULTIPLE))
        x = aligned_rows(x, round_up(in_, SIDE_MULTIPLE))
        bias = None if bias is None else bias.contiguous()
        relu = activation == "relu"
        y = self.products.multiply(compressed, round_up(out, SIDE_MULTIPLE), x, bias, relu, algorithm)
        return activate(y[:tokens, :out].contiguous(), None if relu else activation)


@functools.lru_cache(maxsize=256)
def read_algorithm(name: str) -> Algorithm:
    """Read a variant's name.

    Raises:
        KernelError: it names no algorithm.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise KernelError(f"cusparselt has no variant {name!r}; one is alg<number>; tune the layer again")
    return Algorithm(int(match[1]), int(match[2] or 1), int(match[3] or -1))
