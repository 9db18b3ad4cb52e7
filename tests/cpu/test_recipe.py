"""Recipes: strict TOML that round-trips, and an error for everything that is not one."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify_compiler.errors import RecipeError
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.pattern import NM, Block, Unstructured
from sparsify_compiler.problem import Pruner
from sparsify_compiler.recipe import Recipe, Rule, format_recipe, make_rule, method_options, parse_recipe
from sparsify_compiler.steps import Allocate, Distill, FineTune, Permute, Reconstruct

globs = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
methods: st.SearchStrategy[Pruner] = st.one_of(
    st.just(Magnitude()),
    st.just(Wanda()),
    st.builds(SparseGPT, st.floats(1e-9, 1), st.integers(1, 4096)),
    st.just(IOBS()),
    st.just(WoodTaylor()),
)
refits = st.one_of(st.none(), st.booleans())
free = st.one_of(st.just(Unstructured()), st.builds(Block, st.integers(1, 256), st.integers(1, 256)))
fixed = st.integers(2, 64).flatmap(lambda of: st.builds(NM, st.integers(1, of - 1), st.just(of)))
rules = st.one_of(
    st.builds(make_rule, globs, free, methods, st.floats(0, 1, exclude_max=True), refits),
    st.builds(make_rule, globs, fixed, methods, st.none(), refits),
)


@given(
    st.builds(
        Recipe,
        st.lists(rules, min_size=1, max_size=3).map(tuple),
        st.lists(globs, max_size=3).map(tuple),
        st.integers(1, 3),
    )
)
def test_a_recipe_round_trips_through_toml(recipe: Recipe) -> None:
    assert parse_recipe(format_recipe(recipe), METHODS) == recipe


def test_names_beyond_the_basic_plane_and_control_characters_round_trip() -> None:
    recipe = Recipe((make_rule('layer 𐀀 \x7f \t "quoted"', NM(2, 4), Magnitude()),), keep_dense=("é\x00",))
    assert parse_recipe(format_recipe(recipe), METHODS) == recipe


def test_a_recipe_reads_as_its_documentation_says() -> None:
    recipe = parse_recipe(
        """
        keep_dense = ["lm_head"]
        [[rule]]
        sites = "model.layers.*.mlp.*"
        pattern = "2:4"
        method = "sparsegpt"
        options = { damp = 0.1 }
        [[rule]]
        pattern = "64x32"
        sparsity = 0.9
        method = "magnitude"
        refit = false
        """,
        METHODS,
    )
    assert recipe == Recipe(
        (
            Rule("model.layers.*.mlp.*", NM(2, 4), SparseGPT(damp=0.1), 0.5),
            Rule("*", Block(64, 32), Magnitude(), 0.9, refit=False),
        ),
        keep_dense=("lm_head",),
    )


@pytest.mark.parametrize("rounds", [1, 3])
def test_kept_weights_are_re_solved_unless_that_undoes_the_methods_own_step(rounds: int) -> None:
    for name, method in METHODS.items():
        default = Recipe((make_rule("*", Unstructured(), method(), 0.5),), rounds=rounds)
        assert default.rules[0].refit is not (name == "woodtaylor" or (name == "iobs" and rounds > 1)), name
        for asked in (True, False):
            recipe = dataclasses.replace(default, rules=(dataclasses.replace(default.rules[0], refit=asked),))
            assert recipe.rules[0].refit is asked
            assert recipe.rules[0].refits is asked
            assert (format_recipe(recipe) == format_recipe(default)) == (recipe == default)


def test_a_rule_outside_a_recipe_does_as_in_one_round() -> None:
    assert make_rule("*", NM(2, 4), IOBS()).refits
    assert not make_rule("*", NM(2, 4), WoodTaylor()).refits


def test_every_step_of_a_recipe_round_trips_and_reads_as_its_table() -> None:
    recipe = Recipe(
        (make_rule("*", NM(2, 4), Magnitude(), swaps=3),),
        rounds=2,
        allocate=Allocate("error-curve", 0.05, "outputs"),
        permute=Permute(3),
        finetune=FineTune(2, 1e-4, 4, masked=True),
        reconstruct=Reconstruct(precision="bfloat16"),
        distill=Distill(reselect=2),
    )
    assert parse_recipe(format_recipe(recipe), METHODS) == recipe
    assert parse_recipe(RULE + "[distill]\nrate = 0.001", METHODS).distill == Distill(rate=0.001)
    assert parse_recipe(RULE + '[allocate]\nby = "error-curve"\nspread = 0.2', METHODS).allocate == Allocate(
        spread=0.2, weigh="gradients"
    )
    assert parse_recipe(RULE, METHODS).steps() == {}


@pytest.mark.parametrize("wrong", [True, Distill, {"epochs": 1}, Reconstruct()])
def test_a_step_that_is_no_object_of_its_kind_is_refused(wrong: object) -> None:
    with pytest.raises(RecipeError, match=r"distill must be an object, such as Distill\(\); found "):
        Recipe((make_rule("*", NM(2, 4), Magnitude()),), distill=wrong)  # type: ignore[arg-type]


RULE = '[[rule]]\npattern = "2:4"\nmethod = "magnitude"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule", "the recipe is not TOML: "),
        ("", r"the recipe has no rule; add a \[\[rule\]\]"),
        (
            "rules = 1",
            "the recipe: unknown key 'rules'; known: allocate, distill, .*, rounds, rule",
        ),
        ("distill = 3\n" + RULE, r"write distill as a table \[distill\], found 3"),
        ("[distill]\nrates = 3\n" + RULE, r"\[distill\]: unknown key 'rates'; known: batches, epochs, prec"),
        ("[distill]\nepochs = true\n" + RULE, r"\[distill\]: epochs must be like 4, found True"),
        ("[distill]\nepochs = 0\n" + RULE, r"\[distill\]: epochs 0: must be at least 1; leave the step out"),
        ("[reconstruct]\nrate = 2\n" + RULE, r"\[reconstruct\]: rate 2: must lie in \(0, 1\)"),
        ('[distill]\nprecision = "float16"\n' + RULE, r"\[distill\]: precision 'float16': choose float32 or bfloat16"),
        ("[reconstruct]\nprecision = 16\n" + RULE, r"\[reconstruct\]: precision must be like 'float32', found 16"),
        ('[allocate]\nby = "luck"\n' + RULE, r"\[allocate\]: by 'luck': choose owl or error-curve"),
        ('[allocate]\nweigh = "luck"\n' + RULE, r"\[allocate\]: weigh 'luck': choose gradients or outputs"),
        ("[finetune]\n" + RULE, "finetune stands between rounds, and there is one"),
        (RULE + "swaps = -1", "swaps -1 must be at least 0"),
        ("rule = 3", r"the recipe: write each rule as a table \[\[rule\]\]"),
        ("rule = [3]", r"the recipe: write each rule as a table \[\[rule\]\]"),
        ('keep_dense = "x"\n' + RULE, "keep_dense must be a list of globs, found 'x'"),
        ("keep_dense = [1]\n" + RULE, r"keep_dense must be a list of globs, found \[1\]"),
        (RULE + "sparsety = 0.5", "rule 1: unknown key 'sparsety'; known: method, options, pattern"),
        (RULE + RULE + "x = 1", "rule 2: unknown key 'x'"),
        ('[[rule]]\npattern = "2:4"', "rule 1: method is missing"),
        ('[[rule]]\nmethod = "wanda"', "rule 1: pattern is missing"),
        ('[[rule]]\npattern = "2:4"\nmethod = 3', "rule 1: method must be a str, found 3"),
        ('[[rule]]\npattern = 24\nmethod = "wanda"', "rule 1: pattern must be a str, found 24"),
        ('[[rule]]\npattern = "2:4"\nmethod = "obs"', "unknown method 'obs'; known: alps, iobs, magnitude, obc"),
        ('[[rule]]\npattern = "2/4"\nmethod = "wanda"', "rule 1: pattern '2/4': write unstructured"),
        ('[[rule]]\npattern = "4:4"\nmethod = "wanda"', "rule 1: pattern 4:4: needs 0 < keep < of"),
        (RULE + "sites = 3", "rule 1: sites must be a str, found 3"),
        (RULE + 'refit = "no"', "rule 1: refit must be a bool, found 'no'"),
        (RULE + 'sparsity = "half"', r"rule 1: sparsity must be a number in \[0, 1\), found 'half'"),
        (RULE + "sparsity = true", r"rule 1: sparsity must be a number in \[0, 1\), found True"),
        (RULE + "sparsity = 1.0", r"sparsity 1.0 must lie in \[0, 1\)"),
        (RULE + "sparsity = -0.1", r"sparsity -0.1 must lie in \[0, 1\)"),
        (RULE + "sparsity = nan", r"sparsity nan must lie in \[0, 1\)"),
        (RULE + "sparsity = 0.6", "pattern 2:4 removes 0.5 of the weights, sparsity 0.6 was asked"),
        ('[[rule]]\npattern = "unstructured"\nmethod = "wanda"', "pattern unstructured needs a sparsity"),
        ('[[rule]]\npattern = "4x4"\nmethod = "wanda"', "pattern 4x4 needs a sparsity"),
        (RULE + "options = { damp = 1 }", "rule 1, options: unknown key 'damp'; known: "),
        (RULE + "options = 3", "rule 1: options must be a dict, found 3"),
        (
            '[[rule]]\npattern = "2:4"\nmethod = "sparsegpt"\noptions = { damp = 7.0 }',
            r"rule 1: method 'sparsegpt' refuses its options \{'damp': 7.0\}: damp 7.0: must lie in \(0, 1\]",
        ),
        (
            '[[rule]]\npattern = "2:4"\nmethod = "sparsegpt"\noptions = { damp = "big" }',
            "rule 1: method 'sparsegpt' refuses its options",
        ),
    ],
)
def test_whatever_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, METHODS)


def test_the_sparsity_of_an_nm_pattern_may_be_written_out() -> None:
    assert parse_recipe(RULE + "sparsity = 0.5", METHODS).rules[0].sparsity == 0.5


def test_a_rule_matches_by_glob_and_names_a_site_only_letter_by_letter() -> None:
    rule = make_rule("model.layers.*.mlp.*", NM(2, 4), Magnitude())
    assert rule.matches("model.layers.3.mlp.up_proj")
    assert not rule.matches("model.layers.3.attn.q_proj")
    assert not rule.matches("Model.layers.3.mlp.up_proj")  # names are compared with their case
    assert not rule.names("model.layers.0.mlp.up_proj")
    assert make_rule("lm_head", NM(2, 4), Magnitude()).names("lm_head")
    assert not any(make_rule(glob, NM(2, 4), Magnitude()).names("a1") for glob in ("a?", "a[12]", "*"))
    assert make_rule("a[1]", NM(2, 4), Magnitude()).names("a[1]")


def test_every_option_of_a_method_can_be_written_in_a_recipe() -> None:
    assert method_options(SparseGPT(damp=0.5, block_columns=64)) == {"damp": 0.5, "block_columns": 64}
    for method in METHODS.values():
        assert set(method_options(method())) == {field.name for field in dataclasses.fields(method)}


def test_words_where_python_takes_objects_are_named_with_what_to_write() -> None:
    with pytest.raises(RecipeError, match=r"pattern must be a Pattern: parse_pattern\(\"2:4\"\); found '2:4'"):
        make_rule("*", "2:4", SparseGPT())  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"method must be an object, such as SparseGPT\(\); found 'sparsegpt'"):
        make_rule("*", NM(2, 4), "sparsegpt")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="found the class SparseGPT"):
        Rule("*", NM(2, 4), SparseGPT, 0.5)  # type: ignore[arg-type]
