"""The C functions of cuSPARSE that sparse products need, through ctypes.

CuPy's own binding has no BSR, no Blocked-ELL and no preprocessing, and `cupyx.cusparse` makes descriptors and asks for
workspace at every call and knows no 16-bit type. One way to call the library serves all of them. The signatures and
numbers below are those of cusparse.h of cuSPARSE 12.4 to 12.9; tests/cpu/test_cusparse.py compares them with the
header where one is installed.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from sparsify_compiler.errors import KernelError

OLDEST_VERSION = (12, 4, 1)
"""The first release with `cusparseSpMV_preprocess` (CUDA 12.4)."""

INSTALL_LINE = "pip install nvidia-cusparse (CUDA 13), or nvidia-cusparse-cu12"
SUCCESS = 0
INDEX_32I = 2
BASE_ZERO = 0

DATA_TYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 14}
"""The numbers of cudaDataType."""


class Order(IntEnum):
    """cusparseOrder_t."""

    COLUMN = 1
    ROW = 2


class Operation(IntEnum):
    """cusparseOperation_t, without the conjugate."""

    NONE = 0
    TRANSPOSE = 1


class SpMM(IntEnum):
    """cusparseSpMMAlg_t, as far as it is used. NVIDIA promises equal bits in every run for CSR_3 and BSR only."""

    CSR_1 = 4
    CSR_2 = 6
    CSR_3 = 12
    BLOCKED_ELL = 13
    BSR = 14


class SpMV(IntEnum):
    """cusparseSpMVAlg_t, as far as it is used. CSR_2 gives equal bits in every run."""

    CSR_1 = 2
    CSR_2 = 3
    BSR = 6


_POINTER = ctypes.c_void_p
_OUT = ctypes.POINTER(ctypes.c_void_p)
_SIZE = ctypes.POINTER(ctypes.c_size_t)
_INT = ctypes.c_int
_LONG = ctypes.c_int64
_CSR = (_OUT, _LONG, _LONG, _LONG, *(_POINTER,) * 3, *(_INT,) * 4)
_BSR = (_OUT, *(_LONG,) * 5, *(_POINTER,) * 3, *(_INT,) * 5)
_BLOCKED_ELL = (_OUT, *(_LONG,) * 4, *(_POINTER,) * 2, *(_INT,) * 3)
_SPMM = (_POINTER, _INT, _INT, *(_POINTER,) * 5, _INT, _INT)
_SPMV = (_POINTER, _INT, *(_POINTER,) * 5, _INT, _INT)

SIGNATURES: Mapping[str, tuple[type, ...]] = {
    "cusparseGetProperty": (_INT, ctypes.POINTER(_INT)),
    "cusparseCreate": (_OUT,),
    "cusparseDestroy": (_POINTER,),
    "cusparseSetStream": (_POINTER, _POINTER),
    "cusparseCreateCsr": _CSR,
    "cusparseCreateBsr": _BSR,
    "cusparseCreateBlockedEll": _BLOCKED_ELL,
    "cusparseDestroySpMat": (_POINTER,),
    "cusparseCreateDnMat": (_OUT, _LONG, _LONG, _LONG, _POINTER, _INT, _INT),
    "cusparseDnMatSetValues": (_POINTER, _POINTER),
    "cusparseDestroyDnMat": (_POINTER,),
    "cusparseCreateDnVec": (_OUT, _LONG, _POINTER, _INT),
    "cusparseDnVecSetValues": (_POINTER, _POINTER),
    "cusparseDestroyDnVec": (_POINTER,),
    "cusparseSpMM_bufferSize": (*_SPMM, _SIZE),
    "cusparseSpMM_preprocess": (*_SPMM, _POINTER),
    "cusparseSpMM": (*_SPMM, _POINTER),
    "cusparseSpMV_bufferSize": (*_SPMV, _SIZE),
    "cusparseSpMV_preprocess": (*_SPMV, _POINTER),
    "cusparseSpMV": (*_SPMV, _POINTER),
}
"""The arguments of every function called; each returns a cusparseStatus_t."""


class Calls:
    """The functions of one loaded library, with types declared and every status checked.

    `library` has the functions of `SIGNATURES` and `cusparseGetErrorName` as attributes, as `ctypes.CDLL` gives them.
    """

    def __init__(self, library: Any) -> None:
        """Declare the signatures.

        Raises:
            KernelError: the library lacks one of the functions.
        """
        missing = [name for name in (*SIGNATURES, "cusparseGetErrorName") if not hasattr(library, name)]
        if missing:
            raise KernelError(f"libcusparse has no {', '.join(missing)}: it is too old; {INSTALL_LINE}")
        self._functions = {name: getattr(library, name) for name in SIGNATURES}
        for name, function in self._functions.items():
            function.argtypes, function.restype = SIGNATURES[name], _INT
        self._error_name = library.cusparseGetErrorName
        self._error_name.argtypes, self._error_name.restype = (_INT,), ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            KernelError: its status is not success; the message has the library's own name for it.
        """
        status = self._functions[name](*arguments)
        if status != SUCCESS:
            raise KernelError(f"{name}: {self.error_name(status)} ({status})")

    def create(self, name: str, *arguments: Any) -> int:
        """Call a function whose first argument takes the address of the object it makes, and return that address."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value or 0

    def size(self, name: str, *arguments: Any) -> int:
        """Call a function whose last argument takes a size, and return the bytes."""
        size = ctypes.c_size_t()
        self.call(name, *arguments, ctypes.byref(size))
        return size.value

    def error_name(self, status: int) -> str:
        """Return the library's name of a status, such as CUSPARSE_STATUS_NOT_SUPPORTED."""
        name: bytes | None = self._error_name(status)
        return name.decode() if name else "unknown status"

    @functools.cached_property
    def version(self) -> tuple[int, int, int]:
        """The library's version; needs neither a handle nor a GPU."""
        parts = []
        for index in range(3):
            part = ctypes.c_int()
            self.call("cusparseGetProperty", index, ctypes.byref(part))
            parts.append(part.value)
        return parts[0], parts[1], parts[2]


