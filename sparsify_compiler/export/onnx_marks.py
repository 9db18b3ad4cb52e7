"""What an exported ONNX file says about itself: metadata of the model and of every pruned site.

The model carries `ai.sparsify.version` = "1". A site's entries are `metadata_props` of its node from IR version 10 on
(`ai.sparsify.site`, `.pattern`, `.sparsity`, `.weight_sha256` and what the caller adds); older files carry them in the
model's, as one JSON object under `ai.sparsify.site.<name>`.
"""

import hashlib
import json
from collections.abc import Mapping

import onnx_ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

PREFIX = "ai.sparsify"
CONTRACT_VERSION = "1"

_NODE_METADATA = 10


def mark_model(model: onnx_ir.Model) -> None:
    """Write the version of the contract into the model's metadata."""
    model.metadata_props[f"{PREFIX}.version"] = CONTRACT_VERSION


def mark_site(model: onnx_ir.Model, name: str, nodes: list[onnx_ir.Node], entries: Mapping[str, str]) -> None:
    """Write what is known of the site `name` at its nodes, or at the model where nodes cannot carry it."""
    entries = {"site": name, **entries}
    if model.ir_version >= _NODE_METADATA:
        for node in nodes:
            node.metadata_props.update({f"{PREFIX}.{key}": value for key, value in entries.items()})
    else:
        model.metadata_props[f"{PREFIX}.site.{name}"] = json.dumps(entries, sort_keys=True)


def weight_hash(weight: Tensor) -> str:
    """Return the SHA-256 of a dense weight's bytes, row after row, little-endian: what unpacking must give back."""
    return hashlib.sha256(TorchTensor(weight.contiguous()).tobytes()).hexdigest()
