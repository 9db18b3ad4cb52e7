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
from torch import Tensor

from sparsify_compiler.batches import Batch, main_tensor, named_tensors
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint, digest
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.evaluate import Forward, fidelity, perplexity, top_k_accuracy
from sparsify_compiler.export.report import FileReport, Quality, Report, SiteReport, Verification
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.prune.layerwise import SiteOutcome, prune_layerwise
from sparsify_compiler.pipeline.options import Options
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

CAUSAL = 1e-4
"""Logits that change less than this share of what later tokens change at their own places are rounding: experts that
see other counts of tokens round otherwise. A masked language model of random weights changes ten times as much."""


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


def measure(dense: Forward | None, sparse: Forward, data: Heldout, progress: Progress) -> tuple[Quality, ...]:
    """Measure what can be: top-1 and top-5 accuracy with labels, a causal model's perplexity, else fidelity."""
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
        raise DataError(
            "without labels, and not a causal language model on token ids: only a comparison can be measured; give the "
            "dense model too"
        )
    close = fidelity(dense, sparse, data.batches, progress)
    return (
        Quality("relative error", 0.0, close.relative_error, data.description),
        Quality("cosine", 1.0, close.cosine, data.description),
    )


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


def _language_model(forward: Forward, batch: Batch) -> bool:
    """Say whether the first output predicts every token from those before it: logits over the vocabulary, causal.

    Causality is found by experiment, at the batch's own sizes because a graph may take no others: the later half of
    each window's tokens is replaced, and the logits of the earlier half must stay.
    """
    ids = main_tensor(batch)
    if ids.is_floating_point() or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    logits = _logits(forward, batch)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape or logits.shape[2] <= int(ids.max()):
        return False
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rank = seen.cumsum(1)
    earlier = seen & (rank <= rank[:, -1:] // 2)
    if not bool(earlier.any()):
        return False
    low, high = int(ids.min()), int(ids.max())
    other = high if high > low else int(low == 0)
    replaced = torch.where(seen & ~earlier, torch.where(ids == low, other, low), ids)
    after = _logits(forward, _with_ids(batch, ids, replaced))
    if after is None or after.shape != logits.shape:
        return False
    change = (after.double() - logits.double()).abs().amax(2).cpu()  # (windows, length)
    earlier = earlier.cpu()
    return bool(change[earlier].max() <= CAUSAL * change[~earlier].max())


def _logits(forward: Forward, batch: Batch) -> Tensor | None:
    with torch.no_grad():
        outputs = forward(batch)
    return outputs[0] if outputs and outputs[0].numel() else None


def _with_ids(batch: Batch, ids: Tensor, replaced: Tensor) -> Batch:
    """Return the batch with the tensor `ids` replaced."""
    if isinstance(batch, Tensor):
        return replaced
    if isinstance(batch, dict):
        return {name: replaced if tensor is ids else tensor for name, tensor in batch.items()}
    return tuple(replaced if tensor is ids else tensor for tensor in batch)
