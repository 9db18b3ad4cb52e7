"""Write an ONNX file, check it, and run it in ONNX Runtime against the outputs it must give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import DataError, ModelError, VerificationError
from sparsify_compiler.export.onnx_bodies import DOMAIN
from sparsify_compiler.export.onnx_sites import TORCH_DTYPES
from sparsify_compiler.export.report import FileReport, Verification
from sparsify_compiler.frontends.onnx_file import write_model
from sparsify_compiler.frontends.onnx_session import ORT_ERRORS
from sparsify_compiler.runtime.ort import DTYPES, run, session

PROVIDER = "CPUExecutionProvider"
"""Where exported files are verified: every machine has it."""

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest max |y - y'| / max |y'| between an exported file and its model, by the model's dtype.

The two sum the same products in other orders, and fused operators round at other places; through tens of layers that
grows from the unit roundoff (6e-8, 1e-16, 5e-4, 4e-3) to the order of 1e-5, 1e-14, 5e-3, 5e-2 (measured up to 35
linear layers). A wrong weight, axis or mask changes the outputs by their own size, so the limits have room both ways.
"""

CHUNK = 1 << 22
"""Entries compared at a time."""

_FLOATING = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Written:
    """The files of one exported model: each with its size, and what ONNX's own checker says against it, or None."""

    files: tuple[FileReport, ...]
    objection: str | None


def write_onnx(model: onnx_ir.Model, path: Path, saved_bytes: int = 0, external_data: bool | None = None) -> Written:
    """Write `model` to `path`, with `path`.data beside it above 1.5 GB of weights, and run ONNX's checker over it.

    The size of the dense file is this one's without the function bodies, and `saved_bytes` (`PackResult.saved_bytes`)
    more. Both files are written under other names and renamed at the end. `model` is not modified.

    Raises:
        ExportError: the folder or the disk refused the write; nothing is left behind.
    """
    written = write_model(model, path, external_data)
    saved_bytes -= sum(
        onnx_ir.to_proto(function).ByteSize() for key, function in model.functions.items() if key[0] == DOMAIN
    )
    sizes = [file.stat().st_size for file in written]
    largest = max(range(len(written)), key=sizes.__getitem__)
    files = tuple(
        FileReport(file.name, size, size + saved_bytes if number == largest else size)
        for number, (file, size) in enumerate(zip(written, sizes, strict=True))
    )
    return Written(files, _check_file(path))


def tolerance_for(model: onnx_ir.Model) -> float:
    """Return the tolerance of the coarsest floating dtype among the model's weights."""
    found = {value.const_value.dtype for value in model.graph.initializers.values() if value.const_value is not None}
    return max((TOLERANCES[TORCH_DTYPES[dtype]] for dtype in found if dtype in TORCH_DTYPES), default=1e-3)


def verify(
    path: Path,
    batch: Batch | Mapping[str, npt.NDArray[Any]],
    expected: Sequence[Tensor],
    tolerance: float,
) -> Verification:
    """Run the file at `path` in ONNX Runtime (CPU) on `batch` and compare with the outputs `expected`, in order.

    Floating inputs are cast to the dtype the file asks for. The difference is max |y - y'| / max |y'| over each
    output y' that is expected, the largest of them; a file may give more outputs (a key-value cache).

    Returns a `Verification` that did not run, with the reason, where ONNX Runtime's CPU provider lacks an operator
    for the file's dtype (bfloat16).

    Raises:
        VerificationError: the file does not load or run, gives other shapes, or differs by more than `tolerance`.
    """
    try:
        opened = session(path)
    except ModelError as error:
        if reason := _needs_bfloat16(path):
            return Verification(False, None, tolerance, PROVIDER, reason)
        raise VerificationError(f"{path.name}: {error}") from None
    try:
        outputs = _run(opened, feeds(opened, batch))
    except (ModelError, DataError, ValueError, *ORT_ERRORS) as error:
        raise VerificationError(f"{path.name}: {error}") from None
    if len(outputs) < len(expected):
        raise VerificationError(f"{path.name}: gives {len(outputs)} outputs; the model {len(expected)}")
    return compare(path.name, outputs, expected, tolerance)


