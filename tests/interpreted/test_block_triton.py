"""The Triton kernels for block weights in Triton's interpreter, on CPU tensors. Run by tests/cpu/test_block_triton.py.

The interpreter must be asked for (TRITON_INTERPRET=1) before Triton is imported, hence a process of its own. It is
NumPy, which has no bfloat16: loads give the 16-bit patterns, and `tl.dot` (Triton 3.6 to 3.9) multiplies those as whole
numbers, so the fixture below widens them first. It reads and writes through plain addresses: what is out of bounds may
go unseen.
"""

import dataclasses
import importlib
import os
from typing import Any

import numpy as np
import pytest
import torch
from kernels import choose

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, Packed
from sparsify_compiler.pattern import Block
from sparsify_compiler.runtime.block.many_tokens import BlockTriton
from sparsify_compiler.runtime.formats import BlockFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import difference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before Triton is imported"
)
KERNEL = BlockTriton()
TILES = (Block(16, 16), Block(32, 32), Block(64, 64), Block(128, 128), Block(48, 16), Block(16, 96), Block(32, 256))


@pytest.fixture(autouse=True)
def widened_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's product take bfloat16 for what it is; float16 it widens itself."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    dot = interpreter.InterpreterBuilder.create_dot

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != language.bfloat16:
            return handle
        bits = handle.data.astype(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), language.float32)

    def widened(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return dot(self, widen(left), widen(right), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)


@pytest.fixture(autouse=True)
def scalars_of_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loop bounds be arrays of one element, which NumPy 2.4 no longer turns into numbers for Triton 3.6."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def pack(pattern: Block, out: int, in_: int, dtype: torch.dtype = torch.float16, sparsity: float = 0.6) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out + in_)).to(dtype)
    return BlockFormat().pack(weight, choose(pattern, weight, sparsity), pattern)


def check(packed: Packed, tokens: int, variant: str = "", act: Activation | None = None, bias: bool = False) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dtype = packed.tensors["values"].dtype
    x = torch.randn(tokens, packed.shape[1], generator=generator).to(dtype)
    b = torch.randn(packed.shape[0], generator=generator).to(dtype) if bias else None
    prepared = KERNEL.prepare(packed, spec_for(packed, (tokens,)))
    y = KERNEL.run(dataclasses.replace(prepared, variants=f"1={variant}" if variant else ""), x, b, act)
    assert difference(y, x, unpack(packed), b, act) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", TILES, ids=str)
def test_the_kernel_equals_float64_over_tokens_and_odd_shapes(pattern: Block, dtype: torch.dtype) -> None:
    for out, in_ in ((1, 1), (33, 70), (144, 200)):
        check(pack(pattern, out, in_, dtype), 5, bias=True)
    packed = pack(pattern, 70, 192, dtype)
    for tokens in (0, 1, 2, 16, 17, 130):
        check(packed, tokens, bias=tokens % 2 == 0)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bias_and_activation_are_fused(activation: Activation) -> None:
    packed = pack(Block(32, 64), 64, 256)
    for variant in ("", "tokens16.warps4.stages4.ptr.split4", "tokens64.warps4.stages3.run2.split1"):
        check(packed, 17, variant, activation, True)
        check(packed, 17, variant, activation)


def test_empty_and_full_rows_of_tiles_are_computed() -> None:
    pattern = Block(64, 64)
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    keep[0], keep[2] = False, True
    for tiles in (keep, torch.zeros_like(keep), torch.ones_like(keep)):
        packed = BlockFormat().pack(torch.randn(256, 384).half(), pattern.expand(tiles), pattern)
        for variant in ("", "tokens32.warps4.stages3.ptr.split2", "tokens32.warps4.stages3.run2.split1"):
            check(packed, 70, variant, "silu", True)


@pytest.mark.parametrize("pattern", [Block(64, 64), Block(32, 16)], ids=str)
def test_every_variant_gives_the_float64_result_for_any_token_count(pattern: Block) -> None:
    packed = pack(pattern, 64, 128, sparsity=0.5)
    cuda = dataclasses.replace(spec_for(packed, (1,)), device=torch.device("cuda", 0), capability=(9, 0))
    names = {name for tokens in (1, 17, 64, 130, 512, 2048, 8192) for name in KERNEL.variants(cuda, tokens)}
    assert len(names) > 10
    for number, name in enumerate(sorted(names)):
        check(packed, (3, 40, 130)[number % 3], name, bias=number % 2 == 0)


def test_views_and_unaligned_inputs_are_accepted() -> None:
    packed = pack(Block(16, 64), 32, 64)
    prepared = KERNEL.prepare(packed, spec_for(packed, (4,)))
    base = torch.randn(8, 130).half()
    for x in (base[:4, 1:65], base[::2, ::2][:, :64], base[0, 1:65].expand(4, 64)):
        assert difference(KERNEL.run(prepared, x), x, unpack(packed)) is None


def test_every_element_is_written_and_a_corrupted_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: Any, **names: Any) -> torch.Tensor:
        made = empty(self, *shape, **names)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    packed = pack(Block(16, 16), 100, 128)
    for variant in ("", "tokens16.warps4.stages4.ptr.split4"):
        check(packed, 21, variant)
    prepared = KERNEL.prepare(packed, spec_for(packed, (4,)))
    prepared.tensors[2].view(-1)[77] += 2
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)).half()
    assert "outputs differ from float64" in (difference(KERNEL.run(prepared, x), x, unpack(packed)) or "")


def test_a_variant_that_does_not_fit_is_refused() -> None:
    packed = pack(Block(16, 16), 16, 16)
    prepared = KERNEL.prepare(packed, spec_for(packed, (1,)))
    for name in ("tokens16.warps4.stages4.tma.split1", "fast"):
        with pytest.raises(KernelError, match="does not fit these tiles"):
            KERNEL.run(dataclasses.replace(prepared, variants=f"1={name}"), torch.randn(1, 16).half())
