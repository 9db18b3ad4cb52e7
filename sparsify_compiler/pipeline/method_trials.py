"""The ways of pruning that a method table sets side by side: methods by patterns, with and without the re-solve."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify_compiler.errors import PatternError, RecipeError
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.pattern import Pattern, Unstructured, parse_pattern
from sparsify_compiler.recipe import Recipe, make_rule


@dataclass(frozen=True)
class Trial:
    """One way of pruning; `method` and `pattern` are its words in the table."""

    method: str
    pattern: str
    refit: bool
    recipe: Recipe

    @property
    def words(self) -> str:
        """Name the trial in one phrase."""
        return " ".join(filter(None, (self.method, self.pattern, "" if self.refit else "no re-solve")))


def method_trials(
    methods: Sequence[str],
    patterns: Sequence[str],
    refits: Sequence[bool] = (False, True),
    sites: Sequence[str] = ("*",),
    keep_dense: Sequence[str] = (),
    rounds: int = 1,
) -> tuple[Trial, ...]:
    """Return every method by every pattern, without and with the re-solve, one rule for each glob of `sites`.

    A pattern is a number in (0, 1), unstructured; an N:M such as "2:4"; or a pattern and its sparsity, "64x64@0.9".
    `rounds` are those of I-OBS; the other methods prune once.

    Raises:
        RecipeError: an unknown method, or a pattern that cannot be read.
    """
    found = []
    for text in patterns:
        pattern, sparsity = read_pattern(text)
        for method in methods:
            if method not in METHODS:
                raise RecipeError(f"method {method!r}: unknown; choose from {', '.join(METHODS)}")
            count = rounds if method == "iobs" else 1
            label = f"{method}, {count} rounds" if count > 1 else method
            for refit in refits:
                rules = tuple(make_rule(glob, pattern, METHODS[method](), sparsity, refit) for glob in sites)
                found.append(Trial(label, text, refit, Recipe(rules, tuple(keep_dense), count)))
    return tuple(found)


def recipe_trial(name: str, recipe: Recipe) -> Trial:
    """Return the trial of a whole recipe, called `name`; its patterns are those of its rules."""
    patterns = dict.fromkeys(_pattern_words(rule.pattern, rule.sparsity) for rule in recipe.rules)
    return Trial(name, ", ".join(patterns), all(rule.refits for rule in recipe.rules), recipe)


def read_pattern(text: str) -> tuple[Pattern, float | None]:
    """Read "0.5", "2:4" or "64x64@0.9" into a pattern and, where it implies none, its sparsity. Raises RecipeError."""
    name, at, share = text.partition("@")
    number = _number(name)
    if number is not None and not at:
        return Unstructured(), number
    sparsity = _number(share) if at else None
    if at and sparsity is None:
        raise RecipeError(f"pattern {text!r}: {share!r} is no number; write the sparsity after @, as in 64x64@0.9")
    try:
        return parse_pattern(name), sparsity
    except PatternError as error:
        raise RecipeError(f"pattern {text!r}: {error}; or a number such as 0.5 for unstructured") from None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _pattern_words(pattern: Pattern, sparsity: float) -> str:
    if isinstance(pattern, Unstructured):
        return f"{sparsity:g}"
    return str(pattern) if pattern.fixed_sparsity() is not None else f"{pattern}@{sparsity:g}"
