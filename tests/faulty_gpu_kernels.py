"""Kernels that go wrong on a CUDA device; the self-test's child finds them by name through `faulty`."""

import importlib
from dataclasses import dataclass

import torch

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.epilogue import finish
from sparsify_compiler.runtime.formats import unpack

FIND = "faulty_gpu_kernels:faulty"
SOURCE = """
extern "C" __global__ void illegal_access(float* p) { p[(1ll << 40) + threadIdx.x] = 1.0f; }
extern "C" __global__ void endless(volatile int* p) { while (*p == 0) {} }
"""


@dataclass(frozen=True)
class Faulty:
    """A dense product under another name, with the fault that its name says."""

    name: str

    def rejects(self, spec: MatmulSpec) -> str | None:
        return None

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        return ("",)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        return Prepared(self.name, packed.shape, (unpack(packed).to(spec.device, spec.dtype),))

    def run(
        self,
        prepared: Prepared,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        if self.name in ("illegal_access", "endless"):
            cupy = importlib.import_module("cupy")
            word = torch.zeros(1, device=x.device)
            cupy.RawModule(code=SOURCE).get_function(self.name)((1,), (1,), (word.data_ptr(),))
        y = finish(torch.nn.functional.linear(x, prepared.tensors[0]), bias, activation)
        if self.name == "asks_the_host":
            y = y + float(torch.isnan(y).any())
        if self.name == "endless":
            torch.cuda.synchronize()
        return y


def faulty(name: str) -> Faulty:
    """Find one, as `kernel_named` does."""
    return Faulty(name)
