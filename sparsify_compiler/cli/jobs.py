"""Carry out what the verbs ask for: references become models and batches, then one call of the api."""

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparsify_compiler import api
from sparsify_compiler.api_bench import bench
from sparsify_compiler.api_table import Draw, MethodTable, method_table
from sparsify_compiler.batches import Batch
from sparsify_compiler.cli.requests import (
    BenchRequest,
    CompileRequest,
    DataChoice,
    EvaluateRequest,
    ExportRequest,
    InspectRequest,
    RecipeChoice,
    TableRequest,
)
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.export.onnx_model import WrittenOnnx
from sparsify_compiler.export.report import Quality, Report, report_from_json
from sparsify_compiler.export.torch import DESCRIPTION, read_description
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.progress import Progress
from sparsify_compiler.runtime.benchmark.report import BenchReport
from sparsify_compiler.sources.data import Data, demo_text, load_data
from sparsify_compiler.sources.images import parse_preprocess
from sparsify_compiler.sources.models import Source, demo_model_path


def compile_model(request: CompileRequest, progress: Progress) -> Report:
    """Read the model and the data, compile, and return the report. Raises SparsifyError."""
    source = _open(request.model, request.trust, progress)
    calibration = _data(request.calibration, source, request.choice, request.trust)
    heldout = _data(request.heldout, source, request.choice, request.trust, "first")
    _, report = api.compile(
        source,
        calibration.batches if calibration else None,
        recipe=request.recipe,
        options=request.options,
        heldout=_heldout(heldout) if heldout else None,
        progress=progress,
        trust=request.trust,
    )
    return report


def demo_request(output: Path, windows: int, sequence_length: int, resume: bool, overwrite: bool) -> CompileRequest:
    """Ask for what `make demo` shows: SmolLM2-135M from its package, 2:4, SparseGPT, the text that comes along.

    Raises:
        ModelError: the package that holds the model is not installed.
    """
    return CompileRequest(
        model=str(demo_model_path()),
        recipe=RecipeChoice(method="sparsegpt", pattern="2:4").recipe(),
        options=Options(output=output, resume=resume, overwrite=overwrite),
        calibration=str(demo_text("calibration")),
        heldout=str(demo_text("heldout")),
        choice=DataChoice(windows, sequence_length),
    )


def export_artefact(request: ExportRequest) -> WrittenOnnx:
    """Write the ONNX file of a saved artefact and check it. Raises SparsifyError."""
    return api.export(
        request.artefact, request.output, flavour=request.flavour, kv_cache=request.kv_cache, trust=request.trust
    )


def inspect_model(request: InspectRequest, progress: Progress) -> api.Inspection:
    """Read the model, and the data if there is some, and look at every site. Raises SparsifyError."""
    source = _open(request.model, request.trust, progress)
    data = _data(request.calibration, source, request.choice, request.trust)
    batches = data.batches if data else None
    return api.inspect(
        source, batches, tokens=request.tokens, dtype=request.dtype, device=request.device, trust=request.trust
    )


def evaluate_model(request: EvaluateRequest, progress: Progress) -> tuple[Quality, ...]:
    """Measure a model on data, beside another one where it was given. Raises SparsifyError."""
    source = _open(request.model, request.trust, progress)
    against = _open(request.against, request.trust, progress) if request.against is not None else None
    if against is not None and source.tokenizer is None:
        # an ONNX file alone cannot read text; the dense model's tokenizer is the same
        source = dataclasses.replace(source, tokenizer=against.tokenizer, vocabulary=against.vocabulary)
    data = _data(request.data, source, request.choice, request.trust, "first")
    assert data is not None
    return api.evaluate(source, _heldout(data), against, device=request.device, progress=progress)


def bench_models(request: BenchRequest, progress: Progress) -> BenchReport:
    """Time models against the first, on a batch of the data or on generated inputs. Raises SparsifyError."""
    sources = [_open(model, request.trust, progress) for model in request.models]
    batch: Batch | None = None
    if request.data is not None:
        reader = next((source for source in sources if source.tokenizer is not None), sources[0])
        data = _data(request.data, reader, request.choice, request.trust)
        assert data is not None
        batch = data.batches[0]
    return bench(
        sources,
        batch,
        samples=request.samples,
        lengths=request.lengths,
        decode=request.decode,
        compiled=request.compiled,
        repeats=request.repeats,
        device=request.device,
        seed=request.choice.seed,
        trust=request.trust,
    )


