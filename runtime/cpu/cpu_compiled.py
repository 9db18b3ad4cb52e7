"""Functions that Numba compiles for a CPU, run on PyTorch's own OpenMP threads.

Numba has threads of its own, but beside PyTorch's they fight for the same cores, and its threading layer that every
wheel has ends the process when two Python threads use it at once. PyTorch's wheels for Linux bring GNU OpenMP, whose
`GOMP_parallel` runs any C function on the team that PyTorch keeps warm for the calling thread.

Nothing is written to disk: compiling takes about 0.4 s a function and process, and a cache beside the source would
need a writable installation.
"""

import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.kernel import MatmulSpec
from sparsify_compiler.runtime.refusals import not_in, not_on

INSTALL = "pip install 'sparsify-compiler[cpu]'"
ENTRY = "GOMP_parallel"

FASTMATH = frozenset({"contract"})
"""Multiply and add in one rounding; sums stay in the order written, NaN and infinity keep their meaning."""


def rejects(spec: MatmulSpec) -> str | None:
    """Say why no compiled function can run `spec`, or None."""
    why = " alone, any other type would be converted at every call"
    return elsewhere(spec) or not_in(spec, (torch.float32,), why) or unavailable()


def elsewhere(spec: MatmulSpec) -> str | None:
    """Say that a device is no CPU, or None. Kernels ask this first, so that a GPU hears one reason from all of them."""
    return not_on(spec, "cpu")


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Return None, or what is missing on this machine and how to get it."""
    if importlib.util.find_spec("numba") is None:
        return f"Numba is not installed: {INSTALL}"
    if _openmp() is None:
        return "this PyTorch does not run on GNU OpenMP (its wheels for Linux do), whose threads are needed"
    return None


@functools.lru_cache(maxsize=1)
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that PyTorch loaded, if it is GNU's or speaks its language."""
    if sys.platform == "win32":
        return None
    loaded = ctypes.CDLL(None)  # every library that was loaded for all to see; torch shows its OpenMP
    return loaded if hasattr(loaded, ENTRY) else None


@functools.cache
def _parallel() -> Any:
    call = getattr(_openmp(), ENTRY)
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    call.restype = None
    return call


class Toolbox:
    """What a function to be compiled may call: Numba itself, the thread's number and the pointers it is given.

    `floats`, `ints` turn an address (int64) into a pointer to float32, int32. `rank` and `team` are OpenMP's number
    of the calling thread and of all threads of the region.
    """

    def __init__(self) -> None:
        self.numba: Any = importlib.import_module("numba")
        self.carray = self.numba.carray
        extending: Any = importlib.import_module("numba.extending")
        types = self.numba.types
        self.floats = _pointer(extending, types.CPointer(types.float32), types.int64)
        self.ints = _pointer(extending, types.CPointer(types.int32), types.int64)
        library = _openmp()
        assert library is not None
        number = ctypes.CFUNCTYPE(ctypes.c_int)
        self.rank = number(("omp_get_thread_num", library))
        self.team = number(("omp_get_num_threads", library))

    def entry(self, function: Callable[..., None], any_order: bool = False) -> Any:
        """Compile `function(arguments)`, `arguments` a pointer to int64, into one that OpenMP can call.

        `any_order` lets the compiler sum in the order that fills vectors: for dot products of values side by side.
        Sums over indexed values must not be given it: they become gathers, three times as slow (runtime/NOTES.md).
        """
        types = self.numba.types
        fastmath = {*FASTMATH, "reassoc"} if any_order else set(FASTMATH)
        return self.numba.cfunc(types.void(types.CPointer(types.int64)), fastmath=fastmath)(function)

    def inner(self, function: Callable[..., None]) -> Any:
        """Compile a function that entries call."""
        return self.numba.njit(fastmath=set(FASTMATH))(function)


@functools.lru_cache(maxsize=1)
def toolbox() -> Toolbox:
    """Return the one toolbox of the process."""
    return Toolbox()


def _pointer(extending: Any, pointer: Any, address: Any) -> Any:
    def convert(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return pointer(address), generate

    return extending.intrinsic(convert)


def launch(entry: Any, arguments: Sequence[Tensor | int | None]) -> None:
    """Run a compiled entry on as many threads as PyTorch uses; tensors are passed by address, None as 0.

    The caller keeps the tensors contiguous and alive. Python runs on in other threads meanwhile.
    """
    values = (ctypes.c_int64 * len(arguments))(*(a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments))
    _parallel()(entry.address, ctypes.addressof(values), torch.get_num_threads(), 0)


def token_tiles(x: Tensor, width: int, columns: int) -> Tensor:
    """Return `x` (tokens, in) as (tiles, columns, width), columns >= in: a column of `width` tokens is contiguous.

    Zeros stand beyond the tokens and beyond `in`.
    """
    tokens, in_ = x.shape
    padding = (0, columns - in_, 0, -tokens % width)
    padded = functional.pad(x, padding) if any(padding) else x
    return padded.reshape(padded.shape[0] // width, width, columns).transpose(1, 2).contiguous()
