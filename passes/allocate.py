"""Give every site a sparsity of its own, before anything is pruned; the model loses as many weights as it would have.

Given:   %y = linear(%x, weight=%w)      # every site by its rule, sparsity 0.5
Result:  %y = linear(%x, weight=%w)      # unchanged; the decisions now say 0.43 here and 0.56 there

Two ways, both on the dense model. "owl" (Yin et al. 2024, "Outlier Weighed Layerwise Sparsity") spares segments with
many outlying weights. "error-curve" asks the model: what a site's layer error does to the outputs, times how that
error grows with sparsity, is what the site costs, and the costs are made least for the same number of weights. The
effect on the outputs is predicted from gradients, or measured site by site.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby

import torch

from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import Graph, Site
from sparsify_compiler.passes.budget import Share, fill, round_to_units
from sparsify_compiler.passes.error_curves import dense_walk
from sparsify_compiler.passes.prune.iobs_layer import IOBS, SOLVERS
from sparsify_compiler.passes.prune.quadratic import tile_of
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.passes.weigh import Weigh, Weighed
from sparsify_compiler.pattern import Block, Pattern
from sparsify_compiler.plan import Decision
from sparsify_compiler.problem import LayerProblem, Pruner
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.recipe import Rule
from sparsify_compiler.steps import Allocate

OUTLIER = 5.0
"""A weight is an outlier where |w| · ‖x‖ is so many times its segment's mean: M of the paper, its value for Llama."""


@dataclass(frozen=True)
class Allocation:
    """The decisions, each movable site's rule with its own sparsity; `notes` say in words what was done."""

    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]


def allocate(
    graph: Graph,
    batches: Sequence[Batch],
    decisions: Sequence[Decision],
    step: Allocate,
    weigh: Weigh,
    progress: Progress = silent,
) -> Allocation:
    """Return `decisions` with sparsities by `step.by`; the graph, dense, is as it was.

    `weigh` gives the costs of an error-curve; "owl" needs none. One pattern at least leaves its sparsity free, as
    `decide` has checked.

    The weights removed are in sum exactly those that the rules asked for; methods that remove the same from every row
    move by whole columns of entries, so that a few more may stay, which the notes say. Each movable site stays within
    `step.spread` of its rule's sparsity. Sites of fixed patterns, and sites that no token or no gradient reaches, keep
    what their rule asks for.

    Raises:
        CalibrationError: no batches, none that reaches a site, statistics that are not finite, or outputs that hold
            nothing to measure.
        SingularGramError: as SparseGPT, which gives the curves.
    """
    if not batches:
        raise CalibrationError("[allocate]: it reads what the data does in the model, and no batch was given")
    chosen = [(d, d.rule) for d in decisions if d.rule is not None]
    movable = [(d, rule) for d, rule in chosen if rule.pattern.fixed_sparsity() is None]
    free = [decision for decision, _ in movable]
    shares = {d.site.name: _share(d.site, rule, step.spread) for d, rule in movable}
    if step.by == "owl":
        removed, notes = _by_outliers(dense_walk(graph, batches, free, Wanda(), progress), shares, step.spread)
    else:
        removed, notes = _by_curves(weigh(graph, batches, free, shares, progress), shares)
    if not removed:
        raise CalibrationError(
            "[allocate]: no token of the calibration data reached a site whose sparsity can move, or none of these "
            'sites has a gradient (weigh = "outputs" needs none)'
        )
    allocated = tuple(
        _with_sparsity(d, shares[d.site.name], removed[d.site.name]) if d.site.name in removed else d for d in decisions
    )
    notes = [_summary(step, shares, removed), *notes]
    if fixed := len(chosen) - len(free):
        notes.append(f"allocate: {fixed} sites of fixed patterns were left out")
    return Allocation(allocated, tuple(notes))


