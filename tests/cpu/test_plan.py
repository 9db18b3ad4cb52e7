"""Which rule decides a site, and in words why a site stays dense: every branch."""

from dataclasses import replace

import pytest

import sparsify_compiler as sc
from sparsify_compiler.errors import ModelError, PatternError, RecipeError
from sparsify_compiler.graph import MatmulLayout, Site
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import NM, Block, Unstructured
from sparsify_compiler.plan import Decision, decide
from sparsify_compiler.recipe import Recipe, make_rule
from sparsify_compiler.steps import Allocate, Permute
from tests.models.small import Mlp, mlp_batches, seeded

FC = Site("fc", "Linear", "fc.weight", (8, 16), 8, 16, 1, 16, MatmulLayout(transposed=True), "x", 0)
HEAD = replace(FC, name="head", dense_by_default="the output head")
GATHER = replace(FC, name="gather", refusal="an embedding also reads the weight")
TWO_FOUR = make_rule("*", NM(2, 4), Magnitude())


def test_the_first_rule_that_matches_decides() -> None:
    first, second = make_rule("f*", NM(2, 4), Wanda()), make_rule("*", NM(1, 4), Magnitude())
    other = replace(FC, name="other")
    recipe = Recipe((first, second))
    assert decide(recipe, [FC, other]) == (Decision(FC, recipe.rules[0]), Decision(other, recipe.rules[1]))


def test_a_site_that_cannot_be_pruned_stays_dense_with_its_reason() -> None:
    decision = decide(Recipe((TWO_FOUR,)), [FC, GATHER])[1]
    assert decision == Decision(GATHER, None, "an embedding also reads the weight", refused=True)


def test_a_rule_that_names_a_site_that_cannot_be_pruned_is_an_error() -> None:
    rule = make_rule("gather", NM(2, 4), Magnitude())
    with pytest.raises(RecipeError, match="rule 'gather': this site cannot be pruned: an embedding also reads"):
        decide(Recipe((rule, TWO_FOUR)), [FC, GATHER])


def test_keep_dense_wins_over_every_rule() -> None:
    rule = make_rule("fc", NM(2, 4), Magnitude())
    other = replace(FC, name="other")
    decision = decide(Recipe((rule, TWO_FOUR), keep_dense=("f?",)), [FC, other])[0]
    assert decision == Decision(FC, None, "kept dense by keep_dense 'f?'")


def test_a_site_that_no_rule_matches_stays_dense() -> None:
    other = replace(FC, name="other")
    decision = decide(Recipe((make_rule("f*", NM(2, 4), Magnitude()),)), [FC, other])[1]
    assert decision == Decision(other, None, "no rule of the recipe matches")


def test_a_site_dense_by_default_is_pruned_only_where_a_rule_names_it() -> None:
    assert decide(Recipe((TWO_FOUR,)), [FC, HEAD])[1] == Decision(
        HEAD, None, "the output head; dense unless a rule names it outright"
    )
    named = make_rule("head", NM(2, 4), Magnitude())
    recipe = Recipe((named, TWO_FOUR))
    assert decide(recipe, [FC, HEAD])[1] == Decision(HEAD, recipe.rules[0])


def test_a_name_with_brackets_is_first_read_letter_by_letter() -> None:
    bracketed = replace(HEAD, name="head[0]")
    named = make_rule("head[0]", NM(2, 4), Magnitude())
    recipe = Recipe((named, TWO_FOUR))
    assert decide(recipe, [FC, bracketed])[1] == Decision(bracketed, recipe.rules[0])
    kept = decide(Recipe((named, TWO_FOUR), keep_dense=("head[0]",)), [FC, bracketed])[1]
    assert kept == Decision(bracketed, None, "kept dense by keep_dense 'head[0]'")
    refused = replace(bracketed, refusal="an embedding also reads the weight")
    with pytest.raises(RecipeError, match=r"rule 'head\[0\]': this site cannot be pruned"):
        decide(Recipe((named, TWO_FOUR)), [FC, refused])


def test_sparsity_zero_leaves_a_site_dense() -> None:
    other = replace(FC, name="other")
    nothing = make_rule("fc", Unstructured(), Magnitude(), sparsity=0.0)
    assert decide(Recipe((nothing, TWO_FOUR)), [FC, other])[0] == Decision(FC, None, "sparsity 0 was asked")


