"""Rewrite an ONNX graph with pruned weights into its packed form: the same graph, only the pruned products changed.

    Given:   %y = MatMul(%x, %w)                  # %w (in, out), half of it zero
    Result:  %y = ai.sparsify.NMLinear(%x, %values, %mask)

    Given:   %y = Gemm(%x, %w, %c)                # alpha = beta = 1, transA = 0
    Result:  %h = ai.sparsify.NMLinear(%x, %values, %mask)
             %y = Add(%h, %c)

    Given:   %y = Conv(%x, %w), or any other Gemm or MatMul
    Result:  %v = ai.sparsify.NMWeight(%values, %mask)
             %y = Conv(%x, %v)                    # the user's own node, otherwise unchanged

A weight whose packed form is not smaller, or that something else also reads, stays in the file as dense zeros, with
the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir
from torch import Tensor

from sparsify_compiler.errors import ExportError
from sparsify_compiler.export.onnx_bodies import DOMAIN, DOMAIN_VERSION, LEAST_OPSET, make_function, operator_name
from sparsify_compiler.export.onnx_marks import mark_model, mark_site, weight_hash
from sparsify_compiler.export.onnx_rewrite import rewrite_products
from sparsify_compiler.export.onnx_tensorrt import ELIGIBLE, tensorrt_refusal
from sparsify_compiler.export.onnx_weights import obstacle, stored_bytes
from sparsify_compiler.frontends.onnx_products import Product
from sparsify_compiler.kernel import Packed
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.runtime.formats import format_for

Flavour = Literal["packed", "dense", "trt"]

DENSE = "dense zeros"

_LEAST_IR = 8  # model-local functions


@dataclass(frozen=True)
class SiteWeight:
    """A pruned weight that is in an ONNX graph, and the products that read it, in execution order.

    `weight` (groups, out, in), in the dtype the products read, is exactly what the graph holds, zero where `keep`
    (groups, out, in) bool is False. `run` columns share one kernel tap. `metadata` is written with the node: chosen
    kernel, measured times.
    """

    name: str
    products: tuple[Product, ...]
    weight: Tensor
    keep: Tensor
    pattern: Pattern
    run: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class SiteForm:
    """How a site is written. `form` is the operator ("NMLinear", "BitmapWeight", ...) or "dense zeros".

    `reason` says why it is not packed, or about TensorRT whether its sparse tactics can take the weight.
    """

    name: str
    form: str
    dense_bytes: int
    written_bytes: int
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.form} ({self.reason})" if self.reason else self.form


@dataclass(frozen=True)
class PackResult:
    """The rewritten model (the same object that was given), one form per site, and what a reader must know."""

    model: onnx_ir.Model
    sites: tuple[SiteForm, ...]
    notes: tuple[str, ...]

    @property
    def saved_bytes(self) -> int:
        """Bytes by which the weights shrank."""
        return sum(site.dense_bytes - site.written_bytes for site in self.sites)


def pack_model(model: onnx_ir.Model, sites: Sequence[SiteWeight], flavour: Flavour = "packed") -> PackResult:
    """Replace the products of `sites` by their packed form. `model` is modified; nodes of other products are not.

    `flavour` "dense" and "trt" leave every weight as dense zeros; "trt" says which ones TensorRT's sparse tactics can
    take.

    Raises:
        ExportError: a weight of the graph is not zero where its site was pruned.
        KernelError: a keep mask does not follow its pattern, or a weight is not finite.
    """
    opset = model.graph.opset_imports.get("", 1)
    used: set[tuple[str, bool]] = set()
    forms = tuple(_write_site(model, site, opset, flavour, used) for site in sites)
    notes = []
    if any(form.form == DENSE for form in forms) and flavour == "packed" and opset < LEAST_OPSET:
        notes.append(f"opset {opset}: packed weights need opset {LEAST_OPSET}; the pruned weights are dense zeros")
    if used and model.ir_version < _LEAST_IR:
        notes.append(f"IR version raised from {model.ir_version} to {_LEAST_IR}, the first with function bodies")
        model.ir_version = _LEAST_IR
    for layout, is_product in sorted(used):  # last: whatever rewrites a graph may inline functions
        function = make_function(layout, is_product, opset)
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    mark_model(model)
    return PackResult(model, forms, tuple(notes))


def _write_site(
    model: onnx_ir.Model, site: SiteWeight, opset: int, flavour: Flavour, used: set[tuple[str, bool]]
) -> SiteForm:
    """Write one site; the functions its nodes need are added to `used`."""
    if alive := int(((site.weight != 0) & ~site.keep).sum()):
        raise ExportError(
            f"site {site.name!r}: the graph's weight is not zero in {alive} pruned entries; "
            "export the pruned model, not the dense one"
        )
    weight = site.weight.reshape(-1, site.weight.shape[-1])  # (groups * out, in)
    keep = site.keep.reshape(weight.shape)
    dense_bytes = stored_bytes(site.products)
    entries = {
        "pattern": str(site.pattern),
        "sparsity": f"{1 - keep.float().mean().item():.6g}",
        "weight_sha256": weight_hash(weight),
        **site.metadata,
    }
    packed = _pack(site, weight, keep, opset, dense_bytes) if flavour == "packed" else _why_dense(site, flavour)
    if isinstance(packed, str):
        mark_site(model, site.name, [product.node for product in site.products], entries)
        return SiteForm(site.name, DENSE, dense_bytes, dense_bytes, packed)
    nodes = rewrite_products(model.graph, site.name, site.products, packed, opset)
    mark_site(model, site.name, nodes, entries)
    operators = sorted({node.op_type for node in nodes})
    used.update((packed.layout, name == operator_name(packed.layout, True)) for name in operators)
    return SiteForm(site.name, " + ".join(operators), dense_bytes, packed.size_bytes())


def _pack(site: SiteWeight, weight: Tensor, keep: Tensor, opset: int, dense_bytes: int) -> Packed | str:
    """Pack a weight (groups * out, in), or say why it stays dense."""
    if opset < LEAST_OPSET:
        return f"opset {opset} is below {LEAST_OPSET}"
    if reason := obstacle(site.products):
        return reason
    packed = format_for(site.pattern).pack(weight, keep, site.pattern, site.run)
    if packed.size_bytes() >= dense_bytes:
        return f"packed it would take {packed.size_bytes():,} bytes, dense {dense_bytes:,}"
    return packed


def _why_dense(site: SiteWeight, flavour: Flavour) -> str:
    if flavour == "dense":
        return "as asked"
    return tensorrt_refusal(site.keep, site.run, site.products[0].layout) or ELIGIBLE
