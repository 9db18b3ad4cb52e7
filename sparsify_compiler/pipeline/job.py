"""One compile run: what its stages share, from the user's batches to the report."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain

from sparsify_compiler.batches import Batch, named_tensors
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint, digest
from sparsify_compiler.errors import ModelError
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
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.allocate import allocate
from sparsify_compiler.passes.permute import permute_channels
from sparsify_compiler.passes.prune.layerwise import SiteOutcome, prune_layerwise
from sparsify_compiler.passes.prune.rounds import prune_in_rounds
from sparsify_compiler.passes.refine.reconstruct import Reconstruction
from sparsify_compiler.pipeline.environment import command, environment
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.pipeline.own_loss import OwnLoss, own_loss
from sparsify_compiler.pipeline.peak_memory import peak_memory_bytes
from sparsify_compiler.pipeline.quality import Heldout, measure
from sparsify_compiler.pipeline.refine import (
    Lesson,
    differentiable,
    distill_notes,
    distill_reports,
    learn,
    prepare_lesson,
    reconstruct_notes,
    reconstruct_reports,
)
from sparsify_compiler.pipeline.rounds import (
    RoundData,
    divide_batches,
    forward_of_graph,
    heldout_loss,
    round_notes,
    round_reports,
)
from sparsify_compiler.pipeline.workspace import Workspace
from sparsify_compiler.plan import Decision, check_without_data, decide
from sparsify_compiler.progress import Progress
from sparsify_compiler.recipe import Recipe, format_recipe
from sparsify_compiler.refinement import Refine


@dataclass
class Job:
    """State of one run. `generated` says that `batches` were drawn at random because no data was given.

    `handed_out` returns the model as it is pruned by now, finished as its user would have it: rounds are compared by
    that (None: by the graph that is pruned). `watch` is given the same after every round.
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
    handed_out: Callable[[], Forward] | None = None
    watch: Callable[[Forward], None] | None = None

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

    def prune(self, graph: Graph) -> tuple[tuple[Decision, ...], dict[str, SiteOutcome]]:
        """Decide every site and prune the graph front to back, from a checkpoint where one is resumed.

        Raises:
            DataError: a method or a step needs data and none was given.
        """
        decisions = decide(self.recipe, graph.sites)
        if self.generated:
            check_without_data(self.recipe, decisions)
        divided = self._divide()
        data: Sequence[Batch] = () if self.generated else divided.training if divided is not None else self.batches
        decisions = self._before_pruning(graph, data, decisions)
        lesson = self._prepare_lesson(graph, decisions, divided)
        if divided is not None and self.recipe.rounds > 1:
            outcomes, starved = self._prune_in_rounds(graph, decisions, divided)
        else:
            checkpoint = self._checkpoint(graph, decisions, data)
            walk = Walk(graph, data, decisions, checkpoint, self.progress, refine=self._refine(graph))
            with self.stage("prune"):
                self._say_memory(walk)
                loss = self._own_loss(graph, decisions)
                expansions = loss.expand(data, {}) if loss.expand is not None else None
                outcomes, starved = prune_layerwise(walk, expansions), walk.starved
        for name in starved:
            self.notes.append(f"{name}: no token of the calibration data reached it; it stays dense")
        if not outcomes:
            raise ModelError("nothing was pruned: no chosen site saw a token of the calibration data; nothing written")
        outcomes = self._after_pruning(graph, decisions, outcomes, lesson)
        if self.generated:
            self.notes.append(
                "no calibration data was given: weights were chosen without statistics, and outputs are compared on "
                "generated inputs, which say little of the model's quality on real data"
            )
        return decisions, outcomes

    def _divide(self) -> RoundData | None:
        """Keep batches aside to choose rounds and epochs by, where there are such: nothing before reads them."""
        if self.recipe.rounds == 1 and self.recipe.distill is None:
            return None
        return divide_batches(self.batches, self.heldout, self.recipe.rounds, self.options.share_batches)

    def _before_pruning(
        self, graph: Graph, data: Sequence[Batch], decisions: tuple[Decision, ...]
    ) -> tuple[Decision, ...]:
        """Put channels in order and give sites sparsities, as the recipe says; return what became of the decisions."""
        if self.recipe.permute is not None:
            with self.stage("permute"):
                sweeps = self.recipe.permute.sweeps
                permuted = permute_channels(graph, decisions, data, self.batches[0], sweeps, self.progress)
            decisions = permuted.decisions
            self.notes.extend(permuted.notes)
        if self.recipe.allocate is not None:
            with self.stage("allocate"):
                allocation = allocate(graph, data, decisions, self.recipe.allocate, self.progress)
            decisions = allocation.decisions
            self.notes.extend(allocation.notes)
        return decisions

    def _prepare_lesson(self, graph: Graph, decisions: Sequence[Decision], divided: RoundData | None) -> Lesson | None:
        """Remember what the dense model does, where [distill] will want it."""
        if self.recipe.distill is None or divided is None:
            return None
        with self.stage("distill"):
            return prepare_lesson(graph, decisions, divided, self.progress)

    def _refine(self, graph: Graph) -> Refine | None:
        """Return what [reconstruct] does to every segment that was pruned."""
        settings = self.recipe.reconstruct
        return Reconstruction(differentiable(graph), settings, self.progress) if settings is not None else None

    def _after_pruning(
        self,
        graph: Graph,
        decisions: Sequence[Decision],
        outcomes: dict[str, SiteOutcome],
        lesson: Lesson | None,
    ) -> dict[str, SiteOutcome]:
        """Report what was reconstructed, and distil; return the outcomes with the masks they have then."""
        if self.recipe.reconstruct is not None:
            self.steps += reconstruct_reports(outcomes)
            self.notes.extend(reconstruct_notes(outcomes))
        if self.recipe.distill is not None and lesson is not None:
            with self.stage("distill"):
                outcomes, done = learn(graph, decisions, outcomes, lesson, self.recipe.distill, self.progress)
            self.steps += distill_reports(done, lesson)
            self.notes.extend(distill_notes(done, lesson, self.heldout is not None))
        return outcomes

    def _prune_in_rounds(
        self, graph: Graph, decisions: Sequence[Decision], data: RoundData
    ) -> tuple[dict[str, SiteOutcome], Sequence[str]]:
        """Prune as often as the recipe says; return the best round's outcomes, and the sites that no token reached."""
        count, refine = self.recipe.rounds, self._refine(graph)
        checkpoint = self._checkpoint(graph, decisions, self.batches, data.split)
        with self.stage("prune"):
            largest = max(data.sets, key=len)
            self._say_memory(Walk(graph, largest, decisions, dense_targets=True, refine=refine))
            name, measure_round = heldout_loss(graph, data.heldout, self.progress, lambda: self._after_round(graph))
            loss = self._own_loss(graph, decisions)
            rounds = prune_in_rounds(
                graph,
                data.sets,
                decisions,
                count,
                measure_round,
                checkpoint,
                self.progress,
                refine=refine,
                expand=loss.expand,
                tune=loss.tune,
            )
        copies = 8 * sum(d.site.groups * d.site.out * d.site.in_ for d in decisions if d.rule is not None)
        self.notes.append(f"rounds: {size(copies)} more held the dense weights and the best round's")
        self.rounds = round_reports(rounds, data, name)
        self.notes.extend(round_notes(rounds, data, self.heldout is not None))
        return dict(rounds.sites), rounds.starved

    def _after_round(self, graph: Graph) -> Forward:
        """Return the model that a round left, shown to whoever watches."""
        forward = self.handed_out() if self.handed_out is not None else forward_of_graph(graph)
        if self.watch is not None:
            self.watch(forward)
        return forward

    def _own_loss(self, graph: Graph, decisions: Sequence[Decision]) -> OwnLoss:
        found = own_loss(graph, decisions, self.recipe, self.batches, self.progress)
        self.notes.extend(found.notes)
        return found

    def _say_memory(self, walk: Walk) -> None:
        """Say before pruning what the walk will hold beside the model."""
        estimate = walk.estimate()
        statistics, boundaries = estimate.statistics_bytes, estimate.boundary_bytes
        last = max((d.site.segment for d in walk.decisions if d.rule is not None), default=0)
        self.progress(f"prune (about {size(statistics + boundaries)} of statistics and activations)", 0, last + 1)
        if not statistics + boundaries:  # a method that reads no data
            return
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

    def _checkpoint(
        self,
        graph: Graph,
        decisions: Sequence[Decision],
        data: Sequence[Batch],
        split: tuple[tuple[int, ...], ...] = (),
    ) -> Checkpoint | None:
        """Open the checkpoint of a run that writes files; `split` is how rounds divide the batches."""
        if self.workspace is None:
            return None
        tensors = (tensor for batch in data for _, tensor in named_tensors(batch))
        names = [(d.site.name, d.site.segment, d.rule and d.rule.sparsity) for d in decisions]
        where = environment(self.options.torch_device())  # other libraries or threads may round in another order
        parts = chain((where, format_recipe(self.recipe), names, split), graph.contents(), tensors)
        return Checkpoint(self.workspace.segments, digest(parts), self.options.resume)
