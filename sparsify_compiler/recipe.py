"""What to prune and how, as frozen dataclasses and as strict TOML that round-trips.

    [[rule]]
    sites = "model.layers.*.mlp.*"   # glob over site names; * also crosses dots
    pattern = "2:4"
    method = "sparsegpt"
    options = { damp = 0.01 }

A line `rounds = 3` above the rules prunes the network three times and keeps the round that is best on held-out data.
Tables such as [distill] add the steps of `steps`, with their settings. The first rule that matches a site decides. A
rule whose `sites` is the name of a site names it outright, and then also prunes a site that is dense by default (an
output head). A name that holds wildcards of its own, such as blocks[0], is first read letter by letter.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

from sparsify_compiler.errors import PatternError, RecipeError
from sparsify_compiler.pattern import Pattern, parse_pattern
from sparsify_compiler.problem import Needs, OwnStep, Pruner
from sparsify_compiler.steps import Allocate, Distill, FineTune, Permute, Reconstruct, Step


@dataclass(frozen=True)
class Rule:
    """Prune the sites whose name matches the glob `sites` to `pattern` with `method`.

    `sparsity` in [0, 1) is the share removed; an N:M pattern implies it. `refit` re-solves the kept weights to
    optimality on the final mask wherever a Gram matrix is at hand; None, which a recipe settles by its rounds, is yes
    but for a method whose step that would undo (`OwnStep`: woodtaylor, and iobs in more than one round). `swaps` is how
    many rounds of 1-swap search improve the method's mask before that (0: none); it reads the Gram matrix, and always
    re-solves.
    """

    sites: str
    pattern: Pattern
    method: Pruner
    sparsity: float
    refit: bool | None = None
    swaps: int = 0

    def __post_init__(self) -> None:
        _check_kinds(self.sites, self.pattern, self.method)
        if self.swaps < 0:
            raise RecipeError(f"rule {self.sites!r}: swaps {self.swaps} must be at least 0, rounds of the mask search")
        if not 0 <= self.sparsity < 1:
            raise RecipeError(f"rule {self.sites!r}: sparsity {self.sparsity} must lie in [0, 1), the share removed")
        fixed = self.pattern.fixed_sparsity()
        if fixed is not None and abs(fixed - self.sparsity) > 1e-9:
            raise RecipeError(
                f"rule {self.sites!r}: pattern {self.pattern} removes {fixed:g} of the weights, sparsity "
                f"{self.sparsity:g} was asked; leave the sparsity out or choose another pattern"
            )

    @property
    def needs(self) -> Needs:
        """The statistics without which the rule cannot be followed: the method's, and the Gram matrix for swaps."""
        needs = self.method.needs
        return Needs.GRAM if self.swaps and needs in (Needs.NOTHING, Needs.NORMS) else needs

    @property
    def refits(self) -> bool:
        """Whether kept weights are re-solved; as in one round where no recipe has settled it."""
        return refits_by_default(self.method, 1) if self.refit is None else self.refit

    def matches(self, site: str) -> bool:
        """Say whether the rule speaks of the site named `site`."""
        return matches(self.sites, site)

    def names(self, site: str) -> bool:
        """Say whether the rule names `site` outright: letter by letter, not by a wildcard."""
        return self.sites == site


@dataclass(frozen=True)
class Recipe:
    """Rules in order of precedence, and globs of sites that stay dense whatever the rules say.

    The whole network is pruned `rounds` times (at least 1) and the best round on held-out data stays; see
    `passes.prune.rounds`. The steps are None where they are not taken; `finetune` stands between rounds.
    """

    rules: tuple[Rule, ...]
    keep_dense: tuple[str, ...] = ()
    rounds: int = 1
    allocate: Allocate | None = None
    permute: Permute | None = None
    finetune: FineTune | None = None
    reconstruct: Reconstruct | None = None
    distill: Distill | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise RecipeError(f"the recipe: rounds is {self.rounds}, the number of times to prune: at least 1")
        if not self.rules:
            raise RecipeError("the recipe has no rule; add a [[rule]] with sites, pattern and method")
        for word, kind in STEPS.items():
            step = getattr(self, word)
            if step is not None and not isinstance(step, kind):
                raise RecipeError(f"the recipe: {word} must be an object, such as {kind.__name__}(); found {step!r}")
        if self.finetune is not None and self.rounds < 2:
            raise RecipeError("the recipe: finetune stands between rounds, and there is one; add rounds = 3, say")
        settled = tuple(
            replace(rule, refit=refits_by_default(rule.method, self.rounds)) if rule.refit is None else rule
            for rule in self.rules
        )
        object.__setattr__(self, "rules", settled)  # frozen for everyone else

    def steps(self) -> dict[str, Step]:
        """Return the steps that are taken, by the names of their tables."""
        return {word: step for word in STEPS if (step := getattr(self, word)) is not None}


