"""Compile an ONNX file: prune its graph through ONNX Runtime, correct moments, pack, write, verify."""

import dataclasses
from pathlib import Path

from sparsify_compiler.errors import KernelError, VerificationError
from sparsify_compiler.export.onnx_model import OnnxSite, write_packed_onnx
from sparsify_compiler.export.report import Report
from sparsify_compiler.frontends.onnx import load_onnx
from sparsify_compiler.passes.moments import correct_moments
from sparsify_compiler.pipeline.closing_check import explained, growth
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.pruning import prune_graph
from sparsify_compiler.pipeline.site_reports import site_reports
from sparsify_compiler.plan import decide

NO_KERNEL = (
    "an ONNX file runs in ONNX Runtime, which computes packed weights dense; sparse operators are not in this release"
)


def compile_onnx(job: Job, path: Path) -> tuple[Path | None, Report]:
    """Compile the file at `path`; the result is `model.onnx` in the output folder. The file is not modified.

    Raises:
        SparsifyError: anything the user can act on; nothing but finished segments is left on disk then.
    """
    with job.stage("trace"):
        job.progress("read", 0, 1)
        graph, dense = load_onnx(path), load_onnx(path)
        job.progress("read", 1, 1)
    if job.options.require_sparse:
        first = next(each.site.name for each in decide(job.recipe, graph.sites) if each.rule is not None)
        raise KernelError(f"--require-sparse: {first} would run dense: {NO_KERNEL}")
    decisions, outcomes = prune_graph(job, graph)
    if job.options.dtype != "float32":
        job.notes.append(f"dtype {job.options.dtype} was asked: the dtypes of an ONNX file stay as the file has them")
    if job.options.precision != "float32":
        job.notes.append(f"precision {job.options.precision} was asked: ONNX Runtime computes in the file's own dtypes")
    if job.options.recalibrate_batchnorm and not job.generated:
        with job.stage("correct moments"):
            job.notes.extend(correct_moments(graph, dense, job.batches, tuple(outcomes), job.progress))
    quality = job.quality(dense.run, graph.run)
    rules = {d.site.name: d.rule for d in decisions if d.rule is not None}
    for decision in decisions:
        job.notes.extend(f"{decision.site.name}: {note}" for note in graph.notes(decision.site))
    sites = {name: OnnxSite(outcome.keep, rules[name].pattern) for name, outcome in outcomes.items()}
    why = dict.fromkeys(outcomes, NO_KERNEL)
    if job.workspace is None:
        rows = site_reports(decisions, outcomes, {}, why, {}, {}, job.options)
        return None, job.report(rows, quality, (), None)
    expected = graph.run(job.batches[0])
    with job.stage("export ONNX"):
        target = job.workspace.files / "model.onnx"
        flavour = job.options.onnx_flavour
        pruned = (site for site in graph.sites if site.name in outcomes)
        grown = {site.name: growth(dense.weight(site), graph.weight(site)) for site in pruned}
        try:
            written = write_packed_onnx(graph.model, job.batches[0], expected, target, sites, flavour)
        except VerificationError as error:
            raise explained(error, grown) from None
    job.notes.extend(written.notes)
    checked = dataclasses.replace(written.verification, inputs=job.checked_inputs)
    rows = site_reports(decisions, outcomes, {}, why, {}, written.forms, job.options)
    return job.workspace.output / "model.onnx", job.report(rows, quality, written.files, checked)
