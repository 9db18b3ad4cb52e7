"""The user's names for ONNX nodes, and the repeated module a node stands in."""

import ast
import re

import onnx_ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of torch's exporter: a printed list of module paths from the root inwards, then the operation."""


def module_path(node: onnx_ir.Node) -> str | None:
    """Return the torch module path that torch's exporter noted for `node`, or None."""
    text = node.metadata_props.get(SCOPES)
    if not text:
        return None
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2:
        return None
    return str(scopes[-2]) or None


def block_of(node: onnx_ir.Node) -> str | None:
    """Return the outermost numbered module of `node`, such as "model.layers.3", or None outside all of them.

    From torch's exporter metadata, else from a node name that is a path, such as "/model/layers.3/mlp/MatMul".
    """
    if path := module_path(node):
        match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
        return match[0] if match else None
    parts = (node.name or "").split("/")[:-1]
    for index, part in enumerate(parts):
        if re.fullmatch(r"\d+|.*\.\d+|layer_\d+", part):
            return "/".join(parts[: index + 1])
    return None


def name_of(node: onnx_ir.Node, parameter: str) -> str:
    """Name the weight of `node`: its module, else the node, else the initialiser."""
    return module_path(node) or node.name or parameter


def unique(name: str, taken: set[str]) -> str:
    """Return `name`, with #2, #3, ... where it is taken, and take it."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}#{number}"
    taken.add(candidate)
    return candidate
