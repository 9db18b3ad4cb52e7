"""Kernels say why they cannot run in one order and in the same words."""

import dataclasses

import pytest
import torch

from sparsify_compiler.kernel import Kernel, MatmulSpec
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.kernels import kernels
from sparsify_compiler.runtime.refusals import not_in, not_on, not_two_of_four, older_than
from tests.kernels import DTYPES, LAYOUT_PATTERNS

SPARSE = [kernel for kernel in kernels() if kernel.name != "dense"]
CUDA_SPEC = MatmulSpec(64, 64, torch.float16, NM(2, 4), 0.5, (1,), torch.device("cuda", 0), (9, 0))


@pytest.mark.parametrize("kernel", SPARSE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_kernel_for_another_device_says_so_whatever_the_pattern_and_dtype(kernel: Kernel, device: str) -> None:
    own = "cuda" if not kernel.name.startswith(("numba", "torch", "block_gather")) else "cpu"
    if device == own or (kernel.name == "torch_csr" and device == "cuda"):
        return
    for pattern in LAYOUT_PATTERNS:
        for dtype in DTYPES:
            spec = dataclasses.replace(CUDA_SPEC, pattern=pattern, dtype=dtype, device=torch.device(device))
            reason = kernel.rejects(dataclasses.replace(spec, capability=None)) or ""
            assert reason.startswith(f"runs on {own}")
            assert reason.endswith(f"; found {device}")


@pytest.mark.parametrize("kernel", SPARSE, ids=lambda kernel: kernel.name)
def test_no_reason_spells_a_dtype_as_torch_does(kernel: Kernel) -> None:
    for device in ("cpu", "cuda"):
        for pattern in LAYOUT_PATTERNS:
            for dtype in (*DTYPES, torch.int8):
                spec = dataclasses.replace(CUDA_SPEC, pattern=pattern, dtype=dtype, device=torch.device(device))
                assert "torch." not in (kernel.rejects(spec) or "")


def test_the_words_name_what_would_do_and_what_was_found() -> None:
    assert not_on(CUDA_SPEC, "cuda") is None
    assert not_on(CUDA_SPEC, "cpu") == "runs on cpu; found cuda"
    assert not_in(CUDA_SPEC, (torch.float32,)) == "runs float32; found float16"
    wide = (torch.bfloat16, torch.float32, torch.float64)
    assert not_in(CUDA_SPEC, wide, " on a CPU") == "runs bfloat16, float32 and float64 on a CPU; found float16"
    assert not_two_of_four(dataclasses.replace(CUDA_SPEC, pattern=NM(4, 8))) == "runs 2:4, 1:4 and 1:2; found 4:8"
    assert older_than(CUDA_SPEC, (9, 0)) is None
    assert older_than(CUDA_SPEC, (10, 0)) == "needs compute capability 10.0 or later; found 9.0"
