"""Prune one model in many ways, on several draws of calibration data, and measure each: the rows of a method table.

Nothing is lowered, exported or timed on kernels. A row is what `compile` would hand out, measured on every held-out
set; where the model has BatchNorm, with its statistics re-estimated and without.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from torch import nn
from torch.export import ExportedProgram

from sparsify_compiler.batches import Batch, named_tensors
from sparsify_compiler.checkpoint import digest
from sparsify_compiler.errors import DataError
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.export.method_table import MethodTable, RoundPoint, TableRow
from sparsify_compiler.export.report import Quality
from sparsify_compiler.frontends.torch import trace_module, trace_program
from sparsify_compiler.passes.batchnorm import batchnorm_layers
from sparsify_compiler.passes.prune.layerwise import SiteOutcome
from sparsify_compiler.pipeline.environment import command, environment
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.method_table_log import ROWS, RowLog
from sparsify_compiler.pipeline.method_trials import Trial
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.pipeline.own_loss import check_trainable
from sparsify_compiler.pipeline.peak_memory import Peak, peak_memory
from sparsify_compiler.pipeline.quality import Heldout, is_language_model, measure
from sparsify_compiler.pipeline.torch_prune import finish_torch, module_forward, prune_torch
from sparsify_compiler.plan import decide
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.recipe import format_recipe

DENSE = "dense"
"""The key of the first row, and its method's word."""

BEFORE = ", before distilling"
"""What is added to the key of a row, and to its method, for the model that its last step was given."""


@dataclass(frozen=True)
class Draw:
    """One draw of calibration data, and what it is in words."""

    batches: Sequence[Batch]
    description: str


@dataclass(frozen=True)
class Subject:
    """What is pruned: the model, which stays as it is, under its name, and the sets it is measured on, by name."""

    name: str
    model: nn.Module | ExportedProgram
    heldout: Mapping[str, Heldout]