@functools.lru_cache(maxsize=1)
def load() -> Calls | str:
    """Load cuSPARSE once a process, or say why it cannot be and what to install.

    The copy that PyTorch has loaded is taken first, then CuPy's, then the nvidia wheels', then the system's.
    """
    if sys.platform != "linux":
        return f"cuSPARSE is called on Linux only; found {sys.platform}"
    library = _loaded() or _cupys() or _found()
    if library is None:
        return f"found no libcusparse.so: {INSTALL_LINE}"
    try:
        calls = Calls(library)
        version = calls.version
    except KernelError as error:
        return str(error)
    if version < OLDEST_VERSION:
        return f"needs cuSPARSE {_dotted(OLDEST_VERSION)} or newer; found {_dotted(version)}: {INSTALL_LINE}"
    return calls


def too_old(calls: Calls, needed: tuple[int, int, int], what: str) -> str | None:
    """Say that `what` needs a newer library, or return None."""
    if calls.version >= needed:
        return None
    return f"{what} needs cuSPARSE {_dotted(needed)} or newer; found {_dotted(calls.version)}: {INSTALL_LINE}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


_NAMES = ("libcusparse.so.13", "libcusparse.so.12")


def _loaded() -> Any:
    """Return the library that this process already holds, or None: two copies would hold two of every kernel."""
    for name in _NAMES:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue
    return None


def _cupys() -> Any:
    """Let CuPy find and load its library, which takes the dependencies along."""
    if importlib.util.find_spec("cupy_backends") is None:
        return None
    try:
        importlib.import_module("cupy_backends.cuda.libs.cusparse")
    except ImportError:  # CuPy without its CUDA wheels
        return None
    return _loaded()


def _found() -> Any:
    for path in (*map(str, installed_files("lib", "libcusparse.so.1[0-9]")), *_NAMES):
        try:
            return ctypes.CDLL(path)
        except OSError:  # not there, or without its dependencies
            continue
    return None


def installed_files(folder: str, pattern: str) -> Iterator[Path]:
    """Find files in the nvidia wheels of this environment: nvidia/<package>/<folder>/<pattern>."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from sorted(Path(place).glob(f"*/{folder}/{pattern}"), reverse=True)
