"""cuSPARSE without a GPU: the functions that cusparse/library.py calls, on CPU memory, through ctypes' own types.

It reads CSR, BSR, Blocked-ELL and dense operands by address, order and leading dimension, checks what the library
documents or was seen to check (statuses below), and keeps the rules of a preprocessed workspace. `calls` lists the
functions in the order they were called, `living` the objects not yet destroyed.
"""

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsify_compiler.runtime.cusparse.library import SIGNATURES, Calls
from sparsify_compiler.runtime.cusparse.plans import Plans, Where, current_stream

INVALID_VALUE, EXECUTION_FAILED, NOT_SUPPORTED = 3, 6, 10
NAMES = {3: b"CUSPARSE_STATUS_INVALID_VALUE", 6: b"CUSPARSE_STATUS_EXECUTION_FAILED"}
NAMES[10] = b"CUSPARSE_STATUS_NOT_SUPPORTED"
DTYPES = {0: torch.float32, 1: torch.float64, 2: torch.float16, 14: torch.bfloat16}
MARK = 0xA5


class Refused(Exception):
    """A status other than success."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def require(condition: bool, status: int = INVALID_VALUE) -> None:
    if not condition:
        raise Refused(status)


def memory(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """View `count` elements at an address, writable."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    require(address is not None and address % dtype.itemsize == 0)
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


@dataclass
class Made:
    kind: str
    values: dict[str, Any]
    active: int | None = None

    def __getattr__(self, name: str) -> Any:
        return self.values[name]