def compare(file: str, found: Sequence[npt.NDArray[Any]], expected: Sequence[Tensor], tolerance: float) -> Verification:
    """Compare the outputs `found` of `file` with `expected`, pair by pair; see `verify`.

    Raises:
        VerificationError: shapes differ, or numbers by more than `tolerance`.
    """
    pairs = enumerate(zip(found, expected, strict=False))
    difference = max((_difference(f"{file}: output {n}", y, wanted) for n, (y, wanted) in pairs), default=0.0)
    if not difference <= tolerance:
        raise VerificationError(
            f"{file}: ONNX Runtime's outputs differ from the model's by {difference:.3g} of their largest value; "
            f"at most {tolerance:g} is allowed; do not use the file, and please report the model"
        )
    return Verification(True, difference, tolerance, PROVIDER)


def feeds(
    opened: onnxruntime.InferenceSession, batch: Batch | Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Name the arrays of a batch as the session's inputs; floating ones are cast to the dtype it asks for."""
    if isinstance(batch, Tensor):
        batch = (batch,)
    asked = {argument.name: DTYPES.get(argument.type) for argument in opened.get_inputs()}
    named: Mapping[str, Any] = dict(zip(asked, batch, strict=False)) if isinstance(batch, tuple) else batch
    return {name: _array(value, asked.get(name)) for name, value in named.items()}


def _run(opened: onnxruntime.InferenceSession, arrays: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return the output arrays in order: a sequence gives its arrays, strings and maps are left out."""
    if all(argument.type in DTYPES for argument in (*opened.get_inputs(), *opened.get_outputs())):
        return list(run(opened, arrays).values())
    entries = [
        each for output in opened.run(None, arrays) for each in (output if isinstance(output, list) else [output])
    ]
    return [entry for entry in entries if isinstance(entry, np.ndarray) and entry.dtype.kind in "biuf"]


def _difference(what: str, found: npt.NDArray[Any], wanted: Tensor) -> float:
    """Return max |y - y'| / max |y'|, 0 for equal outputs, infinity where only one of them is finite."""
    if found.shape != tuple(wanted.shape):
        raise VerificationError(f"{what} is {found.shape}; the model's {tuple(wanted.shape)}")
    flat = torch.from_numpy(np.ascontiguousarray(found).reshape(-1)) if found.dtype.kind in "biuf" else None
    given = flat if flat is not None else torch.from_numpy(np.asarray(found, np.float64).reshape(-1))
    exact = wanted.detach().cpu().reshape(-1)
    scale = gap = 0.0
    for start in range(0, exact.numel(), CHUNK):  # logits of a language model are gigabytes in float64
        y, y_exact = given[start : start + CHUNK].double(), exact[start : start + CHUNK].double()
        same = (y == y_exact) | (y.isnan() & y_exact.isnan())  # masked entries are often -inf on both sides
        finite = y_exact.isfinite()
        scale = max(scale, float(y_exact.where(finite, 0.0).abs().max()))
        part = float((y - y_exact).where(~same, 0.0).abs().max())
        gap = max(gap, part if part == part else float("inf"))
    if gap == 0.0:
        return 0.0
    return gap / scale if scale > 0 else float("inf")


def _array(value: Tensor | npt.NDArray[Any], dtype: str | None) -> npt.NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if dtype in _FLOATING and np.issubdtype(value.dtype, np.floating):
        return value.astype(dtype)
    return value


def _needs_bfloat16(path: Path) -> str | None:
    """Say that the file computes in bfloat16, or None."""
    proto = onnx.load(path, load_external_data=False)
    if all(tensor.data_type != onnx.TensorProto.BFLOAT16 for tensor in proto.graph.initializer):
        return None
    return (
        "the file computes in bfloat16, for which ONNX Runtime's CPU provider has no MatMul or Conv; "
        "run it on a provider that has them (CUDA), or export float16 or float32"
    )


def _check_file(path: Path) -> str | None:
    """Run ONNX's checker with shape inference; without, where the shapes are too dynamic to infer. None: it passes."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.shape_inference.InferenceError:
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            return _first_line(error)
    except onnx.checker.ValidationError as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
