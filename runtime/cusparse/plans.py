"""Descriptors and workspace of cuSPARSE products, made once and kept as long as the weights live.

A warmed call sets the stream, points the two dense descriptors at x and y, and launches: nothing is created, asked
for or allocated, so it can be captured in a CUDA graph.

Where they live: `Prepared` holds tensors only, and rightly (it is copied, moved and saved). A plan belongs to the
process, like a compiled kernel. `Plans` finds it by the addresses of the weight's tensors. It holds weak references to
their storages (not to the tensors: PyTorch makes and drops aliases freely) and closes the plans of dead ones before it
looks anything up, so a new tensor at an old address never meets an old plan.
"""

import contextlib
import ctypes
import functools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.cusparse.library import DATA_TYPES, Calls, Operation, Order, load

MOST_PRODUCTS = 4096
"""Products whose plans are kept; the one not used for longest goes first, unless a CUDA graph holds its plan."""

_POINT = "cusparseDnMatSetValues"

Where = Callable[[torch.device], tuple[int, bool]]
"""The address of a device's current stream, and whether it is being captured in a CUDA graph."""


class Matrix(Protocol):
    """A sparse matrix in one of cuSPARSE's storage formats: its sizes, without the addresses. Hashable."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, padding included."""
        ...

    @property
    def analysed(self) -> bool:
        """Whether cuSPARSE gains from looking at the matrix before the first product: documented for CSR only."""
        ...

    def create(self, calls: Calls, tensors: Sequence[Tensor]) -> int:
        """Return a descriptor over the prepared tensors, to be destroyed by `cusparseDestroySpMat`."""
        ...


@dataclass(frozen=True)
class Dense:
    """How a dense operand lies in memory: rows and columns as cuSPARSE counts them, leading dimension, order."""

    rows: int
    columns: int
    leading: int
    order: Order


@dataclass(frozen=True)
class Product:
    """One call y = A x + beta y, all of it but the addresses; with `x` and `y` None, of vectors by SpMV.

    `operation` is what is done to x. Sums are taken in float64 for float64 and in float32 for all other dtypes.
    """

    matrix: Matrix
    dtype: torch.dtype
    algorithm: int
    x: Dense | None = None
    y: Dense | None = None
    operation: Operation = Operation.NONE


class Plan:
    """The descriptors and the workspace of one product on one device."""

    def __init__(
        self, calls: Calls, handle: int, product: Product, tensors: Sequence[Tensor], x: int, y: int, ready: bool
    ) -> None:
        """Make the descriptors and the workspace; with `ready`, let cuSPARSE analyse the matrix now.

        `x` and `y` are the addresses of the first call, so that the library sees what it will run.

        Raises:
            KernelError: cuSPARSE refuses the combination; what was made is destroyed.
        """
        self._calls, self._handle = calls, handle
        kind = "SpMV" if product.x is None else "SpMM"
        scalar = ctypes.c_double if product.dtype == torch.float64 else ctypes.c_float
        self._scalars = scalar(0), scalar(1)
        self._run, self._point = f"cusparse{kind}", "cusparseDnVecSetValues" if kind == "SpMV" else _POINT
        with contextlib.ExitStack() as made:
            matrix = product.matrix.create(calls, tensors)
            made.callback(calls.call, "cusparseDestroySpMat", matrix)
            self._x = self._dense(made, product, product.x, product.matrix.shape[1], x)
            self._y = self._dense(made, product, product.y, product.matrix.shape[0], y)
            self._assign, self._add = (self._arguments(product, matrix, beta) for beta in self._scalars)
            size = calls.size(f"cusparse{kind}_bufferSize", *self._assign)
            # Torch allocates it: it counts as torch's memory and lies in the graph's own pool under capture.
            self._workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=tensors[0].device)
            if ready and product.matrix.analysed:
                calls.call(f"cusparse{kind}_preprocess", *self._assign, self._workspace.data_ptr())
            owned = made.pop_all()
        # Not at exit: by then the driver may be gone, and the process takes everything with it.
        self._finalizer = weakref.finalize(self, owned.close)
        self._finalizer.atexit = False

    def launch(self, x: int, y: int, add: bool, stream: int) -> None:
        """Compute from the address `x` into `y`, added to what is there or not, on a stream by its address."""
        call = self._calls.call
        call("cusparseSetStream", self._handle, stream)
        call(self._point, self._x, x)
        call(self._point, self._y, y)
        call(self._run, *(self._add if add else self._assign), self._workspace.data_ptr())

    def close(self) -> None:
        """Destroy the descriptors; a second time does nothing."""
        self._finalizer()

    def _dense(
        self, made: contextlib.ExitStack, product: Product, dense: Dense | None, length: int, address: int
    ) -> int:
        kind = DATA_TYPES[product.dtype]
        if dense is None:
            descriptor = self._calls.create("cusparseCreateDnVec", length, address, kind)
            made.callback(self._calls.call, "cusparseDestroyDnVec", descriptor)
        else:
            sizes = (dense.rows, dense.columns, dense.leading)
            descriptor = self._calls.create("cusparseCreateDnMat", *sizes, address, kind, dense.order)
            made.callback(self._calls.call, "cusparseDestroyDnMat", descriptor)
        return descriptor

    def _arguments(self, product: Product, matrix: int, beta: ctypes.c_double | ctypes.c_float) -> tuple[object, ...]:
        operations = (Operation.NONE,) if product.x is None else (Operation.NONE, product.operation)
        compute = DATA_TYPES[torch.float64 if product.dtype == torch.float64 else torch.float32]
        scaled = (ctypes.addressof(self._scalars[1]), matrix, self._x, ctypes.addressof(beta), self._y)
        return (self._handle, *operations, *scaled, compute, product.algorithm)