def compare_methods(request: TableRequest, progress: Progress) -> MethodTable:
    """Read the model and the data, draw by draw, and make the table. Raises SparsifyError."""
    source = _open(request.model, request.trust, progress)
    draws = []
    for number in range(request.draws):
        choice = dataclasses.replace(request.choice, seed=request.choice.seed + number)
        drawn = _read(request.calibration, source, choice, request.trust, part=number > 0)
        draws.append(Draw(drawn.batches, drawn.description))
    measured = dataclasses.replace(request.choice, windows=request.heldout_windows)
    heldout = {
        name: _heldout(_read(reference, source, measured, request.trust, "first"))
        for name, reference in _short_names(request.heldout).items()
    }
    return method_table(
        source,
        draws,
        heldout,
        request.trials,
        output=request.output,
        resume=request.resume,
        share_batches=request.share_batches,
        precision=request.precision,
        device=request.device,
        progress=progress,
        trust=request.trust,
    )


def _short_names(references: Sequence[str]) -> dict[str, str]:
    """Map what tells references apart, the end of a path where that is enough, to them. Raises DataError."""
    short = [reference.rstrip("/").rpartition("/")[2] for reference in references]
    names = short if len(set(short)) == len(short) else references
    if len(set(names)) < len(names):
        raise DataError(f"--heldout {names[0]!r}: given twice; give every set once")
    return dict(zip(names, references, strict=True))


def run_model(model: Path, inputs: Path, output: Path) -> tuple[str, ...]:
    """Run an ONNX file on the arrays of `inputs` (.npz), write its outputs to `output`, and name them with shapes.

    Raises:
        DataError, ModelError: a file that cannot be read, or inputs that do not fit the model.
    """
    found = api.run(model, read_npz(inputs))
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]  # names are the outputs'
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return tuple(f"{name} {value.dtype} {value.shape}" for name, value in found.items())


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read named arrays; nothing is unpickled. Raises DataError."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"inputs {str(path)!r}: not an .npz, or cut short; write the inputs by name with numpy.savez")
    try:
        with path.open("rb") as file:  # numpy itself would leave a damaged file open
            arrays = np.load(file, allow_pickle=False)
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise DataError(f"inputs {str(path)!r}: no such file; give an .npz of the model's inputs by name") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        why = "it holds Python objects" if "pickle" in str(error) else f"cut short? {error}"
        raise DataError(f"inputs {str(path)!r}: not an .npz of plain arrays ({why})") from None


def read_report(artefact: Path) -> Report:
    """Read the report of a folder that compile wrote.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    path = artefact / "report.json"
    try:
        return report_from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{str(artefact)!r} has no report.json; give a folder that compile wrote") from None
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{str(path)!r} is damaged or of a newer version; compile the model again") from None


def artefact_fault(folder: Path) -> str | None:
    """Say what is wrong with the artefact's description in `folder`; None too where there is none (an ONNX input)."""
    if not (folder / DESCRIPTION).exists():
        return None
    try:
        read_description(folder)
    except ModelError as error:
        return " ".join(str(error).split())
    return None


def _open(model: str, trust: bool, progress: Progress) -> Source:
    progress("load", 0, 1)
    source = api.open_source(model, trust)
    progress("load", 1, 1)
    return source


def _data(
    reference: str | None,
    source: Source,
    choice: DataChoice,
    trust: bool,
    choose: Literal["random", "first"] = "random",
) -> Data | None:
    return _read(reference, source, choice, trust, choose) if reference is not None else None


def _read(
    reference: str,
    source: Source,
    choice: DataChoice,
    trust: bool,
    choose: Literal["random", "first"] = "random",
    part: bool = False,
) -> Data:
    return load_data(
        reference,
        source,
        windows=choice.windows,
        sequence_length=choice.sequence_length,
        batch_size=choice.batch_size,
        preprocess=parse_preprocess(choice.preprocess) if choice.preprocess is not None else None,
        choose=choose,
        seed=choice.seed,
        part=part,
        trust=trust,
    )


def _heldout(data: Data) -> api.Heldout:
    return api.Heldout(data.batches, data.labels, data.description, data.pairs)
