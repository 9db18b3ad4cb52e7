"""Make the table of models: sites, pruned, refused and why, and how far the written ONNX file is from the model.

    python tests/slow/model_table.py TABLE.md REFERENCE [REFERENCE ...]

REFERENCE is a model as the command line takes it, or a folder whose .onnx files are all taken. Every model is
compiled at 50 % unstructured with Wanda and re-solve on inputs generated for it, and its model.onnx is run. Where
these inputs drive a model to infinity (test models with made-up weights do that), or a layer has more than `WIDEST`
inputs, magnitude is used without data.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import sparsify_compiler as sc
from sparsify_compiler.api import open_source
from sparsify_compiler.errors import CalibrationError, ModelError, SparsifyError
from sparsify_compiler.export.report import Report
from sparsify_compiler.frontends.onnx import load_onnx
from sparsify_compiler.frontends.onnx_generate import generate_inputs
from sparsify_compiler.pipeline.forwards import forward_of, refuses
from sparsify_compiler.sources.data import generate_data
from sparsify_compiler.sources.models import Source

RECIPE = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.Wanda(), 0.5),))
WITHOUT_DATA = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.5),))
WIDEST = 10_000
HEADER = "| model | sites | pruned | dense or refused, and why | bytes, dense to written | difference | seconds |"


def references(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (label, reference) for every model."""
    for argument in arguments:
        path = Path(argument)
        if path.is_dir() and not (path / "config.json").exists() and not (path / "sparsify.json").exists():
            for file in sorted(path.rglob("*.onnx")):
                yield str(file.relative_to(path)), str(file)
        else:
            yield path.name if path.exists() else argument, argument


def batches_for(source: Source) -> list[dict[str, torch.Tensor]]:
    """Generate calibration inputs; the report would call them that, here they only exercise the path."""
    if source.kind == "onnx":
        assert source.path is not None
        graph = load_onnx(source.path)
        return [generate_inputs(graph, seed) for seed in range(2)]
    made = generate_data(source, 0, refuses(forward_of(source, torch.device("cpu")))).batches
    return list(made)  # type: ignore[arg-type]


def widest(source: Source) -> int:
    """Return the most inputs any prunable site of an ONNX file has."""
    if source.kind != "onnx" or source.path is None:
        return 0
    return max((site.in_ for site in load_onnx(source.path).sites if site.refusal is None), default=0)


def row(label: str, reference: str) -> str:
    """Compile one model and describe what came of it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = open_source(reference, trust=True)
            options = sc.Options(output=Path(folder) / "out", tokens=(16,), device="cpu")
            try:
                if widest(source) > WIDEST:
                    raise CalibrationError("wider than this table has time for")
                _, report = sc.compile(source, batches_for(source), recipe=RECIPE, options=options)
            except CalibrationError:
                label += " (magnitude)"
                _, report = sc.compile(source, recipe=WITHOUT_DATA, options=options)
        except ModelError as error:
            if "no prunable site" not in str(error):
                return f"| {label} | | **failed** | {error} | | | |"
            inspection = sc.inspect(reference, device="cpu", trust=True)
            why = Counter(line.site.refusal or line.site.dense_by_default or "" for line in inspection.rows)
            return f"| {label} | {len(inspection.rows)} | 0 | {reasons(why)} | | nothing written | |"
        except SparsifyError as error:
            return f"| {label} | | **failed** | {type(error).__name__}: {error} | | | |"
    return f"| {label} | {describe(report)} | {time.perf_counter() - start:.0f} |"


def describe(report: Report) -> str:
    """Return the middle cells of a compiled model's row."""
    pruned = [site for site in report.sites if site.status == "pruned"]
    why = Counter(site.reason for site in report.sites if site.status != "pruned")
    file = next(file for file in report.files if file.name == "model.onnx")
    check = report.verification
    gap = "not run" if check is None or check.difference is None else f"{check.difference:.1e}"
    sizes = f"{file.dense_bytes:,} to {file.size_bytes:,}"
    return f"{len(report.sites)} | {len(pruned)} | {reasons(why)} | {sizes} | {gap}"


def reasons(why: Counter[str]) -> str:
    """List reasons with their counts."""
    return "; ".join(f"{count} {reason}" for reason, count in why.items()).replace("|", "/")


def main() -> None:
    """Write the table, a row at a time."""
    target, *arguments = sys.argv[1:]
    with open(target, "w", encoding="utf-8") as file:
        file.write(f"{HEADER}\n|{' --- |' * 7}\n")
        for label, reference in references(arguments):
            file.write(row(label, reference) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
