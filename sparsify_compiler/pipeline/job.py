"""One compile run: what its stages share, from the user's batches to the report."""

import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import torch

from sparsify_compiler.batches import Batch, named_tensors
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint, digest
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.export.report import FileReport, Quality, Report, SiteReport, Verification
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.prune.layerwise import SiteOutcome, prune_layerwise
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.pipeline.quality import Heldout, measure
from sparsify_compiler.pipeline.workspace import Workspace
from sparsify_compiler.plan import Decision, decide
from sparsify_compiler.problem import Needs
from sparsify_compiler.progress import Progress
from sparsify_compiler.recipe import Recipe, format_recipe
from sparsify_compiler.runtime.machine import versions

LIBRARIES = (
    "sparsify-compiler",
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
            self._say_memory(walk)
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

    def _say_memory(self, walk: Walk) -> None:
        """Say before pruning what the walk will hold beside the model."""
        estimate = walk.estimate()
        statistics, boundaries = estimate.statistics_bytes, estimate.boundary_bytes
        last = max((d.site.segment for d in walk.decisions if d.rule is not None), default=0)
        self.progress(f"prune (about {size(statistics + boundaries)} of statistics and activations)", 0, last + 1)
        self.notes.append(
            f"estimated before pruning: {size(statistics)} for the statistics of the largest segment and "
            f"{size(boundaries)} for the values between segments of {len(walk.batches)} batches, beside the model"
        )

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
        tensors = (tensor for batch in data for _, tensor in named_tensors(batch))
        names = [(d.site.name, d.site.segment, d.rule is not None) for d in decisions]
        where = environment(self.options.torch_device())  # other libraries or threads may round in another order
        return digest(chain((where, format_recipe(self.recipe), names), graph.contents(), tensors))


def environment(device: torch.device) -> dict[str, str]:
    """Name the machine and the library versions a figure depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True), **versions(LIBRARIES)}
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