STEPS: dict[str, type[Step]] = {
    "allocate": Allocate,
    "permute": Permute,
    "finetune": FineTune,
    "reconstruct": Reconstruct,
    "distill": Distill,
}
"""The tables of steps that a recipe file may hold."""


def matches(glob: str, site: str) -> bool:
    """Say whether `glob` is the name of a site, brackets and all, or matches it as a pattern."""
    return glob == site or fnmatchcase(site, glob)


def refits_by_default(method: Pruner, rounds: int) -> bool:
    """Say whether the kept weights are re-solved in a recipe of `rounds` rounds whose rule does not say."""
    return not (isinstance(method, OwnStep) and method.undone_by_refit(rounds))


def _check_kinds(sites: str, pattern: object, method: object) -> None:
    """Refuse the words of a recipe file where Python takes objects. Raises RecipeError."""
    if not isinstance(pattern, Pattern):
        raise RecipeError(f'rule {sites!r}: pattern must be a Pattern: parse_pattern("2:4"); found {pattern!r}')
    if isinstance(method, type) or not hasattr(method, "needs"):
        found = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise RecipeError(f"rule {sites!r}: method must be an object, such as SparseGPT(); found {found}")


def make_rule(
    sites: str,
    pattern: Pattern,
    method: Pruner,
    sparsity: float | None = None,
    refit: bool | None = None,
    swaps: int = 0,
) -> Rule:
    """Build a rule, the sparsity taken from the pattern where the pattern implies one.

    Raises:
        RecipeError: the pattern implies no sparsity and none was given, the two disagree, or a word stands where an
            object should.
    """
    _check_kinds(sites, pattern, method)
    if sparsity is None:
        sparsity = pattern.fixed_sparsity()
    if sparsity is None:
        raise RecipeError(f"rule {sites!r}: pattern {pattern} needs a sparsity, the share removed, such as 0.5")
    return Rule(sites=sites, pattern=pattern, method=method, sparsity=sparsity, refit=refit, swaps=swaps)


