"""Open ONNX Runtime on a model in memory, and turn what it says into our errors."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from sparsify_compiler.errors import ModelError

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
)
"""What ONNX Runtime raises; its exceptions share no base but Exception."""

_FATAL_ONLY = 4


class OrtSession:
    """A session on the CPU provider. Errors are `ModelError` and name `what` was run."""

    def __init__(self, model: bytes | str, what: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY  # what matters is raised; the rest would fill the user's terminal
        self._what = what
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except ORT_ERRORS as error:
            raise ModelError(f"ONNX Runtime {onnxruntime.__version__} cannot load {what}: {error}") from None

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """Return the named outputs (None: all): numpy arrays, lists for sequences, None for empty optionals."""
        try:
            return list(self._session.run(outputs, dict(feeds)))
        except ORT_ERRORS as error:
            raise ModelError(f"ONNX Runtime {onnxruntime.__version__} cannot run {self._what}: {error}") from None


def open_session(model: bytes | str, what: str) -> OrtSession:
    """Open a session on a serialised model, or on the path of a file. `what` names it in errors."""
    return OrtSession(model, what)