@dataclass
class FakeLibrary:
    """What `ctypes.CDLL` would be: every function of `SIGNATURES` as an attribute."""

    version: tuple[int, int, int] = (12, 6, 3)
    workspace_bytes: int = 64
    calls: list[str] = field(default_factory=list)
    living: dict[int, Made] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.next = 16
        self.streams: list[int | None] = []
        self.algorithms: list[tuple[str, int]] = []
        self._kept = []
        for name, types in SIGNATURES.items():
            wrapped = ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._guarded(name))
            setattr(self, name, wrapped)
        self.cusparseGetErrorName = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)(self._name)

    def _name(self, status: int) -> Any:
        # ctypes takes an address for the text of a callback, which must outlive the call.
        buffer = ctypes.create_string_buffer(NAMES.get(status, b"?"))
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def _guarded(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.refused:
                return NOT_SUPPORTED
            try:
                getattr(self, "do_" + name.removeprefix("cusparse"))(*arguments)
            except Refused as refused:
                return refused.status
            return 0

        return function

    def count(self, *kinds: str) -> int:
        return sum(made.kind in kinds for made in self.living.values())

    def _make(self, out: Any, kind: str, **values: Any) -> None:
        self.next += 16
        self.living[self.next] = Made(kind, values)
        out[0] = self.next

    def _get(self, address: int, *kinds: str) -> Made:
        require(address in self.living and self.living[address].kind in kinds)
        return self.living[address]

    def do_GetProperty(self, index: int, out: Any) -> None:
        require(0 <= index < 3)
        out[0] = self.version[index]

    def do_Create(self, out: Any) -> None:
        self._make(out, "handle", stream=None)

    def do_SetStream(self, handle: int, stream: int | None) -> None:
        self._get(handle, "handle").values["stream"] = stream or 0

    def do_CreateCsr(self, out: Any, rows: int, columns: int, kept: int, *rest: Any) -> None:
        starts, indices, values, starts_type, indices_type, base, dtype = rest
        require(min(rows, columns, kept) >= 0 and kept <= rows * columns and dtype in DTYPES)
        require(starts_type == indices_type == 2 and base == 0)
        self._make(out, "csr", rows=rows, columns=columns, kept=kept, at=(starts, indices, values), dtype=dtype)

    def do_CreateBsr(self, out: Any, rows: int, columns: int, kept: int, high: int, wide: int, *rest: Any) -> None:
        starts, indices, values, starts_type, indices_type, base, dtype, order = rest
        require(high == wide > 0 and kept <= rows * columns and dtype in DTYPES and order in (1, 2))
        require(starts_type == indices_type == 2 and base == 0)
        sizes = {"rows": rows * high, "columns": columns * high, "block": high, "kept": kept, "order": order}
        self._make(out, "bsr", **sizes, at=(starts, indices, values), dtype=dtype)

    def do_CreateBlockedEll(self, out: Any, rows: int, columns: int, block: int, wide: int, *rest: Any) -> None:
        indices, values, index_type, base, dtype = rest
        require(block > 0 and rows % block == columns % block == wide % block == 0 and wide <= columns)
        require(index_type == 2 and base == 0 and dtype in DTYPES)
        self._make(out, "ell", rows=rows, columns=columns, block=block, wide=wide, at=(indices, values), dtype=dtype)

    def do_CreateDnMat(self, out: Any, rows: int, columns: int, leading: int, at: int, dtype: int, order: int) -> None:
        require(order in (1, 2) and dtype in DTYPES and leading >= (rows if order == 1 else columns))
        self._make(out, "dense", rows=rows, columns=columns, leading=leading, at=at, dtype=dtype, order=order)

    def do_CreateDnVec(self, out: Any, size: int, at: int, dtype: int) -> None:
        require(dtype in DTYPES)
        self._make(out, "vector", size=size, at=at, dtype=dtype)

    def do_DnMatSetValues(self, dense: int, at: int) -> None:
        self._get(dense, "dense").values["at"] = at

    def do_DnVecSetValues(self, vector: int, at: int) -> None:
        self._get(vector, "vector").values["at"] = at

    def _destroy(self, address: int, *kinds: str) -> None:
        self._get(address, *kinds)
        del self.living[address]

    def do_Destroy(self, handle: int) -> None:
        self._destroy(handle, "handle")

    def do_DestroySpMat(self, matrix: int) -> None:
        self._destroy(matrix, "csr", "bsr", "ell")

    def do_DestroyDnMat(self, dense: int) -> None:
        self._destroy(dense, "dense")

    def do_DestroyDnVec(self, vector: int) -> None:
        self._destroy(vector, "vector")

    def do_SpMM_bufferSize(self, *arguments: Any) -> None:
        self._check(*arguments[:10])
        arguments[10][0] = self.workspace_bytes

    def do_SpMM_preprocess(self, *arguments: Any) -> None:
        self._activate(self._check(*arguments[:10])[0], arguments[10])

    def do_SpMM(self, *arguments: Any) -> None:
        matrix, x, y = self._check(*arguments[:10])
        self._workspace(matrix, arguments[10])
        self.streams.append(self.living[arguments[0]].stream)
        self.algorithms.append(("SpMM", arguments[9]))
        right = strided(x).T if arguments[2] else strided(x)
        self._multiply(matrix, right, strided(y), arguments[3], arguments[6], arguments[8])

    def do_SpMV_bufferSize(self, *arguments: Any) -> None:
        self._check_vectors(*arguments[:9])
        arguments[9][0] = self.workspace_bytes

    def do_SpMV_preprocess(self, *arguments: Any) -> None:
        self._activate(self._check_vectors(*arguments[:9])[0], arguments[9])

    def do_SpMV(self, *arguments: Any) -> None:
        matrix, x, y = self._check_vectors(*arguments[:9])
        self._workspace(matrix, arguments[9])
        self.streams.append(self.living[arguments[0]].stream)
        self.algorithms.append(("SpMV", arguments[8]))
        vectors = [memory(v.at, v.size, DTYPES[v.dtype]).unsqueeze(1) for v in (x, y)]
        self._multiply(matrix, *vectors, arguments[2], arguments[5], arguments[7])

    def _check(self, handle: int, op: int, op_x: int, *rest: Any) -> tuple[Made, Made, Made]:
        alpha, matrix_at, x_at, beta, y_at, compute, algorithm = rest
        self._get(handle, "handle")
        matrix, x, y = self._get(matrix_at, "csr", "bsr", "ell"), self._get(x_at, "dense"), self._get(y_at, "dense")
        require(bool(alpha) and bool(beta))
        inner, tokens = (x.columns, x.rows) if op_x else (x.rows, x.columns)
        require((matrix.columns, matrix.rows, tokens) == (inner, y.rows, y.columns))
        own = {"csr": (0, 4, 6, 12), "bsr": (0, 14), "ell": (0, 13)}[matrix.kind]
        require(algorithm in own and op_x in (0, 1))
        require(op == 0, NOT_SUPPORTED)
        require(matrix.dtype == x.dtype == y.dtype, NOT_SUPPORTED)
        require(compute == (1 if matrix.dtype == 1 else 0), NOT_SUPPORTED)
        require(matrix.kind != "bsr" or matrix.order == 2, NOT_SUPPORTED)
        return matrix, x, y

    def _check_vectors(self, handle: int, op: int, *rest: Any) -> tuple[Made, Made, Made]:
        alpha, matrix_at, x_at, beta, y_at, compute, algorithm = rest
        self._get(handle, "handle")
        matrix, x, y = self._get(matrix_at, "csr", "bsr"), self._get(x_at, "vector"), self._get(y_at, "vector")
        require(bool(alpha) and bool(beta) and (matrix.columns, matrix.rows) == (x.size, y.size))
        require(algorithm in {"csr": (0, 2, 3), "bsr": (0, 6)}[matrix.kind])
        require(matrix.kind != "bsr" or self.version >= (12, 6, 3), NOT_SUPPORTED)
        require(op == 0 and matrix.dtype == x.dtype == y.dtype, NOT_SUPPORTED)
        require(compute == (1 if matrix.dtype == 1 else 0), NOT_SUPPORTED)
        return matrix, x, y

    def _activate(self, matrix: Made, workspace: int) -> None:
        memory(workspace, self.workspace_bytes, torch.uint8).fill_(MARK)
        matrix.active = workspace

    def _workspace(self, matrix: Made, workspace: int) -> None:
        """The active workspace must be as the analysis left it; any other may hold anything."""
        require(self.workspace_bytes == 0 or bool(workspace))
        if matrix.active == workspace:
            whole = memory(workspace, self.workspace_bytes, torch.uint8)
            require(bool((whole == MARK).all()), EXECUTION_FAILED)

    def _multiply(self, matrix: Made, x: torch.Tensor, y: torch.Tensor, *scalars: int) -> None:
        alpha, beta, compute = scalars
        scalar = ctypes.c_double if compute == 1 else ctypes.c_float
        scales = [scalar.from_address(address).value for address in (alpha, beta)]
        wide = DTYPES[compute]
        product = scales[0] * (dense(matrix).to(wide) @ x.to(wide))
        y.copy_(product if scales[1] == 0 else product + scales[1] * y.to(wide))


def strided(made: Made) -> torch.Tensor:
    """View a dense operand as (rows, columns)."""
    lines, length = (made.columns, made.rows) if made.order == 1 else (made.rows, made.columns)
    count = (lines - 1) * made.leading + length if lines and length else 0
    flat = memory(made.at, count, DTYPES[made.dtype])
    strides = (1, made.leading) if made.order == 1 else (made.leading, 1)
    return flat.as_strided((made.rows, made.columns), strides)


def dense(made: Made) -> torch.Tensor:
    """Write a sparse matrix out, entry by entry or tile by tile."""
    full = torch.zeros(made.rows, made.columns, dtype=DTYPES[made.dtype])
    if made.kind == "csr":
        starts = memory(made.at[0], made.rows + 1, torch.int32).tolist()
        indices = memory(made.at[1], made.kept, torch.int32).long()
        values = memory(made.at[2], made.kept, DTYPES[made.dtype])
        require(starts[0] == 0 and starts[-1] == made.kept, EXECUTION_FAILED)
        for row in range(made.rows):
            mine = slice(starts[row], starts[row + 1])
            full[row, indices[mine]] = values[mine]
        return full
    if made.kind == "bsr":
        return _from_tiles(made, full)
    width, block = made.wide // made.block, made.block
    indices = memory(made.at[0], made.rows // block * width, torch.int32).reshape(-1, width)
    values = memory(made.at[1], made.rows * made.wide, DTYPES[made.dtype]).reshape(made.rows, made.wide)
    for row in range(made.rows):
        for slot, column in enumerate(indices[row // block].tolist()):
            if column >= 0:
                full[row, column * block : (column + 1) * block] = values[row, slot * block : (slot + 1) * block]
    return full


def _from_tiles(made: Made, full: torch.Tensor) -> torch.Tensor:
    block = made.block
    starts = memory(made.at[0], made.rows // block + 1, torch.int32).tolist()
    indices = memory(made.at[1], made.kept, torch.int32).tolist()
    values = memory(made.at[2], made.kept * block * block, DTYPES[made.dtype]).reshape(-1, block, block)
    for tile_row in range(made.rows // block):
        for tile in range(starts[tile_row], starts[tile_row + 1]):
            down, across = tile_row * block, indices[tile] * block
            stored = values[tile] if made.order == 2 else values[tile].T
            full[down : down + block, across : across + block] = stored
    return full


class Emulated:
    """A `Library` over a `FakeLibrary`."""

    def __init__(self, fake: FakeLibrary, where: Where = current_stream, most: int = 4096) -> None:
        self.fake = fake
        self._plans = Plans(Calls(fake), where, most)

    def unavailable(self) -> str | None:
        return None

    def plans(self) -> Plans:
        return self._plans
