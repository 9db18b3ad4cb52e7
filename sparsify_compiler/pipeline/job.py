"""One compile run: what its stages share, from the user's batches to the report."""

import math
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, main_tensor, named_tensors
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint, digest
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.evaluate import Forward, fidelity, perplexity, top_k_accuracy
from sparsify_compiler.export.report import FileReport, Quality, Report, SiteReport, Verification
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.prune.layerwise import SiteOutcome, prune_layerwise
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.pipeline.workspace import Workspace
from sparsify_compiler.plan import Decision, decide
from sparsify_compiler.problem import Needs
from sparsify_compiler.progress import Progress
from sparsify_compiler.recipe import Recipe, format_recipe

LIBRARIES = (
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "cupy-cuda13x",
    "cupy-cuda12x",
)


@dataclass(frozen=True)
class Heldout:
    """Data to measure quality on: batches, one label tensor a batch where there are labels, and what it is in words."""

    batches: Sequence[Batch]
    labels: Sequence[Tensor] | None = None
    description: str = "held-out data"


@dataclass
class Job:
    """State of one run. `generated` says that `batches` were drawn at random because no data was given."""

    model: str
    recipe: Recipe
    options: Options
    batches: Sequence[Batch]
    generated: bool
    heldout: Heldout | None
    progress: Progress
    workspace: Workspace | None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage for the report."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def prune(self, graph: Graph) -> tuple[tuple[Decision, ...], dict[str, SiteOutcome]]:
        """Decide every site and prune the graph front to back, from a checkpoint where one is resumed.

        Raises:
            DataError: a method needs data and none was given.
        """
        decisions = decide(self.recipe, graph.sites)
        needing = sorted({d.rule.method.name for d in decisions if d.rule and d.rule.method.needs is not Needs.NOTHING})
        if self.generated and needing:
            raise DataError(
                f"method {needing[0]!r} needs calibration data and none was given; give data, or choose magnitude"
            )
        data: Sequence[Batch] = () if self.generated else self.batches
        checkpoint = None
        if self.workspace is not None:
            fingerprint = self._fingerprint(graph, decisions, data)
            checkpoint = Checkpoint(self.workspace.segments, fingerprint, self.options.resume)
        walk = Walk(graph, data, decisions, checkpoint, self.progress)
        with self.stage("prune"):
            outcomes = prune_layerwise(walk)
        for name in walk.starved:
            self.notes.append(f"{name}: no token of the calibration data reached it; it stays dense")
        if not outcomes:
            raise ModelError("nothing was pruned: no chosen site saw a token of the calibration data; nothing written")
        if self.generated:
            self.notes.append(
                "no calibration data was given: weights were chosen without statistics, and outputs are compared on "
                "generated inputs, which say little of the model's quality on real data"
            )
        return decisions, outcomes

    def quality(self, dense: Forward, sparse: Forward) -> tuple[Quality, ...]:
        """Measure the dense and the sparse model on the held-out data, else on the calibration data (said so)."""
        data = self.heldout or Heldout(
            self.batches, None, "generated inputs" if self.generated else "calibration data (no held-out data given)"
        )
        with self.stage("evaluate"):
            return measure(dense, sparse, data, self.progress)

    def report(
        self,
        sites: Sequence[SiteReport],
        quality: Sequence[Quality],
        files: Sequence[FileReport],
        verification: Verification | None,
    ) -> Report:
        """Put the report together."""
        return Report(
            model=self.model,
            command=_command(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=environment(self.options.torch_device()),
            recipe=format_recipe(self.recipe),
            sites=tuple(sites),
            quality=tuple(quality),
            files=tuple(files),
            verification=verification,
            seconds={name: round(value, 3) for name, value in self.seconds.items()},
            peak_memory_bytes=peak_memory_bytes(),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _fingerprint(self, graph: Graph, decisions: Sequence[Decision], data: Sequence[Batch]) -> str:
        weights = (graph.weight(d.site) for d in decisions if d.site.refusal is None)
        tensors = (tensor for batch in data for _, tensor in named_tensors(batch))
        versions = [torch.__version__, metadata.version("sparsify-compiler")]
        names = [(d.site.name, d.site.segment, d.rule is not None) for d in decisions]
        device = self.options.torch_device().type
        return digest(chain((*versions, device, format_recipe(self.recipe), names), weights, tensors))


def measure(dense: Forward | None, sparse: Forward, data: Heldout, progress: Progress) -> tuple[Quality, ...]:
    """Measure what the data allows: top-1 and top-5 accuracy with labels, perplexity on token ids, else fidelity."""
    if not data.batches:
        raise DataError(f"{data.description}: no batch was given; give at least one")
    if data.labels is not None:
        after = top_k_accuracy(sparse, data.batches, data.labels, progress=progress)
        before = top_k_accuracy(dense, data.batches, data.labels, progress=progress) if dense else (None, None)
        return tuple(
            Quality(name, old, new, data.description)
            for name, old, new in zip(("top-1 accuracy", "top-5 accuracy"), before, after, strict=True)
        )
    if _language_model(sparse, data.batches[0]):
        old = perplexity(dense, data.batches, progress) if dense else None
        return (Quality("perplexity", old, perplexity(sparse, data.batches, progress), data.description),)
    if dense is None:
        raise DataError("without labels or token ids only a comparison can be measured; give the dense model too")
    close = fidelity(dense, sparse, data.batches, progress)
    return (
        Quality("relative error", 0.0, close.relative_error, data.description),
        Quality("cosine", 1.0, close.cosine, data.description),
    )


def environment(device: torch.device) -> dict[str, str]:
    """Name the machine and the library versions a figure depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["device"] = device_name(device)
    found["threads"] = str(torch.get_num_threads())
    return found


def device_name(device: torch.device) -> str:
    """Name the accelerator, or the processor, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.processor() or platform.machine()}"


def peak_memory_bytes() -> int:
    """Return the largest resident size the process had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _command() -> str:
    """Return the command line that runs, or the function's name where a program of the user's own does."""
    if sys.argv and Path(sys.argv[0]).name == "sparsify-compiler":
        return shlex.join(["sparsify-compiler", *sys.argv[1:]])
    return "sparsify_compiler.compile(...)"


def _language_model(forward: Forward, batch: Batch) -> bool:
    """Say whether the first output is logits over the vocabulary for every token of the batch."""
    ids = main_tensor(batch)
    if ids.is_floating_point() or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    with torch.no_grad():
        outputs = forward(batch)
    logits = outputs[0] if outputs else None
    return (
        logits is not None
        and logits.dim() == 3
        and logits.shape[:2] == ids.shape
        and logits.shape[2] > int(ids.max())
        and math.prod(logits.shape) > 0
    )
