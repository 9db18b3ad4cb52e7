"""2:4 products by cuSPARSELt itself, with everything that its calls need kept: a call is one function of the library.

PyTorch's binding makes descriptors and a plan at every call (aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp), which
is the floor of 370-450 us an eager call measured on an H200; PyTorch's pull requests 177866 and 179642 find the same.

Read from cusparseLt.h of versions 0.7.1 to 0.10.0, which agree in all that is used here. Opaque structures are at most
1024 bytes there and may point to each other, so each plan keeps all of its own in one tensor that never moves. Not run
on a GPU yet; `cusparselt.TorchProducts` is the way through PyTorch.
"""

import ctypes
import functools
import importlib.util
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.on_device import device_index, guard, stream_address

STRUCT_BYTES = 4096
INSTALL = "pip install nvidia-cusparselt-cu13 (CUDA 12: nvidia-cusparselt-cu12); PyTorch's CUDA wheels bring it"

# Numbers of library_types.h, cusparse.h and cusparseLt.h.
DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
NON_TRANSPOSE, TRANSPOSE = 0, 1
COLUMN_ORDER, ROW_ORDER = 1, 2
HALF_THE_ENTRIES, COMPUTE_FLOAT32, DEFAULT_ALGORITHM = 0, 2, 0
RELU, BIAS_POINTER = 0, 8
ALGORITHM_ID, ALGORITHM_COUNT, SPLIT, SPLIT_MODE = 0, 1, 3, 4

_P, _I, _L, _U, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_size_t
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusparseLtInit": (_P,),
    "cusparseLtGetProperty": (_I, _P),
    "cusparseLtDenseDescriptorInit": (_P, _P, _L, _L, _L, _U, _I, _I),
    "cusparseLtStructuredDescriptorInit": (_P, _P, _L, _L, _L, _U, _I, _I, _I),
    "cusparseLtMatDescriptorDestroy": (_P,),
    "cusparseLtMatmulDescriptorInit": (_P, _P, _I, _I, _P, _P, _P, _P, _I),
    "cusparseLtMatmulDescSetAttribute": (_P, _P, _I, _P, _S),
    "cusparseLtMatmulAlgSelectionInit": (_P, _P, _P, _I),
    "cusparseLtMatmulAlgSetAttribute": (_P, _P, _I, _P, _S),
    "cusparseLtMatmulAlgGetAttribute": (_P, _P, _I, _P, _S),
    "cusparseLtMatmulAlgSelectionDestroy": (_P,),
    "cusparseLtMatmulPlanInit": (_P, _P, _P, _P),
    "cusparseLtMatmulPlanDestroy": (_P,),
    "cusparseLtMatmulGetWorkspace": (_P, _P, _P),
    "cusparseLtMatmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, ctypes.c_int32),
    "cusparseLtSpMMACompressedSize2": (_P, _P, _P, _P),
    "cusparseLtSpMMACompress2": (_P, _P, _I, _I, _P, _P, _P, _P),
}
"""Arguments of the functions used; all return an int status, 0 for success."""


@dataclass(frozen=True)
class Algorithm:
    """One of the library's algorithms; columns split in `split` parts (1: not), in the way `mode` (-1: its choice)."""

    number: int = 0
    split: int = 1
    mode: int = -1


