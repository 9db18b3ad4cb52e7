"""A GPU made up: tensors that say they lie on cuda:0, over the CPU's memory, and refuse what CUDA refuses.

An operation that mixes them with tensors of the CPU raises as it would on a GPU, and what makes the host wait for a
value is counted. Numbers are the CPU's: this tells where tensors lie, not how a GPU rounds or how fast it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
MEMORY = 16 << 30
TAKES_INDICES_OF_THE_HOST = ("index", "index_put", "index_put_")


class GPUTensor(Tensor):
    """A tensor on the made-up GPU; to PyTorch itself it has no memory, and every operation comes to `PretendGPU`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GPUTensor":
        made: GPUTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )
        made.inner = inner
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def tolist(self) -> Any:
        """Read it through the host."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory that it has in truth."""
        return self.inner.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GPUTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse."""
        raise RuntimeError(f"{func}: the made-up GPU is gone; bring its tensors to the CPU within pretend_gpu")


class PretendGPU(TorchDispatchMode):
    """Runs every operation on the CPU's memory and says where its result lies; `waits` counts values asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `PretendGPU`."""
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, GPUTensor)]
        moves = name == "copy_" or kwargs.get("device") is not None
        if here and not moves:
            host = [t for t in tensors if not isinstance(t, GPUTensor) and t.dim()]
            if host and not (name in TAKES_INDICES_OF_THE_HOST and isinstance(args[0], GPUTensor)):
                raise RuntimeError(f"{func}: expected all tensors on the same device; {len(host)} lie on the CPU")
        on_gpu = _is_gpu(kwargs["device"]) if kwargs.get("device") is not None else bool(here)
        to_host = moves and bool(here) and not (isinstance(args[0], GPUTensor) if name == "copy_" else on_gpu)
        self.waits += name in ("_local_scalar_dense", "nonzero", "equal") and bool(here)
        self.waits += to_host
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu") if kwargs["device"] is not None else None
        made = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name == "copy_":
            return args[0]
        if to_host:
            return made.clone()
        known = {id(tensor.inner): tensor for tensor in here}  # what was written in place is what it was
        return tree_map(lambda leaf: known[id(leaf)] if id(leaf) in known else _outer(leaf), made) if on_gpu else made


class _Lists(TorchFunctionMode):
    """Makes tensors of numbers on the CPU and moves them: PyTorch would ask for CUDA first."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and _is_gpu(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if func is Tensor.new_tensor and isinstance(args[0], GPUTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(GPU)
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, GPUTensor) else leaf


def _outer(leaf: Any) -> Any:
    return GPUTensor(leaf) if isinstance(leaf, Tensor) else leaf


@contextmanager
def pretend_gpu(free: int = MEMORY) -> Iterator[PretendGPU]:
    """Give a GPU with `free` of 16 GiB; tensors move there by `.to(GPU)` and are done with when the block ends."""
    properties = type("Properties", (), {"total_memory": MEMORY})
    with pytest.MonkeyPatch.context() as patch, _Lists(), PretendGPU() as gpu:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, MEMORY))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        yield gpu
