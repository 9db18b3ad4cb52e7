"""From a pruned model to a checked ONNX file: export or take the graph, pack it, write it, run it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir
import torch
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, call, named_tensors, sample_count
from sparsify_compiler.export.onnx_cache import empty_past, export_with_cache, is_decoder_without_cache
from sparsify_compiler.export.onnx_pack import Flavour, pack_model
from sparsify_compiler.export.onnx_sites import SiteMask, site_products, site_weights
from sparsify_compiler.export.onnx_torch import export_torch
from sparsify_compiler.export.onnx_verify import TOLERANCES, verify, write_onnx
from sparsify_compiler.export.report import FileReport, Verification
from sparsify_compiler.pattern import Pattern


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

    Raises:
        ExportError: torch cannot export the module, or the disk is full.
        VerificationError: the file's outputs differ from the module's beyond the stated tolerance.
    """
    exported = export_with_cache(module, batch) if kv_cache else export_torch(module, batch)
    notes = list(exported.notes)
    if not kv_cache and is_decoder_without_cache(module):
        notes.append(
            "the ONNX file has no key-value cache: every generated token recomputes the whole prefix; export with "
            "--kv-cache to generate text"
        )
    with torch.no_grad():
        expected = call(module, batch)
    feeds: dict[str, object] = {}
    if kv_cache:
        feeds = {**dict(named_tensors(_named_ids(batch))), **empty_past(exported.model, sample_count(batch))}
        expected = expected[:1]
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return _write(exported.model, path, sites, flavour, feeds or batch, expected, TOLERANCES[dtype], notes)


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
    return _write(model, path, sites, flavour, batch, expected, TOLERANCES[torch.float32], [])


def _write(
    model: onnx_ir.Model,
    path: Path,
    sites: Mapping[str, OnnxSite],
    flavour: Flavour,
    feeds: object,
    expected: Sequence[Tensor],
    tolerance: float,
    notes: list[str],
) -> WrittenOnnx:
    products = site_products(model)
    missing = [name for name in sites if name not in products]
    forms = dict.fromkeys(missing, "dense zeros (torch's exporter wrote the product in another form)")
    notes.extend(f"{name}: not found in the exported ONNX graph; its weight is dense zeros there" for name in missing)
    masks = {name: site.mask() for name, site in sites.items() if name in products}
    packed = pack_model(model, site_weights(model, products, masks), flavour)
    forms.update({form.name: str(form) for form in packed.sites})
    written = write_onnx(packed.model, path, packed.saved_bytes)
    if written.objection is not None:
        notes.append(f"ONNX's checker objects to {path.name}: {written.objection}")
    verification = verify(path, feeds, expected, tolerance)  # type: ignore[arg-type]  # a batch, or arrays by name
    return WrittenOnnx(written.files, verification, forms, (*notes, *packed.notes))


def _named_ids(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, dict):
        return batch
    return {"input_ids": batch if isinstance(batch, Tensor) else batch[0]}
