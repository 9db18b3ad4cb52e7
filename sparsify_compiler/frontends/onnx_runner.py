"""Run pieces of an ONNX graph in ONNX Runtime, one session alive at a time, with the weights of the moment."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
from torch import Tensor

from sparsify_compiler.frontends.onnx_constants import Constants
from sparsify_compiler.frontends.onnx_file import (
    LARGEST_INLINE_BYTES,
    load_weights,
    to_bytes,
    weight_bytes,
    write_model,
)
from sparsify_compiler.frontends.onnx_rewrite import put_problem
from sparsify_compiler.frontends.onnx_segments import Piece, extract_piece, signature, to_numpy, to_torch
from sparsify_compiler.frontends.onnx_session import OrtSession
from sparsify_compiler.frontends.onnx_sites import FoundSite


class PieceRunner:
    """Holds the session of the last piece that ran; `forget` it when a weight changes."""

    def __init__(self, model: onnx_ir.Model, constants: Constants) -> None:
        self._model = model
        self._constants = constants
        self._key: tuple[object, ...] = ()
        self._session: OrtSession | None = None

    def forget(self) -> None:
        """Release the session."""
        self._key, self._session = (), None

    def run(
        self, piece: Piece, values: Mapping[str, Any], watch: bool, weights: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Return by name what `piece` makes and, where `watch`, what its sites read.

        `weights` are (groups, out, in) tensors by site name, used for this call only.

        Raises:
            ModelError: ONNX Runtime cannot load or run the piece.
        """
        names = list(piece.makes)
        if watch:
            names += [each.value for each in piece.watched if each.value in piece.inside]
        names = list(dict.fromkeys(names))
        if not names:
            return {}
        key = (piece.index, signature(piece, values))
        if weights:
            self.forget()
            session = self._build(piece, values, weights)
        else:
            if self._session is None or self._key != key:
                self.forget()  # first release, then build: never two sessions in memory
                self._session = self._build(piece, values, weights)
                self._key = key
            session = self._session
        results = session.run(names, {name: to_numpy(values[name]) for name in piece.needs})
        return {name: to_torch(result) for name, result in zip(names, results, strict=True)}

    def _build(self, piece: Piece, values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> OrtSession:
        model = extract_piece(self._model, piece, values)
        sites: dict[str, FoundSite] = {each.site.name: each for each in piece.sites}
        for name, weight in weights.items():
            if name in sites:
                put_problem(model, sites[name], weight, self._constants)
        return open_model(model, f"segment {piece.name!r}")


def open_model(model: onnx_ir.Model, what: str) -> OrtSession:
    """Open a session on `model`, through a temporary folder where it is too large for one message.

    Raises:
        ModelError: ONNX Runtime cannot load it.
    """
    if weight_bytes(model) <= LARGEST_INLINE_BYTES:
        copy = model.clone()
        load_weights(copy)
        return OrtSession(to_bytes(copy), what)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_model(model, path, external_data=True)
        return OrtSession(str(path), what)