def _share(site: Site, rule: Rule, spread: float) -> Share:
    """Return the site's bounds, in tiles; where the method removes the same from every row, in tiles of all rows."""
    rows, cols = tile_of(rule.pattern)
    row_wise = _row_wise(rule.method, rule.pattern)
    unit = site.groups * cols * (site.out if row_wise else rows)
    entries = site.groups * site.out * site.in_
    asked = site.groups * rule.pattern.removed(
        site.out, site.in_, rule.sparsity, site.run, scope="row" if row_wise else "layer"
    )
    low = -int((spread - rule.sparsity) * entries // unit) * unit  # towards the asked one, as the upper bound
    high = int((rule.sparsity + spread) * entries // unit) * unit
    return Share(entries, unit, asked, min(max(low, 0), asked), max(min(high, entries - unit), asked))


def _row_wise(method: Pruner, pattern: Pattern) -> bool:
    """Say whether `method`, or what it holds as its solver, removes the same from every row."""
    if isinstance(method, IOBS | WoodTaylor):
        return _row_wise(SOLVERS[method.solver](method.damp), pattern)
    if isinstance(method, Wanda):
        return not isinstance(pattern, Block)
    return getattr(method, "scope", "layer") == "row"


def _with_sparsity(decision: Decision, share: Share, removed: int) -> Decision:
    assert decision.rule is not None
    asked = decision.rule.sparsity
    if not removed:
        return Decision(decision.site, None, f"the allocation leaves it dense; sparsity {asked:g} was asked")
    return replace(decision, rule=replace(decision.rule, sparsity=share.sparsity(removed)), asked=asked)


def _summary(step: Allocate, shares: Mapping[str, Share], removed: Mapping[str, int]) -> str:
    given = {name: shares[name].sparsity(count) for name, count in removed.items()}
    least, most = min(given, key=lambda name: given[name]), max(given, key=lambda name: given[name])
    entries, total = sum(shares[name].entries for name in removed), sum(removed.values())
    missing = sum(shares[name].asked for name in removed) - total
    words = (
        f"allocate: by {step.by}, {len(removed)} sites within {step.spread:g} of what was asked, "
        f"{total} of {entries} weights removed ({total / entries:.4f}), as many as without"
    )
    if missing:
        words += f" less {missing}, because methods that prune row by row take the same from every row"
    return f"{words}; least {given[least]:.4f} ({least}), most {given[most]:.4f} ({most})"


def _by_outliers(
    walk: Iterable[tuple[Site, list[LayerProblem]]], shares: Mapping[str, Share], spread: float
) -> tuple[dict[str, int], list[str]]:
    """Return the weights each site loses: s + t (D̄ − D) / max |D̄ − D|, with D its segment's share of outliers.

    t is `spread`, or less where a site would leave its bounds. Departures: in the paper the whole range of D spans 2λ
    and D̄ is a mean over layers; here no segment moves further than λ and D̄ is a mean over weights, so that the total
    is exact with layers of several sizes.
    """
    outliers: dict[str, Fraction] = {}
    for _, members in groupby(walk, key=lambda member: member[0].segment):
        found = list(members)
        share = Fraction(outlier_share([problem for _, problems in found for problem in problems]))
        outliers.update({site.name: share for site, _ in found})
    if not outliers:
        return {}, []
    entries = sum(shares[name].entries for name in outliers)
    mean = sum((shares[name].entries * share for name, share in outliers.items()), Fraction()) / entries
    furthest = max(abs(mean - share) for share in outliers.values())
    if not furthest:
        return {name: shares[name].asked for name in outliers}, [
            "allocate: every segment has the same share of outliers: nothing moved"
        ]
    moves = {name: (mean - share) / furthest * shares[name].entries for name, share in outliers.items()}
    rooms = {name: shares[name].high if move > 0 else shares[name].low for name, move in moves.items()}
    reach = min(Fraction(spread), *(abs((rooms[n] - shares[n].asked) / move) for n, move in moves.items() if move))
    wanted = [shares[name].asked + reach * move for name, move in moves.items()]
    removed = dict(zip(moves, round_to_units([shares[name] for name in moves], wanted), strict=True))
    low, high = float(min(outliers.values())), float(max(outliers.values()))
    return removed, [
        f"allocate: from {low:.3%} to {high:.3%} of a segment's weights lie above {OUTLIER:g} times the mean of "
        f"|w| times the input's size; the furthest segment moved by {float(reach):.4f}"
    ]


def outlier_share(problems: Sequence[LayerProblem]) -> float:
    """Return the share of the problems' weights with |w| √mean x² above `OUTLIER` times the mean over all of them."""
    scores = []
    for problem in problems:
        assert problem.mean_square is not None, "the walk gathers it"
        scores.append((problem.weight.abs() * problem.mean_square.sqrt().to(problem.weight)).flatten())
    count = sum(len(score) for score in scores)
    bar = OUTLIER * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > bar).sum()) for score in scores) / count


def _by_curves(weighed: Weighed, shares: Mapping[str, Share]) -> tuple[dict[str, int], list[str]]:
    """Return the weights each site loses so that the sum of the sites' costs is least."""
    costs = weighed.costs
    if not costs:
        return {}, []
    counts = fill([shares[name] for name in costs], list(costs.values()))
    removed = dict(zip(costs, counts, strict=True))
    sums = [
        sum(cost(shares[name].sparsity(chosen[name])) for name, cost in costs.items())
        for chosen in (removed, {name: shares[name].asked for name in costs})
    ]
    return removed, [
        f"allocate: the {weighed.words}, summed over sites pruned one at a time, is {sums[0]:.4g} as allocated and "
        f"{sums[1]:.4g} as asked (predicted from SparseGPT's layer errors and {weighed.how})",
        *weighed.notes,
    ]
