"""Weigh the sites of a model: what each costs its outputs, by its sparsity, predicted from gradients or measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch
from sparsify_compiler.graph import Graph, Site
from sparsify_compiler.passes.budget import Curve, Share
from sparsify_compiler.passes.error_curves import Growth, Outputs, dense_walk, growth
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.sensitivity import Effects
from sparsify_compiler.plan import Decision
from sparsify_compiler.progress import Progress

MEASURED = 4
"""Calibration batches on which a site's effect on the outputs is measured; each costs half a run a site."""

DIFFERENTIATED = 16
"""Calibration batches through which gradients are taken; each costs about five runs of the model for all sites."""


@dataclass(frozen=True)
class Weighed:
    """The costs of all sites that anything is known of, by name; `words` say what a cost is, `how` it was found."""

    costs: Mapping[str, Curve]
    words: str = ""
    how: str = ""
    notes: tuple[str, ...] = ()


Weigh = Callable[[Graph, Sequence[Batch], Sequence[Decision], Mapping[str, Share], Progress], Weighed]
"""Called as weigh(dense graph, batches, decisions to weigh, their bounds by site name, progress)."""

Predict = Callable[[Sequence[Batch], Mapping[str, tuple[Site, Tensor]], Progress], Effects]
"""Called as predict(batches, changes, progress): see `Sensitivity.effects`."""


def weighed_by_outputs(
    graph: Graph,
    batches: Sequence[Batch],
    decisions: Sequence[Decision],
    shares: Mapping[str, Share],
    progress: Progress,
) -> Weighed:
    """Measure what every site does to the outputs, running the model from the site on: a `Weigh`.

    Raises:
        CalibrationError: as `Outputs` and the walk.
    """
    costs: dict[str, Curve] = {}
    outputs: Outputs | None = None
    for site, problems in dense_walk(graph, batches, decisions, SparseGPT(), progress):
        outputs = outputs or Outputs(graph, batches[:MEASURED])  # the walk has refused batches that do not fit by now
        grown = growth(problems, shares[site.name])
        costs[site.name] = grown.curve(outputs.moved(site, grown.weight))
    if outputs is None:
        return Weighed({})
    return Weighed(costs, "relative error of the outputs", f"{outputs.count} batches")


def weighed_by_gradients(
    predict: Predict,
    graph: Graph,
    batches: Sequence[Batch],
    decisions: Sequence[Decision],
    shares: Mapping[str, Share],
    progress: Progress,
) -> Weighed:
    """Predict what every site does to the outputs, all of them from the same backward passes: a `Weigh` of `predict`.

    The changes of all weights are held on the host meanwhile: 4 bytes a weight. Sites that no gradient reaches are left
    out, which the notes say.

    Raises:
        CalibrationError, SingularGramError: as the walk and SparseGPT; and whatever `predict` raises.
    """
    grown: dict[str, Growth] = {}
    changes: dict[str, tuple[Site, Tensor]] = {}
    for site, problems in dense_walk(graph, batches, decisions, SparseGPT(), progress):
        found = growth(problems, shares[site.name])
        change = found.weight - torch.stack([problem.weight for problem in problems])
        changes[site.name] = site, change.cpu()
        grown[site.name] = replace(found, weight=change.new_empty(0))
    used = batches[:DIFFERENTIATED]
    effects = predict(used, changes, progress)
    costs = {name: each.curve(effects.sizes[name]) for name, each in grown.items() if name in effects.sizes}
    notes = []
    if lost := [name for name in grown if name not in effects.sizes]:
        notes.append(
            f'allocate: no gradient reaches {_names(lost)}, which keep what was asked; weigh = "outputs" can weigh them'
        )
    if effects.by_row:
        notes.append(
            f"allocate: which rows of {_names(effects.by_row)} are of one sample cannot be told, so that what they do "
            'together does not count; weigh = "outputs" counts it'
        )
    return Weighed(costs, effects.words, f"gradients on {len(used)} batches", tuple(notes))


def _names(sites: Sequence[str]) -> str:
    return f"{', '.join(sites[:3])}{' and others' if len(sites) > 3 else ''} ({len(sites)} sites)"
