"""Open ONNX files in ONNX Runtime and run them on named arrays, with errors that say what does not fit."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.frontends.onnx_file import read_model
from sparsify_compiler.frontends.onnx_session import ORT_ERRORS

Device = Literal["cpu", "cuda"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}
"""ONNX Runtime's word for a type to NumPy's."""

_FATAL_ONLY = 4


def session(
    path: str | Path, device: Device = "cpu", threads: int | None = None, spinning: bool = True
) -> onnxruntime.InferenceSession:
    """Open the ONNX file at `path`, external data beside it included; `threads` None leaves the choice to ORT.

    Without `spinning` its threads sleep between calls, and leave the cores to whatever is measured in turn with it.

    Raises:
        ModelError: no such file, not ONNX, an operator ONNX Runtime does not have, external data that is missing or
            outside the file's folder, or `device` "cuda" where ONNX Runtime has no CUDA.
    """
    path = Path(path)
    read_model(path)  # refuses weights outside the folder, which ONNX Runtime 1.20 would follow (tried)
    provider = PROVIDERS[device]
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ModelError(
            f"asked to run {path.name} on {device}, but this onnxruntime {onnxruntime.__version__} has only "
            f"{', '.join(available)}; install onnxruntime-gpu, or choose the device cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # errors are raised; a second copy would fill the terminal
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        opened = onnxruntime.InferenceSession(
            str(path), options, providers=list(dict.fromkeys((provider, PROVIDERS["cpu"])))
        )
    except ORT_ERRORS as error:
        raise ModelError(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {_sentence(error)}") from None
    if opened.get_providers()[0] != provider:  # ONNX Runtime goes on with the CPU when CUDA fails to load
        raise ModelError(
            f"asked to run {path.name} on {device}, but ONNX Runtime could not load {provider}; "
            f"check the CUDA and cuDNN libraries, or choose the device cpu"
        )
    return opened


def run(
    opened: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Run a session on named arrays and return its outputs by name. Arrays of any strides; nothing is modified.

    Raises:
        DataError: an input is missing, unknown, or of another dtype or shape than the model says.
        ModelError: ONNX Runtime failed while running, or an output is not a tensor.
    """
    _check(opened, inputs)
    names = [output.name for output in opened.get_outputs()]
    try:
        outputs = opened.run(names, dict(inputs))
    except ORT_ERRORS as error:
        raise ModelError(f"ONNX Runtime {onnxruntime.__version__} cannot run the model: {_sentence(error)}") from None
    found = dict(zip(names, outputs, strict=True))
    if strange := [name for name, value in found.items() if not isinstance(value, np.ndarray)]:
        raise ModelError(f"outputs {', '.join(strange)} are sequences, maps or empty; only tensors can be returned")
    return found


def run_file(
    path: str | Path, inputs: Mapping[str, np.ndarray[Any, Any]], device: Device = "cpu"
) -> dict[str, np.ndarray[Any, Any]]:
    """Open the file at `path` and run it once on named arrays; outputs by name.

    Raises:
        DataError, ModelError: as `session` and `run`.
    """
    return run(session(path, device), inputs)


def _check(opened: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
    needed = {arg.name: arg for arg in opened.get_inputs()}
    optional = {arg.name: arg for arg in opened.get_overridable_initializers()}
    signature = "; ".join(f"{arg.name} {arg.type} {_shape(arg)}" for arg in needed.values()) or "none"
    if missing := [name for name in needed if name not in inputs]:
        given = ", ".join(inputs) or "none"
        raise DataError(f"missing input {', '.join(missing)}; given: {given}; the model's inputs are {signature}")
    known = needed | optional
    if unknown := [name for name in inputs if name not in known]:
        raise DataError(f"unknown input {', '.join(unknown)}; the model's inputs are {signature}")
    for name, value in inputs.items():
        arg = known[name]
        if arg.type not in DTYPES:
            raise DataError(
                f"input {name!r} is of type {arg.type}, which an array cannot hold; run it with onnxruntime"
            )
        if value.dtype.name != DTYPES[arg.type]:
            raise DataError(f"input {name!r} is {value.dtype.name}; the model needs {DTYPES[arg.type]}; convert it")
        if not _fits(value.shape, arg):
            raise DataError(f"input {name!r} has shape {value.shape}; the model needs {_shape(arg)}")


def _fits(shape: tuple[int, ...], arg: Any) -> bool:
    """Compare with the declared shape; None for the whole is any shape, a name or None for a side is any length."""
    if arg.shape is None:
        return True
    return len(shape) == len(arg.shape) and all(
        not isinstance(asked, int) or asked == side for side, asked in zip(shape, arg.shape, strict=True)
    )


def _shape(arg: Any) -> str:
    if arg.shape is None:
        return "(any)"
    sides = ", ".join("?" if side is None else str(side) for side in arg.shape)
    return f"({sides},)" if len(arg.shape) == 1 else f"({sides})"


def _sentence(error: BaseException) -> str:
    """Return ONNX Runtime's message without its code and source positions, at most 300 characters of one line."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    text = re.sub(r"\S+\.(?:cc|h|cu):\d+ \S+( \[with [^\]]*\])? ?", "", text)
    return text[:300]
