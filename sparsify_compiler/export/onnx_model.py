"""From a pruned model to a checked ONNX file: export or take the graph, pack it, write it, run it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, call
from sparsify_compiler.export.onnx_cache import export_with_cache, is_decoder_without_cache, verify_with_cache
from sparsify_compiler.export.onnx_pack import Flavour, pack_model
from sparsify_compiler.export.onnx_sites import SiteMask, match_sites, site_weights
from sparsify_compiler.export.onnx_torch import export_torch
from sparsify_compiler.export.onnx_verify import tolerance_for, verify, write_onnx
from sparsify_compiler.export.report import FileReport, Verification
from sparsify_compiler.frontends.torch_trace import inference, is_text
from sparsify_compiler.pattern import Pattern

CHECKED_TOKENS = 128
"""Logits of two windows of 1,024 tokens would be 400 MB in the model and as much again in ONNX Runtime."""


@dataclass(frozen=True)
class OnnxSite:
    """A pruned site as the file should hold it: `keep` (groups, out, in) bool; `metadata` is written with the node."""

    keep: Tensor
    pattern: Pattern
    kernel: str = "dense"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def mask(self) -> SiteMask:
        """Return what `onnx_sites` reads."""
        return SiteMask(self.keep, self.pattern, {"kernel": self.kernel, **self.metadata})


@dataclass(frozen=True)
class WrittenOnnx:
    """The files, the check's result, and per site how its weight is written, in words."""

    files: tuple[FileReport, ...]
    verification: Verification
    forms: Mapping[str, str]
    notes: tuple[str, ...]


def write_torch_onnx(
    module: nn.Module,
    batch: Batch,
    path: Path,
    sites: Mapping[str, OnnxSite],
    flavour: Flavour = "packed",
    kv_cache: bool = False,
) -> WrittenOnnx:
    """Export `module` (pruned weights as dense zeros) to `path`, pack the sites, and check the file on `batch`.

    Of long texts the first `CHECKED_TOKENS` tokens are checked, where the graph takes other lengths.

    Raises:
        ExportError: torch cannot export the module, or the disk is full.
        VerificationError: the file's outputs differ from the module's beyond the stated tolerance.
    """
    exported = export_with_cache(module, batch) if kv_cache else export_torch(module, batch)
    if _length_is_free(exported.model):
        batch = _excerpt(batch)
    notes = list(exported.notes)
    if not kv_cache and is_decoder_without_cache(module):
        notes.append(
            "the ONNX file has no key-value cache: every generated token recomputes the whole prefix; export with "
            "--kv-cache to generate text"
        )
    with inference(module):
        expected = call(module, batch)

    def check(tolerance: float) -> Verification:
        if kv_cache:
            return verify_with_cache(path, exported.model, batch, expected[0], tolerance)
        return verify(path, batch, expected, tolerance)

    return _write(exported.model, path, sites, flavour, check, notes)


def write_packed_onnx(
    model: onnx_ir.Model,
    batch: Batch,
    expected: Sequence[Tensor],
    path: Path,
    sites: Mapping[str, OnnxSite],
    flavour: Flavour = "packed",
) -> WrittenOnnx:
    """Pack the sites of an ONNX graph whose pruned weights are dense zeros, write it to `path` and check it.

    `expected` are the graph's own outputs on `batch`. `model` is modified.

    Raises:
        ExportError, VerificationError: as `write_torch_onnx`.
    """
    return _write(model, path, sites, flavour, lambda tolerance: verify(path, batch, expected, tolerance), [])


def _write(
    model: onnx_ir.Model,
    path: Path,
    sites: Mapping[str, OnnxSite],
    flavour: Flavour,
    check: Callable[[float], Verification],
    notes: list[str],
) -> WrittenOnnx:
    masks = {name: site.mask() for name, site in sites.items()}
    products = match_sites(model, masks)
    missing = [name for name in sites if name not in products]
    forms = dict.fromkeys(missing, "dense zeros (torch's exporter wrote the product in another form)")
    notes.extend(f"{name}: not found in the exported ONNX graph; its weight is dense zeros there" for name in missing)
    packed = pack_model(model, site_weights(model, products, {name: masks[name] for name in products}), flavour)
    forms.update({form.name: str(form) for form in packed.sites})
    written = write_onnx(packed.model, path, packed.saved_bytes)
    if written.objection is not None:
        notes.append(f"ONNX's checker objects to {path.name}: {written.objection}")
    return WrittenOnnx(written.files, check(tolerance_for(packed.model)), forms, (*notes, *packed.notes))


def _length_is_free(model: onnx_ir.Model) -> bool:
    """Say whether the model takes token ids and masks of any length."""
    inputs = [(value.shape, value.dtype) for value in model.graph.inputs]
    return all(
        isinstance(shape[1], onnx_ir.SymbolicDim)
        for shape, dtype in inputs
        if shape is not None and len(shape) == 2 and dtype is not None and not dtype.is_floating_point()
    )


def _excerpt(batch: Batch) -> Batch:
    """Keep the first tokens of token ids and of whatever else has one integer a token."""

    def one(tensor: Tensor) -> Tensor:
        return tensor[:, :CHECKED_TOKENS] if is_text(tensor) else tensor

    if isinstance(batch, Tensor):
        return one(batch)
    if isinstance(batch, dict):
        return {name: one(tensor) for name, tensor in batch.items()}
    return tuple(one(tensor) for tensor in batch)
