"""The public functions: compile, load, inspect, evaluate, export, run (those that time things: api_bench.py).

    compiled, report = sparsify_compiler.compile(model, batches, recipe=recipe)

The model that is given is never changed. Nothing is fetched, and nothing that runs code is read without `trust`.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from sparsify_compiler.batches import Batch, home
from sparsify_compiler.errors import DataError, ExportError
from sparsify_compiler.export.onnx_model import OnnxSite, WrittenOnnx, write_torch_onnx
from sparsify_compiler.export.onnx_pack import Flavour
from sparsify_compiler.export.report import Quality, Report
from sparsify_compiler.export.report_html import write_report
from sparsify_compiler.export.torch import Artefact, load_state, read_artefact
from sparsify_compiler.frontends.onnx import load_onnx
from sparsify_compiler.frontends.torch import trace_module, trace_program
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.pattern import parse_pattern
from sparsify_compiler.pipeline.forwards import forward_of, refuses
from sparsify_compiler.pipeline.inspection import Inspection, SiteInspection, inspect_graph
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.loading import put_kernels
from sparsify_compiler.pipeline.onnx import compile_onnx
from sparsify_compiler.pipeline.options import Options, check_share
from sparsify_compiler.pipeline.quality import Heldout, measure
from sparsify_compiler.pipeline.torch import compile_torch
from sparsify_compiler.pipeline.workspace import Workspace
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.recipe import Recipe
from sparsify_compiler.runtime.ort import run_file
from sparsify_compiler.sources.data import generate_data
from sparsify_compiler.sources.describe import rebuild
from sparsify_compiler.sources.models import Source, import_attribute, load_model, module_source, program_source

Model = nn.Module | ExportedProgram | Source | Path | str
"""A module or program in memory, or a reference as the command line takes it."""

__all__ = ["METHODS", "Heldout", "Inspection", "Options", "SiteInspection", "compile", "evaluate", "export", "inspect"]
__all__ += ["load", "open_source", "random_batches", "run"]


def compile(
    model: Model,
    batches: Iterable[Batch] | None = None,
    *,
    recipe: Recipe,
    options: Options | None = None,
    heldout: Iterable[Batch] | Heldout | None = None,
    progress: Progress = silent,
    trust: bool = False,
) -> tuple[nn.Module | Path | None, Report]:
    """Prune `model` by `recipe` on calibration `batches`, export and check it, and say what was done to every layer.

    A torch model comes back as a copy of the user's own module, class and methods intact (a GraphModule for a
    torch.export program); an ONNX file as the path of the new file, None without `options.output`. Without `batches`
    (nor any from the model's own factory) only methods that need no statistics run, and outputs are compared on
    generated inputs, which the report says. `heldout` is what quality is measured on, before and after.

    Raises:
        SparsifyError: anything the user can act on, in one sentence. `options.output` is then as it was before;
            finished segments stay beside it for `Options(resume=True)`.
    """
    options = options or Options()
    check_share(options.share_batches, (recipe,))
    source = open_source(model, trust)
    workspace = Workspace(options.output, options.overwrite, options.resume) if options.output is not None else None
    given = _given(batches, source)
    made = given if given is not None else random_batches(source, options.seed, options.torch_device())
    held = heldout if isinstance(heldout, Heldout) or heldout is None else Heldout(_sequence(heldout) or ())
    job = Job(source.reference, recipe, options, made, given is None, held, progress, workspace)
    if workspace is None:
        return _compile(job, source)
    job.segments = workspace.segments
    workspace.start()
    with ExitStack() as unfinished:
        unfinished.callback(workspace.abandon)
        result, report = _compile(job, source)
        if source.tokenizer is not None:
            source.tokenizer.save(workspace.files)  # so that the output folder can be evaluated on text
        report = write_report(report, workspace.files)
        workspace.commit()
        unfinished.pop_all()
    return result, report


def load(folder: Path | str, into: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """Load the torch module that `compile` wrote to `folder`, in eval mode, kernels as they were chosen.

    A Hugging Face class is rebuilt from its configuration; any other module from its factory (with `trust`), or give
    one of the same class as `into`, which is modified. Kernels are used on the device they were measured on; elsewhere
    (`module.to("cuda")` later, say) compile again for verdicts of that device. A UserWarning says how many sites whose
    sparse kernel won run dense here, and why.

    Raises:
        ModelError: not an artefact, damaged, of a newer version, or not fitting the module.
        KernelError: it names a kernel that this version has not.
        TrustError: the module comes from a factory and `trust` is False.
    """
    folder = Path(folder)
    artefact = read_artefact(folder)
    module = _restored(folder, artefact, into, trust)
    if why := put_kernels(module, artefact):
        warnings.warn(why, UserWarning, stacklevel=2)
    return module.eval()


def inspect(
    model: Model,
    batches: Iterable[Batch] | None = None,
    *,
    tokens: tuple[int, ...] = (1, 16, 2048),
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    trust: bool = False,
) -> Inspection:
    """List every site of `model`, prunable or not, with reasons, and estimate what compiling it to `dtype` would take.

    Without `batches` (nor any from the model's own factory) the figures are those of generated inputs; `notes` say so.

    Raises:
        SparsifyError: the model or the data cannot be read.
    """
    source = open_source(model, trust)
    options = Options(tokens=tokens, dtype=dtype, device=device)
    where = options.torch_device()
    given = _given(batches, source)
    used = given or random_batches(source, seed, where)
    graph, size = _graph(source, used[0], where)
    return inspect_graph(graph, used, tokens, options.torch_dtype(), where, size, generated=given is None)


def evaluate(
    model: Model,
    data: Heldout,
    against: Model | None = None,
    *,
    device: str = "auto",
    progress: Progress = silent,
    trust: bool = False,
) -> tuple[Quality, ...]:
    """Measure `model`, and `against` beside it: accuracy with labels, perplexity on token ids, else how close they are.

    Raises:
        SparsifyError: the data does not fit, or nothing can be measured without `against`.
    """
    where = Options(device=device).torch_device()
    dense = None if against is None else forward_of(open_source(against, trust), where)
    return measure(dense, forward_of(open_source(model, trust), where), data, progress)


def export(
    folder: Path | str,
    output: Path | str,
    *,
    batch: Batch | None = None,
    flavour: Flavour = "packed",
    kv_cache: bool = False,
    into: nn.Module | None = None,
    trust: bool = False,
) -> WrittenOnnx:
    """Write the ONNX file of the artefact in `folder` and check it in ONNX Runtime, on `batch` or generated inputs.

    Raises:
        ExportError, VerificationError: as `compile`. Nothing is written then, and a file of that name stays.
    """
    folder, output = Path(folder), Path(output)
    artefact = read_artefact(folder)
    module = _restored(folder, artefact, into, trust)
    source = module_source(module.eval(), str(folder))
    example = batch if batch is not None else random_batches(source, 0, torch.device("cpu"))[0]
    sites = {site.site.name: OnnxSite(site.keep, parse_pattern(site.pattern), site.kernel) for site in artefact.sites}
    try:
        with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            written = write_torch_onnx(module, example, Path(temporary) / output.name, sites, flavour, kv_cache)
            for file in Path(temporary).iterdir():
                os.replace(file, output.parent / file.name)
    except OSError as error:
        raise ExportError(f"cannot write {output}: {error.strerror or error}") from None
    inputs = "generated inputs" if batch is None else "the batch given"
    return replace(written, verification=replace(written.verification, inputs=inputs))


def run(path: Path | str, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Run an ONNX file once in ONNX Runtime on named arrays and return its outputs by name.

    Raises:
        DataError, ModelError: inputs that do not fit, or a file that does not load.
    """
    return run_file(path, inputs)


def open_source(model: Model, trust: bool = False) -> Source:
    """Read whatever names a model into a `Source`. Raises ModelError, TrustError."""
    if isinstance(model, Source):
        return model
    if isinstance(model, nn.Module):
        return module_source(model)
    if isinstance(model, ExportedProgram):
        return program_source(model)
    return load_model(str(model), trust=trust, load_artefact=lambda folder: load(folder, trust=trust))


def _compile(job: Job, source: Source) -> tuple[nn.Module | Path | None, Report]:
    if source.kind == "onnx":
        assert source.path is not None
        return compile_onnx(job, source.path)
    model = source.program if source.program is not None else source.module
    assert model is not None
    if isinstance(model, nn.Module) and source.kind != "module":
        model.to(job.options.torch_device())  # read here, so nobody else's
    return compile_torch(job, model, source.reference if source.kind == "factory" else "")


def _restored(folder: Path, artefact: Artefact, into: nn.Module | None, trust: bool) -> nn.Module:
    """Rebuild the artefact's module, or take `into`, and put the artefact's dense state into it."""
    module = into
    if module is None:
        module = rebuild(artefact.model, folder, lambda reference: import_attribute(reference, trust, "model"))
    load_state(module, artefact, str(folder))
    return module


def _given(batches: Iterable[Batch] | None, source: Source) -> Sequence[Batch] | None:
    """Return the caller's batches, else those of the model's own factory. Raises DataError for none at all."""
    given = _sequence(batches) if batches is not None else source.batches
    if given is not None and not given:
        raise DataError("calibration: no batch was given; give at least one, or None for methods that need no data")
    return given


def random_batches(source: Source, seed: int, device: torch.device) -> Sequence[Batch]:
    """Generate inputs the model accepts, on `device`. Raises DataError where it accepts none."""
    if source.kind == "module" and source.module is not None:  # the caller's own: probed where it is, not moved
        device = home(source.module, device)
    return generate_data(source, seed, refuses(forward_of(source, device))).batches


def _sequence(batches: Iterable[Batch] | None) -> Sequence[Batch] | None:
    """Keep what can be read many times as it is (images are decoded when read); hold anything else."""
    return batches if batches is None or isinstance(batches, Sequence) else list(batches)


def _graph(source: Source, batch: Batch, device: torch.device) -> tuple[Graph, int]:
    if source.kind == "onnx":
        assert source.path is not None
        return load_onnx(source.path), source.path.stat().st_size
    if source.program is not None:
        graph = trace_program(source.program, device)
    else:
        assert source.module is not None
        graph = trace_module(source.module, batch, device)
    return graph, sum(p.numel() * p.element_size() for p in graph.module.parameters())
