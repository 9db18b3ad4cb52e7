"""One product y = x Wᵀ by cuSPARSE, in each of the ways the library can be asked for it.

cuSPARSE multiplies from the left, yᵀ = W xᵀ. A row-major x (tokens, in) is xᵀ in column-major order, and so is y, so
nothing has to be copied; but its kernels read fastest along the rows of xᵀ, across tokens. Hence three ways, by name:

| way | x | y | copies |
|---|---|---|---|
| cols | column-major xᵀ | column-major yᵀ | none |
| mixed | row-major x, transposed by the library | column-major yᵀ | none |
| rows | row-major xᵀ, its rows padded to 16 bytes | row-major yᵀ | x and y are transposed |

and "spmv", one matrix-vector product a token. A bias is written into y first and the product added to it: the library
would otherwise clear y, so the bias costs nothing more and is rounded together with the sum.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Prepared
from sparsify_compiler.runtime.cusparse.library import DATA_TYPES, Operation, Order
from sparsify_compiler.runtime.cusparse.plans import Dense, Library, Matrix, Plans, Product
from sparsify_compiler.runtime.epilogue import activate, finish
from sparsify_compiler.runtime.formats import LARGEST_COUNT
from sparsify_compiler.runtime.refusals import dtype_name, not_in, not_on, older_than
from sparsify_compiler.runtime.rows import ALIGNMENT, aligned_rows, round_up
from sparsify_compiler.runtime.variants import variant_for

Way = Literal["cols", "mixed", "rows", "spmv"]

MOST_COLUMNS = 1_048_560
"""Columns of a dense operand that cuSPARSE before 12.7.20 takes at once."""

MOST_VECTORS = 16
"""Tokens up to which a variant of single vectors is followed; with more of them the kernel's own choice runs."""

_VARIANT = re.compile(r"alg(\d+)\.(cols|mixed|rows)|spmv(\d+)")


@dataclass(frozen=True)
class Variant:
    """An algorithm by cuSPARSE's own number, and the way the operands lie."""

    algorithm: int
    way: Way


@functools.lru_cache(maxsize=256)
def read_variant(name: str) -> Variant:
    """Read "alg12.rows" or "spmv3".

    Raises:
        KernelError: the name has another form.
    """
    match = _VARIANT.fullmatch(name)
    if match is None:
        raise KernelError(f"cuSPARSE variant {name!r} is not alg<number>.<cols|mixed|rows> or spmv<number>; tune again")
    if match[3] is not None:
        return Variant(int(match[3]), "spmv")
    return Variant(int(match[1]), cast(Way, match[2]))


def refusal(spec: MatmulSpec, library: Library, needs: Mapping[torch.dtype, tuple[int, int]]) -> str | None:
    """Say which device, dtype, capability, size or missing library is in the way of any product, or None.

    `needs` has the compute capability that each dtype asks for.
    """
    if reason := not_on(spec, "cuda") or not_in(spec, [dtype for dtype in needs if dtype in DATA_TYPES]):
        return reason
    if reason := older_than(spec, needs[spec.dtype], dtype_name(spec.dtype)):
        return reason
    kept = round(spec.out * spec.in_ * spec.density)
    if max(kept, spec.in_, spec.out) > LARGEST_COUNT:
        return f"{kept} kept entries of ({spec.out}, {spec.in_}) do not fit int32 indices; split the layer"
    return library.unavailable()


@dataclass(frozen=True)
class Choice:
    """A kernel's own variants: for one token, and for more."""

    one: str
    more: str

    def variant(self, chosen: str, tokens: int) -> Variant:
        """Return the variant that `Prepared.variants` chose for `tokens` rows, else the kernel's own."""
        own = self.one if tokens == 1 else self.more
        variant = read_variant(variant_for(chosen, tokens) or own)
        return read_variant(own) if variant.way == "spmv" and tokens > MOST_VECTORS else variant


def apply(
    library: Library,
    matrix: Matrix,
    choice: Choice,
    prepared: Prepared,
    x: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """Return activation(x Wᵀ + bias), (tokens, out), for `x` (tokens, in) of any strides; W is padded as `matrix` is.

    The values are the last of `prepared.tensors`.

    Raises:
        KernelError: cuSPARSE refuses, in its own words.
    """
    tokens, out = x.shape[0], prepared.shape[0]
    if tokens == 0 or out == 0 or prepared.tensors[-1].numel() == 0:
        return finish(x.new_zeros(tokens, out), bias, activation)
    variant = choice.variant(prepared.variants, tokens)
    rows = aligned_rows(x, matrix.shape[1])
    y = multiply(library.plans(), matrix, prepared.tensors, rows, bias, variant)
    return activate(y if matrix.shape[0] == out else y[:, :out].contiguous(), activation)


def multiply(
    plans: Plans, matrix: Matrix, tensors: Sequence[Tensor], x: Tensor, bias: Tensor | None, variant: Variant
) -> Tensor:
    """Return x Wᵀ + bias, (tokens, rows of W), for a contiguous `x` (tokens, columns of W) of at least one token.

    `bias` (out,) may be shorter than the rows of W: what is beyond it is padding, and undefined in the result.

    Raises:
        KernelError: cuSPARSE refuses, in its own words.
    """
    if x.shape[0] > MOST_COLUMNS:
        parts = (x[start : start + MOST_COLUMNS] for start in range(0, x.shape[0], MOST_COLUMNS))
        return torch.cat([multiply(plans, matrix, tensors, part, bias, variant) for part in parts])
    if variant.way == "rows":
        return _by_rows(plans, matrix, tensors, x, bias, variant.algorithm)
    rows, columns = matrix.shape
    tokens = x.shape[0]
    y = x.new_empty(tokens, rows)
    if bias is not None:
        y[:, : bias.shape[0]].copy_(bias)
    if variant.way == "spmv":
        product = Product(matrix, x.dtype, variant.algorithm)
        for token in range(tokens):
            plans.run(product, tensors, x[token], y[token], bias is not None)
        return y
    result = Dense(rows, tokens, rows, Order.COLUMN)
    if variant.way == "cols":
        operand, operation = Dense(columns, tokens, columns, Order.COLUMN), Operation.NONE
    else:
        operand, operation = Dense(tokens, columns, columns, Order.ROW), Operation.TRANSPOSE
    plans.run(Product(matrix, x.dtype, variant.algorithm, operand, result, operation), tensors, x, y, bias is not None)
    return y


def _by_rows(
    plans: Plans, matrix: Matrix, tensors: Sequence[Tensor], x: Tensor, bias: Tensor | None, algorithm: int
) -> Tensor:
    rows, columns = matrix.shape
    tokens = x.shape[0]
    leading = round_up(tokens, ALIGNMENT // x.element_size())
    across, result = x.new_empty(columns, leading), x.new_empty(rows, leading)
    across[:, :tokens].copy_(x.T)
    if bias is not None:
        result[: bias.shape[0], :tokens].copy_(bias.unsqueeze(1))
    operands = (Dense(columns, tokens, leading, Order.ROW), Dense(rows, tokens, leading, Order.ROW))
    plans.run(Product(matrix, x.dtype, algorithm, *operands), tensors, across, result, bias is not None)
    return result[:, :tokens].T.contiguous()
