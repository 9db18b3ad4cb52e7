"""Compile a torch module: prune, export, verify, lower. The input module stays as it was."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sparsify_compiler.batches import Batch, call
from sparsify_compiler.errors import KernelError, VerificationError
from sparsify_compiler.export.onnx_model import OnnxSite, write_torch_onnx
from sparsify_compiler.export.report import FileReport, Report, Verification
from sparsify_compiler.export.torch import DESCRIPTION, WEIGHTS, write_artefact
from sparsify_compiler.frontends.torch_run import dotted
from sparsify_compiler.frontends.torch_trace import inference
from sparsify_compiler.graph import ConvLayout
from sparsify_compiler.kernel import Packed
from sparsify_compiler.passes.lower import Lowerable, lower, lowerable
from sparsify_compiler.pattern import parse_pattern
from sparsify_compiler.pipeline.closing_check import explained, growth
from sparsify_compiler.pipeline.environment import device_name
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.site_reports import site_reports
from sparsify_compiler.pipeline.torch_prune import Pruned, finish_torch, move_module, prune_torch
from sparsify_compiler.pipeline.tuning import Tuner, conv_inputs, words
from sparsify_compiler.runtime.tuning.tune_conv import ConvInput
from sparsify_compiler.runtime.tuning.verdicts import Verdict, by_reason
from sparsify_compiler.sources.describe import describe


def compile_torch(job: Job, model: nn.Module | ExportedProgram, reference: str) -> tuple[nn.Module, Report]:
    """Compile `model`; `reference` is how an artefact may find its class again (a factory), or empty.

    Raises:
        SparsifyError: anything the user can act on; nothing but finished segments is left on disk then.
    """
    pruned = prune_torch(job, model)
    finish_torch(job, pruned)
    verdicts, parts, why_dense = _measure(job, pruned)
    dense = model if isinstance(model, nn.Module) else model.module()

    def run_dense(batch: Batch) -> tuple[Tensor, ...]:
        with inference(dense):  # the user's module may be in training mode
            return call(dense, batch)

    device = job.options.torch_device()
    quality = job.quality(run_dense, lambda batch: call(pruned.module, _cast(batch, job)))
    move_module(pruned.module, torch.device("cpu"))  # the files are written and checked there
    try:
        packed, files, verification, forms = _write(job, pruned, verdicts, reference)
    except VerificationError as error:
        raise explained(error, _growths(model, pruned)) from None
    move_module(pruned.module, device)
    chosen = {name: verdict.kernel for name, verdict in verdicts.items()}
    tuner = _tuner(job, device)

    def build(part: Lowerable, kernel: str) -> nn.Module:
        name = part.site.name
        return tuner.build(part, parse_pattern(pruned.sites[name].pattern), kernel, verdicts[name].variants)

    lower(pruned.module, chosen, parts, build)
    sites = site_reports(pruned.decisions, pruned.outcomes, verdicts, why_dense, packed, forms, job.options)
    return pruned.module, job.report(sites, quality, files, verification)


def _tuner(job: Job, device: torch.device) -> Tuner:
    options = job.options
    return Tuner(
        options.tokens,
        options.torch_dtype(),
        device,
        job.progress,
        cache=options.cache,
        dense_copy=options.dense_copy,
    )


def _measure(job: Job, pruned: Pruned) -> tuple[dict[str, Verdict], dict[str, Lowerable], dict[str, str]]:
    """Tune every site that could run sparse; the rest with the reason why not."""
    device = job.options.torch_device()
    found = {name: lowerable(pruned.module, site.site, site.keep) for name, site in pruned.sites.items()}
    why_dense = {name: part for name, part in found.items() if isinstance(part, str)}
    parts = {name: part for name, part in found.items() if not isinstance(part, str)}
    patterns = {name: parse_pattern(pruned.sites[name].pattern) for name in parts}
    with job.stage("tune"), _tuner(job, device) as tuner:
        inputs = _conv_inputs(job, pruned, parts)
        for name in [name for name, part in parts.items() if _is_conv(part) and name not in inputs]:
            why_dense[name] = "the first calibration batch does not reach it, so there is no input to measure it on"
            del parts[name]
        verdicts = tuner.verdicts(parts, patterns, inputs)
    dense = [name for name, verdict in verdicts.items() if verdict.kernel == "dense"] + list(why_dense)
    if job.options.require_sparse and dense:
        first = why_dense.get(dense[0]) or _why(verdicts[dense[0]])
        raise KernelError(
            f"--require-sparse: {len(dense)} of {len(pruned.sites)} pruned sites would run dense on "
            f"{device_name(device)}; {dense[0]}: {first}"
        )
    if verdicts:
        job.notes.append(words(verdicts))
    return verdicts, parts, why_dense


def _why(verdict: Verdict) -> str:
    """Say why dense stays, with every refusal where no kernel was measured."""
    if verdict.timings:
        return verdict.reason
    refusals = (f"{', '.join(names)}: {reason}" for reason, names in by_reason(verdict.refused.items()).items())
    return f"{verdict.reason}: {'; '.join(refusals)}"


def _conv_inputs(job: Job, pruned: Pruned, parts: Mapping[str, Lowerable]) -> dict[str, ConvInput]:
    """Return what the first calibration batch feeds the convolutions."""
    names = [name for name, part in parts.items() if _is_conv(part)]
    if not names:
        return {}
    return conv_inputs(pruned.module, names, _cast(job.batches[0], job))


def _is_conv(part: Lowerable) -> bool:
    return isinstance(part.site.layout, ConvLayout)


def _write(
    job: Job, pruned: Pruned, verdicts: Mapping[str, Verdict], reference: str
) -> tuple[Mapping[str, Packed], list[FileReport], Verification | None, Mapping[str, str]]:
    """Write the artefact and the ONNX file, and run the latter."""
    if job.workspace is None:
        return {}, [], None, {}
    folder = job.workspace.files
    sites = tuple(
        dataclasses.replace(site, kernel=verdicts[name].kernel, variants=verdicts[name].variants)
        if name in verdicts
        else site
        for name, site in pruned.sites.items()
    )
    state = pruned.module.state_dict()
    with job.stage("write"):
        description, notes = describe(pruned.module, reference)
        job.notes.extend(notes)
        device = device_name(job.options.torch_device())
        packed = write_artefact(folder, state, sites, description, device, job.options.tokens)
    dense_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _distinct(state))
    files = [
        FileReport(WEIGHTS, (folder / WEIGHTS).stat().st_size, dense_bytes),
        FileReport(DESCRIPTION, (folder / DESCRIPTION).stat().st_size),
    ]
    if not job.options.onnx:
        return packed, files, None, {}
    onnx_sites = {site.site.name: OnnxSite(site.keep, parse_pattern(site.pattern), site.kernel) for site in sites}
    with job.stage("export ONNX"):
        job.progress("export ONNX", 0, 1)
        written = write_torch_onnx(
            pruned.module,
            _cast(job.batches[0], job),
            folder / "model.onnx",
            onnx_sites,
            flavour=job.options.onnx_flavour,
            kv_cache=job.options.kv_cache,
        )
        job.progress("export ONNX", 1, 1)
    job.notes.extend(written.notes)
    checked = dataclasses.replace(written.verification, inputs=job.checked_inputs)
    return packed, [*files, *written.files], checked, written.forms


def _growths(model: nn.Module | ExportedProgram, pruned: Pruned) -> dict[str, float]:
    """Return by how much the largest weight of every pruned site grew."""
    dense = model if isinstance(model, nn.Module) else model.module()
    firsts = {name: site.parameters[0] for name, site in pruned.sites.items()}
    return {name: growth(dotted(dense, first), dotted(pruned.module, first)) for name, first in firsts.items()}


def _distinct(state: Mapping[str, Tensor]) -> list[Tensor]:
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in state.values()}.values())


def _cast(batch: Batch, job: Job) -> Batch:
    """Bring floating inputs into the compiled model's dtype."""
    dtype = job.options.torch_dtype()

    def one(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(batch, Tensor):
        return one(batch)
    if isinstance(batch, dict):
        return {name: one(tensor) for name, tensor in batch.items()}
    return tuple(one(tensor) for tensor in batch)
