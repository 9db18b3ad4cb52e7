"""One compile run: what its stages share, from the user's batches to the report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sparsify_compiler.batches import Batch
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.export.report import (
    FileReport,
    Quality,
    Report,
    RoundReport,
    SiteReport,
    StepReport,
    Verification,
)
from sparsify_compiler.passes.prune.layerwise import SiteOutcome
from sparsify_compiler.pipeline.environment import command, environment
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.pipeline.peak_memory import peak_memory_bytes
from sparsify_compiler.pipeline.quality import Heldout, measure
from sparsify_compiler.pipeline.workspace import Workspace
from sparsify_compiler.progress import Progress
from sparsify_compiler.recipe import Recipe, format_recipe


@dataclass
class Job:
    """State of one run. `generated` says that `batches` were drawn at random because no data was given.

    `segments` is the folder of what a resumed run goes on from, None to keep nothing. `watch_round` is given the model
    after every round, finished as its user would have it; `watch_pruned` that before [distill], and its sites.
    """

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
    rounds: tuple[RoundReport, ...] = ()
    steps: tuple[StepReport, ...] = ()
    segments: Path | None = None
    watch_round: Callable[[Forward], None] | None = None
    watch_pruned: Callable[[Forward, Mapping[str, SiteOutcome]], None] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage for the report."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def checked_inputs(self) -> str:
        """Name what the exported file is run on: the first of the batches."""
        return "generated inputs" if self.generated else "the first calibration batch"

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
            command=command(),
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
            rounds=self.rounds,
            steps=self.steps,
        )