def current_stream(device: torch.device) -> tuple[int, bool]:
    """Return the address of the device's current stream and whether it is being captured; (0, False) on a CPU."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


_Key = tuple[object, ...]
_Slot = tuple[bool, int]
"""Whether a CUDA graph owns the plan, and the stream: the workspace is written, so streams cannot share it."""


@dataclass
class _Entry:
    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    plans: dict[_Slot, Plan] = field(default_factory=dict)


def _warmed(entry: _Entry) -> Plan | None:
    """Give a graph that is being captured the plan of an eager stream, for good.

    A replay may run beside eager calls on that stream, which then make themselves another.
    """
    eager = next((slot for slot in entry.plans if not slot[0]), None)
    return None if eager is None else entry.plans.pop(eager)


class Plans:
    """All plans and handles of this process. Any thread, any device."""

    def __init__(self, calls: Calls, where: Where = current_stream, most: int = MOST_PRODUCTS) -> None:
        """Start with none, over the functions of one library."""
        self.calls = calls
        self._where, self._most = where, most
        self._lock = threading.Lock()
        self._handles: dict[int, int] = {}
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._captured: dict[_Key, _Entry] = {}
        self._dead: deque[_Key] = deque()

    def __len__(self) -> int:
        """Count the plans that are alive."""
        with self._lock:
            self._bury()
            return sum(len(entry.plans) for entry in (*self._entries.values(), *self._captured.values()))

    def run(self, product: Product, tensors: Sequence[Tensor], x: Tensor, y: Tensor, add: bool) -> None:
        """Put y = A x, or y += A x with `add`, on the current stream; `x` and `y` lie as `product` says.

        Raises:
            KernelError: cuSPARSE refuses, in its own words.
        """
        device = tensors[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            stream, captured = self._where(device)
            # One lock over the handle's stream, the descriptors' addresses and the launch: they are one statement.
            with self._lock:
                self._bury()
                key = (device, *(tensor.data_ptr() for tensor in tensors), product)
                entry = self._entry(key, tensors)
                plan = entry.plans.get((captured, stream)) or (_warmed(entry) if captured else None)
                if plan is None:
                    # Under capture an analysis would not run now but at every replay, so it is left out.
                    addresses = (x.data_ptr(), y.data_ptr())
                    plan = Plan(self.calls, self._handle(device), product, tensors, *addresses, ready=not captured)
                if captured and key in self._entries:
                    self._captured[key] = self._entries.pop(key)
                entry.plans[captured, stream] = plan
                plan.launch(x.data_ptr(), y.data_ptr(), add, stream)

    def _entry(self, key: _Key, tensors: Sequence[Tensor]) -> _Entry:
        entry = self._captured.get(key) or self._entries.get(key)
        if entry is not None:
            if key in self._entries:
                self._entries.move_to_end(key)
            return entry
        while len(self._entries) >= self._most:
            self._close(next(iter(self._entries)))
        storages = tuple(weakref.ref(t.untyped_storage(), lambda _: self._dead.append(key)) for t in tensors)
        entry = self._entries[key] = _Entry(storages)
        return entry

    def _handle(self, device: torch.device) -> int:
        index = device.index or 0
        if index not in self._handles:
            self._handles[index] = self.calls.create("cusparseCreate")
        return self._handles[index]

    def _bury(self) -> None:
        """Close the plans of weights that died. Their death may come amid anything, so it only leaves a note."""
        while self._dead:
            key = self._dead.popleft()
            entry = self._captured.get(key) or self._entries.get(key)
            if entry is not None and any(ref() is None for ref in entry.storages):
                self._close(key)

    def _close(self, key: _Key) -> None:
        entry = self._captured.pop(key, None) or self._entries.pop(key)
        for plan in entry.plans.values():
            plan.close()


class Library(Protocol):
    """Where cuSPARSE comes from."""

    def unavailable(self) -> str | None:
        """Return None, or why it cannot be called here and what to install."""
        ...

    def plans(self) -> Plans:
        """Return the plans of this process, always the same object.

        Raises:
            KernelError: the library is unavailable.
        """
        ...


@dataclass(frozen=True)
class InstalledLibrary:
    """The cuSPARSE of this environment; runtime/cusparse/library.py says how it is found."""

    def unavailable(self) -> str | None:
        """Say what to install, or None."""
        calls = load()
        return calls if isinstance(calls, str) else None

    def plans(self) -> Plans:
        """Return the plans of this process; see `Library`."""
        return _plans()


@functools.lru_cache(maxsize=1)
def _plans() -> Plans:
    calls = load()
    if isinstance(calls, str):
        raise KernelError(f"cuSPARSE cannot be called: {calls}")
    return Plans(calls)