def run_method_table(
    subject: Subject,
    trials: Sequence[Trial],
    draws: Sequence[Draw],
    options: Options,
    log: RowLog,
    progress: Progress = silent,
) -> MethodTable:
    """Measure the dense model, then every trial on every draw; rows that `log` has already are not made again.

    Raises:
        SparsifyError: anything the user can act on. A trial that does not fit the model is refused before any work.
    """
    _check(subject, trials, draws, options)
    runner = _Runner(subject, options, log, progress, 1 + len(trials) * len(draws))
    for number, draw in enumerate(draws):
        runner.add_draw(number, draw, trials)
    return MethodTable(
        model=subject.name,
        command=command("method_table"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(options.torch_device()),
        calibration=tuple(draw.description for draw in draws),
        heldout={name: data.description for name, data in subject.heldout.items()},
        dense=runner.dense.quality,
        rows=tuple(row for trial in trials for draw in range(len(draws)) for row in runner.rows[trial.words, draw]),
        notes=runner.notes(),
    )


class _Runner:
    """Makes rows one after the other."""

    def __init__(self, subject: Subject, options: Options, log: RowLog, progress: Progress, count: int) -> None:
        self._subject = subject
        self._model = subject.model
        self._options = options
        self._log = log
        self._progress = progress
        self._count = count
        self._done = 0
        module = self._model if isinstance(self._model, nn.Module) else self._model.module()
        self._forward = module_forward(module, options.precision)
        self._batchnorm = isinstance(self._model, nn.Module) and bool(batchnorm_layers(self._model))
        self._sets = [replace(data, description=name) for name, data in subject.heldout.items()]
        self._beside = [None if _stands_alone(self._forward, data) else self._forward for data in self._sets]
        log.open(digest(self._identity()))
        self.rows: dict[tuple[str, int], list[TableRow]] = {}
        self.dense = self._log.row(DENSE, self._dense_row)
        self._step()

    def add_draw(self, number: int, draw: Draw, trials: Sequence[Trial]) -> None:
        """Make the rows of one draw."""
        data = digest(tensor for batch in draw.batches for _, tensor in named_tensors(batch))
        for trial in trials:
            key = digest((trial.words, number, format_recipe(trial.recipe), self._options.share_batches, data))
            self._progress(f"rows: {trial.words}, draw {number}", self._done, self._count)
            row = self._log.row(key, partial(self._row, number, draw, trial, key))
            before = self._log.find(key + BEFORE)
            self.rows[trial.words, number] = [before, row] if before is not None else [row]
            self._step()

    def notes(self) -> tuple[str, ...]:
        """Say what holds of the table as a whole."""
        found = []
        if self._batchnorm:
            found.append("BatchNorm statistics were re-estimated on each row's own calibration data; without: as given")
        if self._options.precision != "float32":
            found.append(f"products of every model ran in {self._options.precision}, also while it was measured")
        if any(row.rounds for rows in self.rows.values() for row in rows):
            found.append("rounds: the one kept was chosen on calibration data, never on the held-out sets")
        if others := self._log.unasked():
            found.append(f"{others} more finished rows, which this command did not ask for, stay in {ROWS}")
        return tuple(found)

    def _step(self) -> None:
        self._done += 1
        self._progress("rows", self._done, self._count)

    def _dense_row(self) -> TableRow:
        with peak_memory(self._options.torch_device()) as peak:
            quality = self._measure(self._forward, DENSE)
        return TableRow(DENSE, "", False, 0, 0.0, 0, None, 0.0, peak.bytes, quality)

    def _row(self, number: int, draw: Draw, trial: Trial, key: str) -> TableRow:
        label = f"{trial.words}, draw {number}"
        points: list[tuple[Quality, ...]] = []
        watched = 0.0

        def watch(forward: Forward) -> None:
            nonlocal watched
            start = time.perf_counter()
            points.append(self._measure(forward, label))
            watched += time.perf_counter() - start

        def before(forward: Forward, outcomes: Mapping[str, SiteOutcome]) -> None:
            nonlocal watched
            since = time.perf_counter()
            made = partial(self._before, trial, number, forward, outcomes, since - start - watched, peak)
            self._log.row(key + BEFORE, made)
            watched += time.perf_counter() - since

        job = Job(self._subject.name, trial.recipe, self._options, draw.batches, False, None, self._inner(label), None)
        job.watch_round, job.watch_pruned, job.segments = watch, before, self._log.segments(key)
        if self._options.resume and job.segments is not None and job.segments.exists():
            job.notes.append("gone on with after an interruption: its seconds count from then")
        start = time.perf_counter()
        with peak_memory(self._options.torch_device()) as peak:
            pruned = prune_torch(job, self._model)
        seconds = time.perf_counter() - start - watched
        forward = module_forward(pruned.module, self._options.precision)
        around = trial.recipe.distill is not None  # weights that were trained around moved statistics
        without = self._measure(forward, label) if self._batchnorm and not around else ()
        finish_torch(job, pruned)
        chosen = {each.number for each in job.rounds if each.chosen}
        return TableRow(
            method=trial.method,
            pattern=trial.pattern,
            refit=trial.refit,
            draw=number,
            sparsity=_sparsity(pruned.outcomes),
            sites=len(pruned.outcomes),
            error=_error(pruned.outcomes),
            seconds=round(seconds, 3),
            peak_memory_bytes=peak.bytes,
            quality=self._measure(forward, label),
            without=without,
            rounds=tuple(RoundPoint(t, quality, t in chosen) for t, quality in enumerate(points, 1)),
            notes=tuple(dict.fromkeys((*job.notes, *_site_notes(pruned.outcomes)))),
        )

    def _before(
        self,
        trial: Trial,
        number: int,
        forward: Forward,
        outcomes: Mapping[str, SiteOutcome],
        seconds: float,
        peak: Peak,
    ) -> TableRow:
        """Measure what a row was before [distill], as a row of its own."""
        return TableRow(
            method=trial.method + BEFORE,
            pattern=trial.pattern,
            refit=trial.refit,
            draw=number,
            sparsity=_sparsity(outcomes),
            sites=len(outcomes),
            error=_error(outcomes),
            seconds=round(seconds, 3),
            peak_memory_bytes=peak.now(),
            quality=self._measure(forward, f"{trial.words}, draw {number}"),
        )

    def _measure(self, forward: Forward, label: str) -> tuple[Quality, ...]:
        pairs = zip(self._sets, self._beside, strict=True)
        inner = self._inner(label)
        return tuple(quality for data, dense in pairs for quality in measure(dense, forward, data, inner))

    def _inner(self, label: str) -> Progress:
        """Say in the bar of the rows which stage of a row is running."""
        return lambda stage, done, total: self._progress(
            f"rows: {label}: {stage} {done}/{total}", self._done, self._count
        )

    def _identity(self) -> Iterator[object]:
        """Yield what rows of one table have in common: model, held-out data, machine and versions."""
        yield environment(self._options.torch_device())
        yield self._options.precision
        module = self._model if isinstance(self._model, nn.Module) else self._model.module()
        for name, tensor in module.state_dict().items():
            yield name
            yield tensor
        for data in self._sets:
            yield data.description
            yield from (tensor for batch in data.batches for _, tensor in named_tensors(batch))
            yield from data.labels or ()
            yield from (data.pairs.scores, data.pairs.rows) if data.pairs is not None else ()


def _check(subject: Subject, trials: Sequence[Trial], draws: Sequence[Draw], options: Options) -> None:
    """Refuse what could not end well before any work is done."""
    if not trials or not draws or not subject.heldout:
        raise DataError("a method table needs at least one way to prune, one draw of data and one held-out set")
    double = [trial.words for place, trial in enumerate(trials) if trial.words in {t.words for t in trials[:place]}]
    if double:
        raise DataError(f"{double[0]}: asked twice; give every method, pattern and recipe once")
    graph = (
        trace_module(subject.model, draws[0].batches[0], options.torch_device())
        if isinstance(subject.model, nn.Module)
        else trace_program(subject.model, options.torch_device())
    )
    for trial in trials:
        check_trainable(graph, decide(trial.recipe, graph.sites), trial.recipe)


def _stands_alone(forward: Forward, data: Heldout) -> bool:
    """Say whether the data measures a model by itself, not only beside the dense one."""
    return data.labels is not None or data.pairs is not None or is_language_model(forward, data.batches[0])


def _sparsity(outcomes: Mapping[str, SiteOutcome]) -> float:
    entries = sum(outcome.keep.numel() for outcome in outcomes.values())
    return 1 - sum(int(outcome.keep.sum()) for outcome in outcomes.values()) / max(entries, 1)


def _error(outcomes: Mapping[str, SiteOutcome]) -> float | None:
    """Sum the relative errors of the sites; None where one has none."""
    values = [outcome.relative_error for outcome in outcomes.values()]
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _site_notes(outcomes: Mapping[str, SiteOutcome]) -> Iterator[str]:
    for name, outcome in outcomes.items():
        yield from (f"{name}: {note}" for note in outcome.notes)
