"""The README names every file as the file describes itself, and only commands that exist."""

import re
from pathlib import Path

import pytest
import torch
import typer
from listing import START, STOP, first_line, listing, with_listing
from size import source_files
from typer.core import TyperCommand, TyperGroup

from sparsify_compiler.cli.main import build_app
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.recipe import format_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_every_file_with_the_first_line_of_its_docstring() -> None:
    assert with_listing(readme(), listing(ROOT)) == readme(), "run `make readme`"


def test_every_module_says_what_it_is_for() -> None:
    product = [path.relative_to(ROOT) for path in source_files(ROOT) if path.suffix == ".py"]
    assert [path for path in product if path.parts[0] != "tests" and len(first_line(ROOT / path).split()) < 3] == []


def test_a_listing_that_is_out_of_date_is_caught() -> None:
    page = f"# Title\n{START}\n\nold\n\n{STOP}\nend\n"
    assert with_listing(page, "new") != page
    assert with_listing(with_listing(page, "new"), "new") == with_listing(page, "new")
    assert with_listing(page, "new").endswith("\nend\n")


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", readme(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def commands() -> dict[str, set[str]]:
    """Return every verb of the command line with its options."""
    program = typer.main.get_command(build_app())
    assert isinstance(program, TyperGroup)
    return {name: options(verb) for name, verb in program.commands.items()}


def options(verb: object) -> set[str]:
    """Return the options of a verb, or of all that stand below it."""
    if isinstance(verb, TyperGroup):
        return set().union(*(options(each) for each in verb.commands.values()))
    assert isinstance(verb, TyperCommand)
    return {flag for option in verb.params for flag in (*option.opts, *option.secondary_opts)}


def test_every_command_in_the_readme_exists_with_its_options() -> None:
    known = commands()
    lines = [line.split() for line in readme().splitlines() if line.startswith("sparsify-compiler ")]
    assert {line[1] for line in lines} | {"demo"} == set(known)
    for _, verb, *words in lines:
        assert {word for word in words if word.startswith("-")} <= known[verb], verb


def test_every_option_in_the_readme_exists() -> None:
    own = {"--index-url", "--no-deps", "--help"}  # pip's, and every verb's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme())) - own
    assert named <= {flag for flags in commands().values() for flag in flags}


def test_the_python_example_runs_on_a_small_transformer() -> None:
    transformers = pytest.importorskip("transformers", reason="the example's site names are a Hugging Face model's")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    names = {"model": model, "batches": [{"input_ids": torch.randint(0, 64, (2, 16))} for _ in range(2)]}
    example = python_examples()[0]
    exec(example, names)
    compiled, report = names["compiled"], names["report"]
    assert type(compiled) is type(model)
    pruned = [site for site in report.sites if site.status == "pruned"]
    assert len(pruned) == 14  # 7 linear layers in each of 2 blocks
    assert {site.sparsity for site in pruned} == {0.5}
    assert compiled.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2).shape == (1, 6)


def test_the_solver_example_finds_the_inputs_that_labels_depend_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 20, dtype=torch.float64)
    truth = torch.zeros(20, dtype=torch.float64)
    truth[[1, 4, 9, 12, 18]] = torch.tensor([2.0, -2.0, 1.5, -1.5, 2.0], dtype=torch.float64)
    labels = torch.where(torch.rand(400, dtype=torch.float64) < torch.sigmoid(x @ truth), 1.0, -1.0)
    names = {"x": x, "labels": labels}
    exec(python_examples()[1], names)
    found = names["found"]
    assert found.settled.all()
    assert found.keep[0].nonzero().flatten().tolist() == [1, 4, 9, 12, 18]
    value, slope = names["loss"].value_and_gradient(found.weight)
    assert slope[found.keep].abs().max() < 1e-9  # a minimiser on its support
    assert torch.equal(value, found.trace.loss[-1])


def python_examples() -> list[str]:
    examples = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)
    assert len(examples) == 2
    return examples


def test_the_recipe_example_is_a_recipe() -> None:
    rules, steps = re.findall(r"```toml\n(.*?)```", readme(), re.DOTALL)
    recipe = parse_recipe(steps + rules, METHODS)
    assert len(recipe.rules) == 2
    assert set(recipe.steps()) == {"permute", "allocate", "reconstruct", "distill"}
    assert recipe == parse_recipe(format_recipe(recipe), METHODS)