def test_a_pattern_that_does_not_tile_skips_under_a_glob_and_fails_under_a_name() -> None:
    narrow = replace(FC, name="narrow", in_=3, run=3, shape=(8, 3))
    reason = "2:4 needs at least 4 inputs to choose from; found 3 inputs"
    assert decide(Recipe((TWO_FOUR,)), [FC, narrow])[1] == Decision(narrow, None, reason)
    named = make_rule("narrow", NM(2, 4), Magnitude())
    with pytest.raises(PatternError, match=f"layer 'narrow': {reason}"):
        decide(Recipe((named, TWO_FOUR)), [FC, narrow])


def test_a_block_is_measured_against_one_kernel_tap() -> None:
    conv = replace(FC, name="conv", in_=36, run=9)
    rule = make_rule("*", Block(4, 4), Magnitude(), sparsity=0.5)
    decision = decide(Recipe((rule,)), [FC, conv])[1]
    assert decision.rule is None
    assert "9 input channels a tap" in decision.reason


def test_a_rule_that_matches_nothing_is_an_error_that_lists_sites() -> None:
    sites = [replace(FC, name=f"fc{i}") for i in range(6)]
    rule = make_rule("mlp.*", NM(2, 4), Magnitude())
    with pytest.raises(RecipeError, match=r"rule 'mlp\.\*' matches no site; the sites are fc0, .*fc3 and 2 more"):
        decide(Recipe((TWO_FOUR, rule)), sites)


def test_a_keep_dense_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="keep_dense 'lm_head' matches no site; the sites are fc"):
        decide(Recipe((TWO_FOUR,), keep_dense=("lm_head",)), [FC])


def test_a_graph_without_sites_is_an_error() -> None:
    with pytest.raises(ModelError, match="no prunable site: the graph has no linear"):
        decide(Recipe((TWO_FOUR,)), [])


def test_a_graph_whose_sites_are_all_refused_is_an_error_with_reasons() -> None:
    sites = [replace(GATHER, name=f"g{i}") for i in range(5)]
    with pytest.raises(ModelError, match=r"no prunable site: all 5 are refused \(g0: an embedding .*; \.\.\.\)"):
        decide(Recipe((TWO_FOUR,)), sites)


def test_a_recipe_that_leaves_every_site_dense_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"the recipe leaves every site dense \(fc: kept dense by keep_dense"):
        decide(Recipe((TWO_FOUR,), keep_dense=("*",)), [FC])


def test_allocation_is_refused_where_every_pattern_fixes_its_sparsity() -> None:
    other = replace(FC, name="other")
    fixed = (make_rule("fc", NM(1, 4), Wanda()), TWO_FOUR)
    with pytest.raises(RecipeError, match=r"\[allocate\].* every rule has 1:4, 2:4, which fixes them; leave \[alloc"):
        decide(Recipe(fixed, allocate=Allocate()), [FC, other])
    free = make_rule("other", Unstructured(), Wanda(), 0.5)
    assert all(decision.rule for decision in decide(Recipe((free, *fixed), allocate=Allocate()), [FC, other]))


def test_what_no_pass_could_follow_is_refused_before_the_first_of_them() -> None:
    stages: list[str] = []
    recipe = Recipe((make_rule("*", NM(2, 4), Magnitude()),), permute=Permute(), allocate=Allocate())
    with pytest.raises(RecipeError, match=r"\[allocate\]"):
        sc.compile(seeded(Mlp), mlp_batches(), recipe=recipe, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"trace"}


def test_a_pattern_that_would_remove_nothing_is_not_called_pruning() -> None:
    other = replace(FC, name="other", shape=(8, 32), in_=32, run=32)
    one_tile = make_rule("*", Block(8, 16), Magnitude(), sparsity=0.5)  # half of one tile rounds to none
    decision = decide(Recipe((one_tile,)), [FC, other])[0]
    assert decision == Decision(FC, None, "8x16 at sparsity 0.5 removes nothing from a (8, 16) weight")
    named = make_rule("fc", Block(8, 16), Magnitude(), sparsity=0.5)
    with pytest.raises(PatternError, match="removes nothing"):
        decide(Recipe((named,)), [FC, other])
