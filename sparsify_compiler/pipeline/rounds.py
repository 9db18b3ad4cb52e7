"""What choosing needs of a job: batches to prune on and others to choose by, the held-out loss; rounds' report rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.batches import Batch, LazyBatches, RoundBatches
from sparsify_compiler.boundaries import run_graph
from sparsify_compiler.errors import DataError
from sparsify_compiler.evaluate import Forward, fidelity, perplexity, top_k_accuracy
from sparsify_compiler.evaluate_pairs import pair_correlation
from sparsify_compiler.export.report import RoundReport
from sparsify_compiler.graph import Graph
from sparsify_compiler.passes.prune.rounds import Measure, Rounds
from sparsify_compiler.pipeline.quality import Heldout, is_language_model
from sparsify_compiler.progress import Progress

ASIDE = 8
"""Every so many calibration batches, one is kept aside where no held-out data is given."""


@dataclass(frozen=True)
class RoundData:
    """The batches of each round (one set for all of them, or one a round) and what rounds and epochs are compared on.

    `training` are the batches of all sets: whatever reads calibration data before a choice reads these alone. `split`
    names the batches of every set by number. `words` say how the data was divided.
    """

    sets: tuple[Sequence[Batch], ...]
    training: Sequence[Batch]
    heldout: Heldout
    split: tuple[tuple[int, ...], ...]
    words: str


def divide_batches(batches: Sequence[Batch], heldout: Heldout | None, rounds: int, share: bool) -> RoundData:
    """Give every round a part of the calibration batches, taken in turn, or all of them to each.

    `RoundBatches` come divided, and are put together for one round. Without held-out data one batch in eight, at least
    one, is kept aside first; where there is but one batch it is both. Batches are never cut, so fewer batches than
    rounds are shared by all rounds.

    Raises:
        DataError: as many sets as rounds were not given.
    """
    divided = isinstance(batches, RoundBatches) and rounds > 1
    groups = batches.numbers() if isinstance(batches, RoundBatches) and divided else [list(range(len(batches)))]
    if divided and len(groups) != rounds:
        raise DataError(f"calibration: {len(groups)} sets of batches were given for {rounds} rounds; give one a round")
    aside: list[int] = []
    if heldout is None:
        for group in groups:
            aside += group[ASIDE - 1 :: ASIDE] or group[1:][-1:]
    groups = [[number for number in group if number not in set(aside)] for group in groups]
    given = len(groups) > 1
    if not given and not share and len(groups[0]) >= rounds:
        groups = [groups[0][first::rounds] for first in range(rounds)]
    if len(groups) > 1:
        sizes = "/".join(str(len(group)) for group in groups)
        words = f"every round had calibration batches of its own ({sizes}{', as given' if given else ''})"
    else:
        why = "as asked" if share else f"fewer than the {rounds} rounds"
        words = f"all rounds shared the same {len(groups[0])} calibration batches ({why})"
    if heldout is None and aside:
        heldout = Heldout(_chosen(batches, aside), None, f"{len(aside)} calibration batches kept aside")
    elif heldout is None:
        heldout = Heldout(batches, None, "the calibration batches themselves, too few to keep one aside")
    sets = tuple(_chosen(batches, group) for group in groups)
    training = _chosen(batches, sorted(number for group in groups for number in group))
    return RoundData(sets, training, heldout, tuple(tuple(group) for group in groups), words)


def heldout_loss(
    graph: Graph, data: Heldout, progress: Progress, handed_out: Callable[[], Forward] | None = None
) -> tuple[str, Measure]:
    """Name and return the loss that rounds are compared by, lower is better. `graph` is dense when this is called.

    1 - Spearman's correlation for scored pairs of sentences; the share of wrong first answers where there are labels; a
    causal language model's perplexity; else ‖Y − Ŷ‖² / ‖Y‖² between the dense model's outputs and the pruned one's.
    `handed_out` returns the pruned model as its user would have it now; without it the graph runs as it is, BatchNorm
    statistics those of the dense model.
    """
    own = forward_of_graph(graph)
    pruned = handed_out or (lambda: own)
    pairs, labels = data.pairs, data.labels
    if pairs is not None:
        return "1 - Spearman", lambda dense: 1 - pair_correlation(pruned(), data.batches, pairs, progress)
    if labels is not None:
        return "top-1 error", lambda dense: 1 - top_k_accuracy(pruned(), data.batches, labels, (1,), progress)[0]
    if is_language_model(own, data.batches[0]):
        return "perplexity", lambda dense: perplexity(pruned(), data.batches, progress)
    return (
        "relative error",
        lambda dense: fidelity(forward_of_graph(graph, dense), pruned(), data.batches, progress).relative_error,
    )


def forward_of_graph(graph: Graph, weights: Mapping[str, Tensor] | None = None) -> Forward:
    """Return `boundaries.run_graph` of one graph and its weights as a function of batches."""
    return lambda batch: run_graph(graph, batch, weights)


def round_reports(rounds: Rounds, data: RoundData, measure: str) -> tuple[RoundReport, ...]:
    """Return one row a round."""
    return tuple(
        RoundReport(
            number=each.number,
            batches=f"{each.batches} batches"
            + (f", set {each.part} of {each.parts}" if each.parts > 1 else ", shared"),
            error=each.error,
            measure=measure,
            heldout=each.heldout,
            data=data.heldout.description,
            changed=each.changed,
            moved=each.moved,
            differed=each.differed,
            chosen=each.number == rounds.best,
        )
        for each in rounds.rounds
    )


def round_notes(rounds: Rounds, data: RoundData, given: bool) -> tuple[str, ...]:
    """Say what a reader must know of the rounds; `given`: the user's held-out data chose among them."""
    notes = [
        f"rounds: {data.words}; a round can only return something new through what differs from the one before: where "
        "batches and prefix are the same, the layer problems and their answers are too"
    ]
    if given and len(rounds.rounds) > 1:
        notes.append(
            f"rounds: round {rounds.best} was chosen on the held-out data that quality is measured on, which flatters "
            "that figure a little; measure on other data to be sure"
        )
    return (*notes, *rounds.notes)


def _chosen(batches: Sequence[Batch], numbers: Sequence[int]) -> Sequence[Batch]:
    """Return some of the batches, each read when it is asked for."""
    return LazyBatches(len(numbers), lambda position: batches[numbers[position]])
