"""A library with cuSPARSELt's functions that multiplies in NumPy on the CPU, and is as particular as the real one.

It marks every structure it fills, and checks the marks of all that it is given: a plan whose parts were moved or freed
is noticed. Functions return 0, or the status that cusparse.h names (3: invalid value, 7: internal, 10: not supported).
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch

ALGORITHMS = 4
TYPES = {2: torch.float16, 14: torch.bfloat16}


@dataclass(eq=False)
class StandIn:
    """Use as `Plans(library=StandIn())`. `calls` lists the functions called."""

    calls: list[str] = field(default_factory=list)
    made: dict[int, tuple[object, ...]] = field(default_factory=dict)
    destroyed: int = 0

    def _fill(self, name: str, place: int, *content: object) -> int:
        self.calls.append(name)
        self.made[place] = content
        ctypes.memmove(place, self._mark(place), 16)
        ctypes.memset(place + 16, 0xA5, 1008)  # the real ones are up to 1024 bytes
        return 0

    def _mark(self, place: int) -> bytes:
        return b"marked!!" + int(place).to_bytes(8, "little")

    def _read(self, place: int, kind: str) -> tuple[object, ...]:
        content = self.made.get(place)
        assert content is not None, f"{kind} at an address where none was made"
        assert content[0] == kind, f"a {kind} was asked for where a {content[0]} lies"
        assert ctypes.string_at(place, 16) == self._mark(place), f"the {kind} was overwritten"
        return content[1:]

    def cusparseLtInit(self, handle: int) -> int:
        return self._fill("cusparseLtInit", handle, "handle")

    def cusparseLtDenseDescriptorInit(
        self, handle: int, place: int, rows: int, cols: int, ld: int, alignment: int, kind: int, order: int
    ) -> int:
        self._read(handle, "handle")
        least = cols if order == 2 else rows
        if alignment % 16 or kind not in TYPES or rows % 8 or cols % 8 or ld < least or order not in (1, 2):
            return 3
        return self._fill("dense", place, "matrix", rows, cols, ld, kind, order, False)

    def cusparseLtStructuredDescriptorInit(
        self, handle: int, place: int, rows: int, cols: int, ld: int, alignment: int, kind: int, order: int, half: int
    ) -> int:
        self._read(handle, "handle")
        if alignment % 16 or kind not in TYPES or rows % 16 or cols % 16 or ld != cols or (order, half) != (2, 0):
            return 3
        return self._fill("structured", place, "matrix", rows, cols, ld, kind, order, True)

    def cusparseLtMatDescriptorDestroy(self, place: int) -> int:
        self._read(place, "matrix")
        self.destroyed += 1
        return 0

    def cusparseLtMatmulDescriptorInit(
        self, handle: int, place: int, op_a: int, op_b: int, a: int, b: int, c: int, d: int, compute: int
    ) -> int:
        self._read(handle, "handle")
        rows, inner, *_, sparse = self._read(a, "matrix")
        b_rows, b_cols, *_ = self._read(b, "matrix")
        if op_b == 1:
            b_rows, b_cols = b_cols, b_rows
        c_rows, c_cols, *_ = self._read(c, "matrix")
        if not sparse or (op_a, compute) != (0, 2) or c != d or (b_rows, c_rows, c_cols) != (inner, rows, b_cols):
            return 10
        return self._fill("matmul", place, "matmul", op_b, a, b, c, {})

    def cusparseLtMatmulDescSetAttribute(self, handle: int, place: int, attribute: int, data: int, size: int) -> int:
        self._read(handle, "handle")
        attributes = self._read(place, "matmul")[-1]
        assert isinstance(attributes, dict)
        if (attribute, size) not in ((8, 8), (0, 4)):
            return 3
        attributes[attribute] = int.from_bytes(ctypes.string_at(data, size), "little")
        return 0

    def cusparseLtMatmulAlgSelectionInit(self, handle: int, place: int, matmul: int, kind: int) -> int:
        self._read(matmul, "matmul")
        return self._fill("algorithm", place, "algorithm", matmul, {0: 0}) if kind == 0 else 3

    def cusparseLtMatmulAlgSetAttribute(self, handle: int, place: int, attribute: int, data: int, size: int) -> int:
        attributes = self._read(place, "algorithm")[-1]
        assert isinstance(attributes, dict)
        attributes[attribute] = int.from_bytes(ctypes.string_at(data, size), "little", signed=True)
        return 3 if attributes[0] >= ALGORITHMS or size != 4 else 0

    def cusparseLtMatmulAlgGetAttribute(self, handle: int, place: int, attribute: int, data: int, size: int) -> int:
        self._read(place, "algorithm")
        ctypes.memmove(data, ALGORITHMS.to_bytes(4, "little"), 4)
        return 0 if (attribute, size) == (1, 4) else 3

    def cusparseLtMatmulAlgSelectionDestroy(self, place: int) -> int:
        self._read(place, "algorithm")
        return 0

    def cusparseLtMatmulPlanInit(self, handle: int, place: int, matmul: int, algorithm: int) -> int:
        self._read(handle, "handle")
        assert self._read(algorithm, "algorithm")[0] == matmul
        return self._fill("plan", place, "plan", handle, matmul, algorithm)

    def cusparseLtMatmulPlanDestroy(self, place: int) -> int:
        self._read(place, "plan")
        self.destroyed += 1
        return 0

    def cusparseLtMatmulGetWorkspace(self, handle: int, plan: int, size: int) -> int:
        self._read(plan, "plan")
        ctypes.memmove(size, (40).to_bytes(8, "little"), 8)
        return 0

    def cusparseLtSpMMACompressedSize2(self, handle: int, place: int, size: int, buffer: int) -> int:
        rows, cols, *_ = self._read(place, "matrix")
        assert isinstance(rows, int)
        assert isinstance(cols, int)
        ctypes.memmove(size, (rows * cols // 2 * 3).to_bytes(8, "little"), 8)  # two bytes of value, one of place
        ctypes.memmove(buffer, (0).to_bytes(8, "little"), 8)
        return 0

    def cusparseLtSpMMACompress2(
        self, handle: int, place: int, is_a: int, op: int, dense: int, out: int, buffer: int, stream: int
    ) -> int:
        self._read(handle, "handle")
        rows, cols, *_ = self._read(place, "matrix")
        assert (is_a, op) == (1, 0)
        assert buffer
        words = np.frombuffer(ctypes.string_at(dense, rows * cols * 2), np.uint16).reshape(-1, 4)
        kept = (words != 0) & (words != 0x8000)
        assert kept.sum(axis=1).max(initial=0) <= 2
        places = np.argsort(~kept, axis=1, kind="stable")[:, :2]
        values = np.take_along_axis(words, places, axis=1)
        content = values.tobytes() + places.astype(np.uint8).tobytes()
        ctypes.memmove(out, content, len(content))
        return 0

    def cusparseLtMatmul(
        self,
        handle: int,
        plan: int,
        alpha: int,
        a: int,
        b: int,
        beta: int,
        c: int,
        d: int,
        space: int,
        streams: int,
        n: int,
    ) -> int:
        self.calls.append("cusparseLtMatmul")
        made_by, matmul, algorithm = self._read(plan, "plan")
        assert made_by == handle
        assert self._read(algorithm, "algorithm")[0] == matmul
        op_b, a_place, b_place, c_place, attributes = self._read(matmul, "matmul")
        rows, inner, _, kind, *_ = self._read(a_place, "matrix")
        b_shape, (_, tokens, ld, *_) = self._read(b_place, "matrix"), self._read(c_place, "matrix")
        assert all(address % 16 == 0 for address in (a, b, c, d, space))
        assert (c, n, ld) == (d, 1, rows)
        assert space
        assert streams
        dtype = TYPES[kind]
        weight = self._weight(a, rows, inner, dtype)
        x = _floats(b, b_shape[0] * b_shape[1], dtype).reshape(b_shape[0], b_shape[1])
        product = weight @ (x.T if op_b == 1 else x)
        factors = [ctypes.c_float.from_address(place).value for place in (alpha, beta)]
        total = factors[0] * product
        if factors[1]:
            total = total + factors[1] * _floats(c, rows * tokens, dtype).reshape(tokens, rows).T
        if bias := attributes.get(8, 0):
            total = total + _floats(bias, rows, dtype)[:, None]
        if attributes.get(0, 0):
            total = total.clamp(min=0)
        stored = total.T.contiguous().to(dtype)  # columns of rows x tokens, one after the other
        ctypes.memmove(d, stored.data_ptr(), stored.numel() * 2)
        return 0

    def _weight(self, a: int, rows: int, inner: int, dtype: torch.dtype) -> torch.Tensor:
        count = rows * inner // 2
        places = torch.frombuffer(bytearray(ctypes.string_at(a + 2 * count, count)), dtype=torch.uint8)
        values = _floats(a, count, dtype)
        dense = torch.zeros(rows * inner // 4, 4, dtype=torch.float64)
        return dense.scatter_(1, places.reshape(-1, 2).long(), values.reshape(-1, 2)).reshape(rows, inner)


def _floats(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(ctypes.string_at(address, count * 2)), dtype=dtype).double()
