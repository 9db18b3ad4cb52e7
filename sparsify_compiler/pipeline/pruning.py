"""The steps of a recipe on one graph, in order: permute, allocate, prune (in rounds), reconstruct, distil."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from sparsify_compiler.batches import Batch, named_tensors
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.checkpoint import Checkpoint, digest
from sparsify_compiler.errors import ModelError
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.export.report_rows import size
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.permute import permute_channels
from sparsify_compiler.passes.prune.layerwise import SiteOutcome, prune_layerwise
from sparsify_compiler.passes.prune.rounds import prune_in_rounds
from sparsify_compiler.passes.refine.reconstruct import Reconstruction
from sparsify_compiler.pipeline.allocation import allocate_sites, allocation_record, restored_allocation
from sparsify_compiler.pipeline.environment import environment
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.own_loss import OwnLoss, check_trainable, own_loss
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
from sparsify_compiler.plan import Decision, check_without_data, decide
from sparsify_compiler.precision import whole_float32
from sparsify_compiler.recipe import format_recipe
from sparsify_compiler.refinement import Refine


@dataclass(frozen=True)
class Normalisation:
    """What a module with BatchNorm asks for: its statistics follow what pruning does to the weights of the graph.

    `handed_out` returns the module with the weights that the graph has now and statistics moved to fit them; `settle`
    returns the same and moves the graph's own, so that what runs through it from then on meets them.
    """

    handed_out: Callable[[], Forward]
    settle: Callable[[], Forward]


def prune_graph(
    job: Job, graph: Graph, normalisation: Normalisation | None = None
) -> tuple[tuple[Decision, ...], dict[str, SiteOutcome]]:
    """Decide every site of `graph` and prune it front to back, from a checkpoint where one is resumed.

    Rounds, and the model before and after [distill], are those of `normalisation` where there is one.

    Raises:
        SparsifyError: a recipe or data that do not fit the graph, at once; statistics that are not finite or no layer
            can be solved with, on the way.
    """
    with whole_float32():  # of all statistics: allocation, gradients and sensitivities have theirs too
        return _Pruning(job, graph, normalisation).run()


class _Pruning:
    """One run of the steps: what they share is the job, the graph and how the calibration data is divided."""

    def __init__(self, job: Job, graph: Graph, normalisation: Normalisation | None) -> None:
        self._job = job
        self._recipe = job.recipe
        self._graph = graph
        self._normalisation = normalisation
        self._decisions = decide(job.recipe, graph.sites)
        if job.generated:
            check_without_data(job.recipe, self._decisions)
        check_trainable(graph, self._decisions, job.recipe)
        self._divided = self._divide()
        self._data: Sequence[Batch] = job.batches if self._divided is None else self._divided.training
        if job.generated:
            self._data = ()

    def run(self) -> tuple[tuple[Decision, ...], dict[str, SiteOutcome]]:
        job = self._job
        self._permute()
        checkpoint = self._checkpoint()
        self._allocate(checkpoint)
        lesson = self._prepare_lesson()
        held = lesson.size_bytes() if lesson is not None else 0
        if self._divided is not None and self._recipe.rounds > 1:
            outcomes, starved = self._prune_in_rounds(self._divided, checkpoint, held)
        else:
            outcomes, starved = self._prune_once(checkpoint, held)
        for name in starved:
            job.notes.append(f"{name}: no token of the calibration data reached it; it stays dense")
        if not outcomes:
            raise ModelError("nothing was pruned: no chosen site saw a token of the calibration data; nothing written")
        if self._recipe.reconstruct is not None:
            job.steps += reconstruct_reports(outcomes)
            job.notes.extend(reconstruct_notes(outcomes))
        if lesson is not None:
            outcomes = self._distill(outcomes, lesson, checkpoint)
        if job.generated:
            job.notes.append(
                "no calibration data was given: weights were chosen without statistics, and outputs are compared on "
                "generated inputs, which say little of the model's quality on real data"
            )
        return self._decisions, outcomes

    def _divide(self) -> RoundData | None:
        """Keep batches aside to choose rounds and epochs by, where there are such: nothing before reads them."""
        job = self._job
        if self._recipe.rounds == 1 and self._recipe.distill is None:
            return None
        return divide_batches(job.batches, job.heldout, self._recipe.rounds, job.options.share_batches)

    def _permute(self) -> None:
        """Put channels in order, as the recipe says."""
        job, settings = self._job, self._recipe.permute
        if settings is None:
            return
        with job.stage("permute"):
            permuted = permute_channels(
                self._graph, self._decisions, self._data, job.batches[0], settings.sweeps, job.progress
            )
        self._decisions = permuted.decisions
        job.notes.extend(permuted.notes)

    def _allocate(self, checkpoint: Checkpoint | None) -> None:
        """Give sites sparsities of their own, as the recipe says, or those that a resumed run was given."""
        job, settings = self._job, self._recipe.allocate
        if settings is None:
            return
        saved = checkpoint.read_state("allocate") if checkpoint is not None else None
        with job.stage("allocate"):
            allocation = (
                restored_allocation(self._decisions, saved[1])
                if saved is not None
                else allocate_sites(self._graph, self._data, self._decisions, settings, job.heldout, job.progress)
            )
        if checkpoint is not None and saved is None:
            checkpoint.write_state("allocate", {}, allocation_record(allocation))
        self._decisions = allocation.decisions
        job.notes.extend(allocation.notes)

    def _prepare_lesson(self) -> Lesson | None:
        """Remember what the dense model does, where [distill] will want it."""
        if self._recipe.distill is None or self._divided is None:
            return None
        with self._job.stage("distill"):
            moving = self._normalisation is not None
            return prepare_lesson(self._graph, self._decisions, self._divided, moving, self._job.progress)

    def _prune_once(self, checkpoint: Checkpoint | None, held: int) -> tuple[dict[str, SiteOutcome], Sequence[str]]:
        job = self._job
        walk = Walk(self._graph, self._data, self._decisions, checkpoint, job.progress, refine=self._refine())
        with job.stage("prune"):
            self._say_memory(walk, held)
            loss = self._own_loss()
            expansions = loss.expand(self._data, {}) if loss.expand is not None else None
            outcomes = prune_layerwise(walk, expansions)
        job.notes.extend(walk.notes)
        return outcomes, walk.starved

    def _prune_in_rounds(
        self, data: RoundData, checkpoint: Checkpoint | None, held: int
    ) -> tuple[dict[str, SiteOutcome], Sequence[str]]:
        """Prune as often as the recipe says; return the best round's outcomes, and the sites that no token reached."""
        job, graph, decisions, refine = self._job, self._graph, self._decisions, self._refine()
        with job.stage("prune"):
            largest = max(data.sets, key=len)
            self._say_memory(Walk(graph, largest, decisions, dense_targets=True, refine=refine), held)
            name, measure_round = heldout_loss(graph, data.heldout, job.progress, self._after_round)
            loss = self._own_loss()
            rounds = prune_in_rounds(
                graph,
                data.sets,
                decisions,
                self._recipe.rounds,
                measure_round,
                checkpoint,
                job.progress,
                refine=refine,
                expand=loss.expand,
                tune=loss.tune,
            )
        copies = 8 * sum(d.site.groups * d.site.out * d.site.in_ for d in decisions if d.rule is not None)
        job.notes.append(f"rounds: {size(copies)} more held the dense weights and the best round's")
        job.rounds = round_reports(rounds, data, name)
        job.notes.extend(round_notes(rounds, data, job.heldout is not None))
        return dict(rounds.sites), rounds.starved

    def _distill(
        self, outcomes: dict[str, SiteOutcome], lesson: Lesson, checkpoint: Checkpoint | None
    ) -> dict[str, SiteOutcome]:
        """Distil what was pruned; return the outcomes with the masks they have then."""
        job, settings = self._job, self._recipe.distill
        assert settings is not None
        with job.stage("distill"):
            settled = self._normalisation.settle() if self._normalisation is not None else forward_of_graph(self._graph)
        if job.watch_pruned is not None:
            job.watch_pruned(settled, outcomes)
        with job.stage("distill"):
            outcomes, done = learn(self._graph, self._decisions, outcomes, lesson, settings, job.progress, checkpoint)
        job.steps += distill_reports(done, lesson)
        job.notes.extend(distill_notes(done, lesson, job.heldout is not None))
        return outcomes

    def _refine(self) -> Refine | None:
        """Return what [reconstruct] does to every segment that was pruned."""
        settings = self._recipe.reconstruct
        if settings is None:
            return None
        return Reconstruction(differentiable(self._graph), settings, self._job.progress)

    def _own_loss(self) -> OwnLoss:
        job = self._job
        found = own_loss(self._graph, self._decisions, self._recipe, job.batches, job.progress)
        job.notes.extend(found.notes)
        return found

    def _handed_out(self) -> Forward:
        """Return the model as it is by now, finished as its user would have it."""
        return self._normalisation.handed_out() if self._normalisation is not None else forward_of_graph(self._graph)

    def _after_round(self) -> Forward:
        """Return the model that a round left, shown to whoever watches."""
        forward = self._handed_out()
        if self._job.watch_round is not None:
            self._job.watch_round(forward)
        return forward

    def _say_memory(self, walk: Walk, held: int) -> None:
        """Say before pruning what the walk will hold beside the model; `held`: what is held for [distill] already."""
        job, estimate = self._job, walk.estimate()
        statistics, boundaries = estimate.statistics_bytes, estimate.boundary_bytes
        last = max((d.site.segment for d in walk.decisions if d.rule is not None), default=0)
        words = f"about {size(statistics + boundaries + held)} of statistics and activations"
        job.progress(f"prune ({words})", 0, last + 1)
        if not statistics + boundaries:  # a method that reads no data
            return
        job.notes.append(
            f"estimated before pruning: {size(statistics)} for the statistics of the largest segment and "
            f"{size(boundaries)} for the values between segments of {len(walk.batches)} batches, beside the model"
        )

    def _checkpoint(self) -> Checkpoint | None:
        """Open the checkpoint of a run that writes files: that of the same model, data, choices and machine."""
        job, divided = self._job, self._divided
        if job.segments is None:
            return None
        batches = chain(job.batches, divided.heldout.batches if divided is not None else ())
        tensors = (tensor for batch in batches for _, tensor in named_tensors(batch))
        names = [(d.site.name, d.site.segment, d.rule and d.rule.sparsity) for d in self._decisions]
        where = environment(job.options.torch_device())  # other libraries or threads may round in another order
        split = divided.split if divided is not None else ()
        options = (job.options.precision, job.options.recalibrate_batchnorm)
        asked = (where, options, format_recipe(job.recipe), names, split)
        labels = (divided.heldout.labels or ()) if divided is not None else ()
        parts = chain(asked, self._graph.contents(), tensors, labels)
        return Checkpoint(job.segments, digest(parts), job.options.resume)