def parse_recipe(text: str, methods: Mapping[str, type[Any]]) -> Recipe:
    """Read a recipe from TOML; `methods` maps the words allowed in `method` to their dataclasses.

    Raises:
        RecipeError: not TOML, an unknown key, method or option, or an impossible value; the message names it.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe is not TOML: {error}") from None
    _known(table, {"rule", "keep_dense", "rounds", *STEPS}, "the recipe")
    rules = table.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise RecipeError("the recipe: write each rule as a table [[rule]]")
    keep_dense = table.get("keep_dense", [])
    if not isinstance(keep_dense, list) or not all(isinstance(glob, str) for glob in keep_dense):
        raise RecipeError(f"the recipe: keep_dense must be a list of globs, found {keep_dense!r}")
    rounds = table.get("rounds", 1)
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise RecipeError(f"the recipe: rounds must be a whole number, found {rounds!r}")
    parsed = tuple(_parse_rule(rule, number, methods) for number, rule in enumerate(rules, 1))
    steps = {word: _parse_step(word, table[word]) for word in STEPS if word in table}
    return Recipe(parsed, tuple(keep_dense), rounds, **cast(dict[str, Any], steps))


def format_recipe(recipe: Recipe) -> str:
    """Write a recipe as TOML; `parse_recipe` is the inverse."""
    lines = [f"keep_dense = {_toml(list(recipe.keep_dense))}"] if recipe.keep_dense else []
    if recipe.rounds != 1:
        lines.append(f"rounds = {recipe.rounds}")
    for word, step in recipe.steps().items():
        body = ", ".join(f"{key} = {_toml(value)}" for key, value in dataclasses.asdict(step).items())
        lines.append(f"{word} = {{ {body} }}")
    for rule in recipe.rules:
        lines += ["", "[[rule]]", f"sites = {_toml(rule.sites)}", f"pattern = {_toml(str(rule.pattern))}"]
        if rule.pattern.fixed_sparsity() is None:
            lines.append(f"sparsity = {rule.sparsity!r}")
        lines.append(f"method = {_toml(rule.method.name)}")
        if not rule.refit or not refits_by_default(rule.method, recipe.rounds):
            lines.append(f"refit = {_toml(rule.refit)}")
        if rule.swaps:
            lines.append(f"swaps = {rule.swaps}")
        if options := method_options(rule.method):
            body = ", ".join(f"{key} = {_toml(value)}" for key, value in options.items())
            lines.append(f"options = {{ {body} }}")
    return "\n".join(lines).strip() + "\n"


def method_options(method: Pruner) -> dict[str, Any]:
    """Return the hyper-parameters of `method` as plain values."""
    return dataclasses.asdict(method)  # type: ignore[call-overload, no-any-return]  # every Pruner is a dataclass


def _toml(value: Any) -> str:
    # JSON strings, numbers and lists are TOML's too, but for surrogate pairs and the one control character JSON allows.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _parse_rule(table: dict[str, Any], number: int, methods: Mapping[str, type[Any]]) -> Rule:
    where = f"rule {number}"
    own = methods.get(str(table.get("method")))
    settings = {field.name for field in dataclasses.fields(own)} if own is not None else set()
    if misplaced := sorted(set(table) & settings):
        raise RecipeError(
            f"{where}: {misplaced[0]!r} is a setting of {table['method']}; write options = {{ {misplaced[0]} = ... }}"
        )
    _known(table, {"sites", "pattern", "sparsity", "method", "refit", "swaps", "options"}, where)
    sites = _typed(table, "sites", str, where, default="*")
    method_name = _typed(table, "method", str, where)
    if method_name not in methods:
        raise RecipeError(f"{where}: unknown method {method_name!r}; known: {', '.join(sorted(methods))}")
    options = _typed(table, "options", dict, where, default={})
    _known(options, settings, f"{where}, options")
    sparsity = table.get("sparsity")
    if sparsity is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, int | float)):
        raise RecipeError(f"{where}: sparsity must be a number in [0, 1), found {sparsity!r}")
    try:
        pattern = parse_pattern(_typed(table, "pattern", str, where))
        method = methods[method_name](**options)
        refit = _typed(table, "refit", bool, where) if "refit" in table else None
        swaps = _typed(table, "swaps", int, where, default=0)
        return make_rule(sites, pattern, method, sparsity, refit, swaps)
    except PatternError as error:
        raise RecipeError(f"{where}: {error}") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: method {method_name!r} refuses its options {options}: {error}") from None


def _parse_step(word: str, table: object) -> Step:
    kind = STEPS[word]
    if not isinstance(table, dict):
        raise RecipeError(f"the recipe: write {word} as a table [{word}], found {table!r}")
    _known(table, {field.name for field in dataclasses.fields(kind)}, f"[{word}]")
    for field in dataclasses.fields(kind):
        given, default = table.get(field.name, field.default), field.default
        whole = isinstance(default, bool) or not isinstance(default, float)
        fits = type(given) is type(default) if whole else type(given) in (int, float)
        if not fits:
            raise RecipeError(f"[{word}]: {field.name} must be like {default!r}, found {given!r}")
    try:
        return kind(**table)
    except ValueError as error:
        raise RecipeError(f"[{word}]: {error}") from None


def _known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(table) - known):
        raise RecipeError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _typed(table: Mapping[str, Any], key: str, kind: type[Any], where: str, default: Any = None) -> Any:
    value = table.get(key, default)
    if value is None:
        raise RecipeError(f"{where}: {key} is missing")
    if not isinstance(value, kind):
        raise RecipeError(f"{where}: {key} must be {'an' if kind is int else 'a'} {kind.__name__}, found {value!r}")
    return value
