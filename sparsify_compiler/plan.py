"""Join a recipe with a graph's sites: which rule decides each site, and in words why a site stays dense."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify_compiler.errors import DataError, ModelError, PatternError, RecipeError
from sparsify_compiler.graph import Site
from sparsify_compiler.problem import Needs
from sparsify_compiler.recipe import Recipe, Rule, matches

DATA_STEPS = ("allocate", "finetune", "reconstruct", "distill")
"""The steps that read the calibration data whatever the method does."""

TRAINING_STEPS = ("finetune", "reconstruct", "distill")
"""The steps that take gradients of the graph."""


@dataclass(frozen=True)
class Decision:
    """What happens to a site: pruned by `rule`, or dense for `reason`. `refused`: it could not be pruned at all.

    `asked` is the sparsity that the recipe asked for where the site was given another, which its rule then has; `notes`
    say what else was made of the rule.
    """

    site: Site
    rule: Rule | None
    reason: str = ""
    refused: bool = False
    asked: float | None = None
    notes: tuple[str, ...] = ()


def decide(recipe: Recipe, sites: Sequence[Site]) -> tuple[Decision, ...]:
    """Return one decision per site, in order.

    Raises:
        RecipeError: a rule or keep_dense glob matches no site, a rule names a site that cannot be pruned, or [allocate]
            is asked and no pattern leaves a sparsity free.
        PatternError: a rule names a site that its pattern does not tile.
        ModelError: the model has no prunable site, or the recipe leaves none.
    """
    prunable = [site for site in sites if site.refusal is None]
    if not prunable:
        raise ModelError(_no_site(sites))
    for rule in recipe.rules:
        if not any(rule.matches(site.name) for site in sites):
            raise RecipeError(f"rule {rule.sites!r} matches no site; {_some_names(prunable)}")
    for glob in recipe.keep_dense:
        if not any(matches(glob, site.name) for site in sites):
            raise RecipeError(f"keep_dense {glob!r} matches no site; {_some_names(prunable)}")
    decisions = tuple(_decide(recipe, site) for site in sites)
    if not any(decision.rule for decision in decisions):
        reasons = "; ".join(sorted({f"{d.site.name}: {d.reason}" for d in decisions if not d.refused})[:3])
        raise ModelError(f"no prunable site: the recipe leaves every site dense ({reasons}); name a site in a rule")
    if recipe.allocate is not None:
        _check_movable(decisions)
    return decisions


def _decide(recipe: Recipe, site: Site) -> Decision:
    rule = next((rule for rule in recipe.rules if rule.matches(site.name)), None)
    outright = rule is not None and rule.names(site.name)
    if site.refusal is not None:
        if outright:
            raise RecipeError(f"rule {site.name!r}: this site cannot be pruned: {site.refusal}")
        return Decision(site, None, site.refusal, refused=True)
    for glob in recipe.keep_dense:
        if matches(glob, site.name):
            return Decision(site, None, f"kept dense by keep_dense {glob!r}")
    if rule is None:
        return Decision(site, None, "no rule of the recipe matches")
    if site.dense_by_default is not None and not outright:
        return Decision(site, None, f"{site.dense_by_default}; dense unless a rule names it outright")
    if rule.sparsity == 0:
        return Decision(site, None, "sparsity 0 was asked")
    if misfit := rule.pattern.misfit(site.out, site.in_, site.run):
        if outright:
            raise PatternError(f"layer {site.name!r}: {misfit}")
        return Decision(site, None, misfit)
    if rule.pattern.removed(site.out, site.in_, rule.sparsity, site.run) == 0:
        nothing = f"{rule.pattern} at sparsity {rule.sparsity:g} removes nothing from a ({site.out}, {site.in_}) weight"
        if outright:
            raise PatternError(f"layer {site.name!r}: {nothing}; choose smaller tiles or a higher sparsity")
        return Decision(site, None, nothing)
    return Decision(site, rule)


def _check_movable(decisions: Sequence[Decision]) -> None:
    """Refuse to move sparsities that every pattern fixes. Raises RecipeError."""
    patterns = {decision.rule.pattern for decision in decisions if decision.rule is not None}
    if all(pattern.fixed_sparsity() is not None for pattern in patterns):
        raise RecipeError(
            "[allocate]: sparsities can move where a pattern leaves them free, and every rule has "
            f"{', '.join(sorted(map(str, patterns)))}, which fixes them; leave [allocate] out, or prune some sites to "
            "unstructured or to blocks"
        )


def check_without_data(recipe: Recipe, decisions: Sequence[Decision]) -> None:
    """Refuse a recipe that reads calibration data.

    Raises:
        DataError: a method, swaps, a step or rounds do; the message says which.
    """
    found = None
    rules = [d.rule for d in decisions if d.rule is not None and d.rule.needs is not Needs.NOTHING]
    if rules:
        method = min(f"{rule.method.name!r}{' with swaps' if rule.swaps else ''}" for rule in rules)
        choice = "choose magnitude without swaps" if any(rule.swaps for rule in rules) else "choose magnitude"
        found = f"method {method} needs calibration data and none was given; give data, or {choice}"
    elif asked := [word for word in recipe.steps() if word in DATA_STEPS]:
        found = f"[{asked[0]}] needs calibration data and none was given; give data, or leave it out"
    elif recipe.rounds > 1:
        found = f"{recipe.rounds} rounds need calibration data and none was given; give data, or prune once"
    if found is not None:
        raise DataError(found)


def _no_site(sites: Sequence[Site]) -> str:
    if not sites:
        return "no prunable site: the graph has no linear, matmul, Gemm or convolution with a constant weight"
    reasons = "; ".join(f"{site.name}: {site.refusal}" for site in sites[:3])
    return f"no prunable site: all {len(sites)} are refused ({reasons}{'; ...' if len(sites) > 3 else ''})"


def _some_names(sites: Sequence[Site]) -> str:
    names = [site.name for site in sites]
    return f"the sites are {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