@dataclass(frozen=True)
class Call:
    """What a plan is made for: `out` x `in_` by `in_` x `tokens`, all padded to the library's multiples.

    `bias` is an address on the device or 0; it is part of the plan, as the library reads it from there.
    """

    device: int
    thread: int
    out: int
    in_: int
    tokens: int
    dtype: torch.dtype
    bias: int
    relu: bool
    algorithm: Algorithm


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan with the structures it points to: rows of `structures` (uint8), and float32 1 and 0 behind them."""

    handle: Tensor
    structures: Tensor
    workspace_bytes: int

    def address(self, row: int) -> int:
        """Return the address of structure `row`: weight, x, y, product, algorithm, plan, numbers."""
        return self.structures.data_ptr() + row * STRUCT_BYTES


@dataclass(frozen=True)
class Plans:
    """Products with plans kept by call (see `Call`). `library` stands in for the one that is installed, in tests."""

    library: Any = None

    def unavailable(self) -> str | None:
        """Return None, or why the library cannot be used here and what to install."""
        if self.library is not None:
            return None
        return find_library()[1]

    def compress(self, weight: Tensor) -> Tensor:
        """Compress `weight` (out, in), multiples of 16, at most 2 of every 4 entries not 0, to uint8."""
        library, device = self._loaded(), device_index(weight.device)
        weight = weight.contiguous()
        with guard(weight.device):
            handle = _handle(library, device, threading.get_ident())
            sizes = torch.zeros(2, dtype=torch.int64)
            descriptor = torch.zeros(STRUCT_BYTES, dtype=torch.uint8)
            _weight(library, handle, descriptor.data_ptr(), weight.shape[0], weight.shape[1], weight.dtype)
            place = sizes.data_ptr()
            _do(library, "cusparseLtSpMMACompressedSize2", handle.data_ptr(), descriptor.data_ptr(), place, place + 8)
            compressed = torch.empty(int(sizes[0]), dtype=torch.uint8, device=weight.device)
            buffer = torch.empty(max(int(sizes[1]), 16), dtype=torch.uint8, device=weight.device)
            where = (weight.data_ptr(), compressed.data_ptr(), buffer.data_ptr(), stream_address(weight.device))
            _do(
                library,
                "cusparseLtSpMMACompress2",
                *(handle.data_ptr(), descriptor.data_ptr(), 1, NON_TRANSPOSE, *where),
            )
            _do(library, "cusparseLtMatDescriptorDestroy", descriptor.data_ptr())
        return compressed

    def multiply(
        self, compressed: Tensor, out: int, x: Tensor, bias: Tensor | None, relu: bool, algorithm: Algorithm
    ) -> Tensor:
        """Return relu(x Wᵀ + bias), (tokens, out), for `x` (tokens, in) contiguous; multiples of 8, 16 and 16.

        A bias of another length than `out`, or not at a 16-byte address, goes in as the matrix that is added to.
        """
        library, device = self._loaded(), device_index(x.device)
        tokens, in_ = x.shape
        fused = bias is not None and bias.shape[0] == out and bias.data_ptr() % 16 == 0
        address = bias.data_ptr() if bias is not None and fused else 0
        call = Call(device, threading.get_ident(), out, in_, tokens, x.dtype, address, relu, algorithm)
        with guard(x.device):
            plan = plan_for(library, call)
            y = x.new_empty((tokens, out))
            added = bias is not None and not fused
            if bias is not None and added:
                y.copy_(torch.nn.functional.pad(bias, (0, out - bias.shape[0])))
            workspace = torch.empty(max(plan.workspace_bytes, 16), dtype=torch.uint8, device=x.device)
            streams = (ctypes.c_void_p * 1)(stream_address(x.device))
            one = plan.address(6)
            _do(
                library,
                "cusparseLtMatmul",
                *(
                    plan.handle.data_ptr(),
                    plan.address(5),
                    one,
                    compressed.data_ptr(),
                    x.data_ptr(),
                    one if added else one + 4,
                ),
                *(y.data_ptr(), y.data_ptr(), workspace.data_ptr(), ctypes.addressof(streams), 1),
            )
        return y

    def algorithms(self, out: int, in_: int, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return how many algorithms the library has for this product: their numbers start at 0."""
        library = self._loaded()
        with guard(device):
            call = Call(device_index(device), threading.get_ident(), out, in_, tokens, dtype, 0, False, Algorithm())
            plan = plan_for(library, call)
            count = torch.zeros(1, dtype=torch.int32)
            where = (plan.handle.data_ptr(), plan.address(4), ALGORITHM_COUNT, count.data_ptr(), 4)
            _do(library, "cusparseLtMatmulAlgGetAttribute", *where)
        return int(count)

    def _loaded(self) -> Any:
        if self.library is not None:
            return self.library
        library, reason = find_library()
        if library is None:
            raise KernelError(f"cuSPARSELt cannot be used: {reason}")
        return library


@functools.lru_cache(maxsize=1)
def find_library() -> tuple[Any, str | None]:
    """Return (the library, None), or (None, why not): what PyTorch loaded already, else the wheel's own file."""
    names = ["libcusparseLt.so.0", *map(str, wheel_files("lib/libcusparseLt.so.0"))]
    reason = ""
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            reason = str(error)
            continue
        for function, arguments in SIGNATURES.items():
            if hasattr(library, function):
                getattr(library, function).argtypes = arguments
        version = [_property(library, part) for part in range(2)]
        if not (0, 7) <= tuple(version) < (1, 0):
            return None, f"cuSPARSELt {version[0]}.{version[1]} is not one of 0.7 to 0.x; {INSTALL}"
        return library, None
    return None, f"no libcusparseLt.so.0 ({reason}): {INSTALL}"


def wheel_files(name: str) -> tuple[Path, ...]:
    """Return where NVIDIA's wheels have put a file of this name: they share the folder `nvidia` of site-packages."""
    spec = importlib.util.find_spec("nvidia")
    folders = () if spec is None else spec.submodule_search_locations or ()
    return tuple(path for folder in folders for path in sorted(Path(folder).glob(f"*/{name}")))


