"""Kernels that go wrong in every way a self-test must survive. The child finds them by name through `faulty`."""

import ctypes
import os
import time
from dataclasses import dataclass

import torch

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.epilogue import finish
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.variants import variant_for


@dataclass(frozen=True)
class Faulty:
    """A dense product under another name, with the fault that its name says."""

    name: str

    def rejects(self, spec: MatmulSpec) -> str | None:
        if self.name == "picky_about_sides" and spec.in_ % 16:
            return "needs whole 16 columns"
        return None

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        return ("good", "bad") if self.name == "wrong_in_one_variant" and tokens > 16 else ("",)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        if self.name == "unknown_error":
            raise ZeroDivisionError("this is nobody's error to catch")
        return Prepared(self.name, packed.shape, (unpack(packed),))

    def run(
        self,
        prepared: Prepared,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        y = finish(x @ prepared.tensors[0].T, bias, activation)
        if self.name == "crashes":
            ctypes.string_at(0)
        elif self.name == "is_killed":
            os.kill(os.getpid(), 9)
        elif self.name == "hangs":
            time.sleep(3600)
        elif self.name == "garbage":
            return torch.randn_like(y)
        elif self.name == "prints":
            os.write(1, b"x" * 200_000 + b"\n{}\n")
            os.write(2, b"y" * 200_000)
        elif self.name == "raises":
            raise RuntimeError("no such product\nwith details")
        elif self.name == "full":
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        elif self.name == "skips_the_last_column":
            return torch.empty_like(y).index_copy_(1, torch.arange(y.shape[1] - 1), y[:, :-1])
        elif self.name == "refuses_strides" and not x.is_contiguous():
            raise KernelError("x must be contiguous")
        elif variant_for(prepared.variants, x.shape[0]) == "bad":
            return y + 1
        return y


def faulty(name: str) -> Faulty:
    """Find one, as `kernel_named` does."""
    return Faulty(name)
