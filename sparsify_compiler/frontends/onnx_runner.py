"""Run pieces of an ONNX graph in ONNX Runtime, one session alive at a time, with the weights of the moment."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Open:
    """A session and what it was built for. `weights` are held so that no other tensor can take their identity."""

    key: tuple[object, ...]
    session: OrtSession
    weights: tuple[Tensor, ...]


class PieceRunner:
    """Holds the session of the last piece that ran, and one more for replaced weights; `forget` after a change."""

    def __init__(self, model: onnx_ir.Model, constants: Constants) -> None:
        self._model = model
        self._constants = constants
        self._own: _Open | None = None
        self._replaced: _Open | None = None

    def forget(self) -> None:
        """Release the sessions."""
        self._own = self._replaced = None

    def run(
        self,
        piece: Piece,
        values: Mapping[str, Any],
        watch: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        inner: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return by name what `piece` makes, the `inner` values, and where `watch` what its sites read.

        `weights` are (groups, out, in) tensors by site name, used instead of the model's own.

        Raises:
            ModelError: ONNX Runtime cannot load or run the piece.
        """
        names = [*piece.makes, *inner]
        if watch:
            names += [each.value for each in piece.watched if each.value in piece.inside]
        names = list(dict.fromkeys(names))
        if not names:
            return {}
        present = {each.site.name for each in piece.sites}
        used = {name: weight for name, weight in (weights or {}).items() if name in present}
        session = self._session(piece, values, used, tuple(inner))
        results = session.run(names, {name: to_numpy(values[name]) for name in piece.needs})
        return {name: to_torch(result) for name, result in zip(names, results, strict=True)}

    def _session(
        self, piece: Piece, values: Mapping[str, Any], weights: Mapping[str, Tensor], inner: tuple[str, ...]
    ) -> OrtSession:
        versions = tuple((name, id(weight), weight._version) for name, weight in weights.items())
        key = (piece.index, signature(piece, values), inner, versions)
        held = self._replaced if weights else self._own
        if held is not None and held.key == key:
            return held.session
        # Release the old session before the new one is built: a segment's weights are in memory once.
        if weights:
            self._replaced = held = None
        else:
            self._own = held = None
        built = _Open(key, self._build(piece, values, weights, inner), tuple(weights.values()))
        if weights:
            self._replaced = built
        else:
            self._own = built
        return built.session

    def _build(
        self, piece: Piece, values: Mapping[str, Any], weights: Mapping[str, Tensor], inner: tuple[str, ...]
    ) -> OrtSession:
        model = extract_piece(self._model, piece, values, inner)
        sites = {each.site.name: each for each in piece.sites}
        for name, weight in weights.items():
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