@functools.lru_cache(maxsize=1024)
def plan_for(library: Any, call: Call) -> Plan:
    """Make the plan for `call` on the current device, or return the one made before.

    Raises:
        KernelError: the library refuses it.
    """
    handle = _handle(library, call.device, call.thread)
    structures = torch.zeros(7 * STRUCT_BYTES, dtype=torch.uint8)
    plan = Plan(handle, structures, 0)
    weight, x, y, product, algorithm, made, numbers = (plan.address(row) for row in range(7))
    own = handle.data_ptr()
    structures.view(torch.float32)[6 * STRUCT_BYTES // 4] = 1.0
    kind = DATA_TYPES[call.dtype]
    _weight(library, handle, weight, call.out, call.in_, call.dtype)
    # x is (tokens, in) by rows and y (tokens, out) by rows, which is out x tokens by columns.
    dense = "cusparseLtDenseDescriptorInit"
    _do(library, dense, own, x, call.tokens, call.in_, call.in_, 16, kind, ROW_ORDER)
    _do(library, dense, own, y, call.out, call.tokens, call.out, 16, kind, COLUMN_ORDER)
    parts = (NON_TRANSPOSE, TRANSPOSE, weight, x, y, y, COMPUTE_FLOAT32)
    _do(library, "cusparseLtMatmulDescriptorInit", own, product, *parts)
    if call.bias:
        _set(library, "cusparseLtMatmulDescSetAttribute", own, product, BIAS_POINTER, ctypes.c_void_p(call.bias))
    if call.relu:
        _set(library, "cusparseLtMatmulDescSetAttribute", own, product, RELU, ctypes.c_int(1))
    _do(library, "cusparseLtMatmulAlgSelectionInit", own, algorithm, product, DEFAULT_ALGORITHM)
    chosen = call.algorithm
    settings = ((ALGORITHM_ID, chosen.number, -1), (SPLIT, chosen.split, 1), (SPLIT_MODE, chosen.mode, -1))
    for attribute, value, default in settings:
        if value != default:
            _set(library, "cusparseLtMatmulAlgSetAttribute", own, algorithm, attribute, ctypes.c_int(value))
    _do(library, "cusparseLtMatmulPlanInit", own, made, product, algorithm)
    _do(library, "cusparseLtMatmulGetWorkspace", own, made, numbers + 8)
    bytes_ = int(structures.view(torch.int64)[(6 * STRUCT_BYTES + 8) // 8])
    finished = Plan(handle, structures, bytes_)
    weakref.finalize(finished, _destroy, library, handle, structures).atexit = False
    return finished


def _destroy(library: Any, handle: Tensor, structures: Tensor) -> None:
    """Give back what a plan holds on the host; `handle` is an argument so that it outlives the plan."""
    start = structures.data_ptr()
    library.cusparseLtMatmulPlanDestroy(start + 5 * STRUCT_BYTES)
    if hasattr(library, "cusparseLtMatmulAlgSelectionDestroy"):  # from 0.8 on
        library.cusparseLtMatmulAlgSelectionDestroy(start + 4 * STRUCT_BYTES)
    for row in range(3):
        library.cusparseLtMatDescriptorDestroy(start + row * STRUCT_BYTES)


@functools.lru_cache(maxsize=1024)
def _handle(library: Any, device: int, thread: int) -> Tensor:
    """Start the library on the current device, `device`. One for each thread, as PyTorch has them."""
    handle = torch.zeros(STRUCT_BYTES, dtype=torch.uint8)
    _do(library, "cusparseLtInit", handle.data_ptr())
    return handle


def _weight(library: Any, handle: Tensor, place: int, out: int, in_: int, dtype: torch.dtype) -> None:
    kind = (16, DATA_TYPES[dtype], ROW_ORDER, HALF_THE_ENTRIES)
    _do(library, "cusparseLtStructuredDescriptorInit", handle.data_ptr(), place, out, in_, in_, *kind)


def _property(library: Any, part: int) -> int:
    value = ctypes.c_int(0)
    _do(library, "cusparseLtGetProperty", part, ctypes.addressof(value))
    return value.value


def _set(library: Any, function: str, handle: int, place: int, attribute: int, value: Any) -> None:
    _do(library, function, handle, place, attribute, ctypes.addressof(value), ctypes.sizeof(value))


def _do(library: Any, function: str, *arguments: int) -> None:
    status = getattr(library, function)(*arguments)
    if status != 0:
        raise KernelError(
            f"cuSPARSELt: {function} returned status {status} (cusparseStatus_t); "
            f"CUSPARSELT_LOG_LEVEL=5 in the environment makes it print the reason"
        )
