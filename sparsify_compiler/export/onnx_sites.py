"""Read the pruned weights back out of the ONNX graph that is to be packed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from sparsify_compiler.errors import ExportError
from sparsify_compiler.export.onnx_pack import SiteWeight
from sparsify_compiler.frontends.layout import to_problem
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.frontends.onnx_constants import Constants
from sparsify_compiler.frontends.onnx_products import Product, find_products
from sparsify_compiler.frontends.onnx_sites import find_sites
from sparsify_compiler.graph import ConvLayout
from sparsify_compiler.pattern import Pattern


@dataclass(frozen=True)
class SiteMask:
    """What pruning decided for one site: `keep` (groups, out, in) bool, the pattern it follows, metadata to write."""

    keep: Tensor
    pattern: Pattern
    metadata: Mapping[str, str] = field(default_factory=dict)


def site_products(model: onnx_ir.Model) -> dict[str, tuple[Product, ...]]:
    """Find the products of every prunable site of a model, by the site's name."""
    return {
        found.site.name: found.products for found in find_sites(model, Constants(model)) if found.site.refusal is None
    }


def graph_products(graph: OnnxGraph) -> dict[str, tuple[Product, ...]]:
    """List the products of every prunable site of a loaded ONNX graph, in `graph.model`, by the site's name."""
    constants = Constants(graph.model)
    return {
        site.name: tuple(
            product
            for node, index in graph.products(site.name)
            for product in find_products(node, constants, ())
            if product.index == index
        )
        for site in graph.sites
        if site.refusal is None
    }


def match_sites(model: onnx_ir.Model, weights: Mapping[str, Tensor]) -> dict[str, tuple[Product, ...]]:
    """Find the sites of a torch module in the graph its exporter wrote; `weights` (groups, out, in) by site name.

    A site is found by its name and confirmed by its numbers, or by its numbers alone: equal, up to rounding and a
    factor per output, because the exporter folds a BatchNorm into the convolution before it and then calls both by
    the BatchNorm's name. Sites that are not in the graph are left out.
    """
    constants, products = Constants(model), site_products(model)
    matched: dict[str, tuple[Product, ...]] = {}
    for name, weight in weights.items():
        if name in products and _same_rows(read_weight(products[name][0], constants), weight):
            matched[name] = products[name]
    for name, weight in weights.items():
        if name in matched:
            continue
        taken = set(matched.values())
        for candidate in products.values():
            if candidate not in taken and _same_rows(read_weight(candidate[0], constants), weight):
                matched[name] = candidate
                break
    return matched


def site_weights(
    model: onnx_ir.Model, products: Mapping[str, tuple[Product, ...]], masks: Mapping[str, SiteMask]
) -> list[SiteWeight]:
    """Join masks with the weights that `model` holds, in the order of `products`.

    The values are the file's own, so that a weight the exporter has changed (a folded BatchNorm, a cast) is packed as
    it stands.

    Raises:
        ExportError: a mask names no site of the graph, or its shape is not the weight's.
    """
    if missing := sorted(set(masks) - set(products)):
        raise ExportError(
            f"site {missing[0]!r} was pruned and is not in the ONNX graph; "
            f"its sites are {', '.join(products) or 'none'}"
        )
    constants = Constants(model)
    return [
        _site_weight(name, products[name], read_weight(products[name][0], constants), masks[name])
        for name in products
        if name in masks
    ]


def read_weight(product: Product, constants: Constants) -> Tensor:
    """Return the weight as (groups, out, in) in the dtype that `product` reads."""
    assert product.layout is not None
    tensor = constants.tensor(product.weight)
    dtype = TORCH_DTYPES[tensor.dtype]
    array = tensor.numpy()
    if tensor.dtype == onnx_ir.DataType.BFLOAT16:  # unknown to torch.from_numpy; float32 holds every bfloat16
        array = array.astype(np.float32)
    if not array.flags.writeable:
        array = array.copy()
    return to_problem(torch.from_numpy(array).to(dtype), product.layout)


TORCH_DTYPES: Mapping[onnx_ir.DataType, torch.dtype] = {
    onnx_ir.DataType.FLOAT: torch.float32,
    onnx_ir.DataType.FLOAT16: torch.float16,
    onnx_ir.DataType.BFLOAT16: torch.bfloat16,
    onnx_ir.DataType.DOUBLE: torch.float64,
}


def _same_rows(found: Tensor, weight: Tensor) -> bool:
    """Tell whether every row of `found` is a non-zero multiple of the same row of `weight`, zeros in the same places."""
    if found.shape != weight.shape or not torch.equal(found != 0, weight.to(found.dtype) != 0):
        return False
    rows, model_rows = found.double(), weight.double()
    energy = (model_rows * model_rows).sum(dim=-1, keepdim=True)
    factor = (rows * model_rows).sum(dim=-1, keepdim=True) / energy.clamp_min(torch.finfo(torch.float64).tiny)
    # Rounded once to the file's dtype by the fold, and once when the model's own weight was cast.
    room = 4 * torch.finfo(found.dtype).eps * (rows.abs() + (factor * model_rows).abs())
    return bool(((rows - factor * model_rows).abs() <= room).all())


def _site_weight(name: str, products: tuple[Product, ...], weight: Tensor, mask: SiteMask) -> SiteWeight:
    if mask.keep.shape != weight.shape:
        raise ExportError(
            f"site {name!r}: the ONNX graph holds a weight of (groups, out, in) {tuple(weight.shape)}; "
            f"the keep mask is {tuple(mask.keep.shape)}"
        )
    layout = products[0].layout
    run = weight.shape[-1]
    if isinstance(layout, ConvLayout):
        run //= math.prod(layout.kernel)
    return SiteWeight(name, products, weight, mask.keep.to(weight.device), mask.pattern, run, mask.metadata)
