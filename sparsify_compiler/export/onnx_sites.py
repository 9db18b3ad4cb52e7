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
from sparsify_compiler.frontends.onnx_constants import Constants
from sparsify_compiler.frontends.onnx_products import Product
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


def match_sites(model: onnx_ir.Model, masks: Mapping[str, SiteMask]) -> dict[str, tuple[Product, ...]]:
    """Find the products of every pruned site in the graph that holds its weight, zeros included.

    A site is found by its name and confirmed by its zeros, or by its zeros alone: torch's exporter folds a BatchNorm
    into the convolution before it and then gives both the BatchNorm's name, and may drop the names of others. Sites
    that are not in the graph are left out.
    """
    constants, products = Constants(model), site_products(model)
    free = dict(products)
    matched: dict[str, tuple[Product, ...]] = {}
    for name, mask in masks.items():
        if name in products and _obeys(read_weight(products[name][0], constants), mask.keep):
            matched[name] = free.pop(name)
    for name, mask in masks.items():
        if name in matched:
            continue
        for other, candidate in free.items():
            if _obeys(read_weight(candidate[0], constants), mask.keep):
                matched[name] = free.pop(other)
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


def _obeys(weight: Tensor, keep: Tensor) -> bool:
    """Tell whether `weight` is zero where `keep` is False, and is not so sparse that any mask would do."""
    if weight.shape != keep.shape:
        return False
    alive = weight != 0
    return not bool((alive & ~keep).any()) and 2 * int(alive.sum()) >= int(keep.sum())


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
