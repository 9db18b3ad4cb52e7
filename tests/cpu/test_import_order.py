"""An import may only point upstream, and passes and runtime never meet: read from the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from size import source_files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sparsify_compiler"
FACADE = ""  # the package's own __init__, which re-exports the api

# Upstream first. Two names on one line may not import each other. A folder, and files that share a first word with a
# name here (cli, cli_progress), count as one: inside it imports are free.
ORDER = (
    ("version",),
    ("errors",),
    ("pattern",),
    ("progress",),
    ("figures",),
    ("problem", "kernel"),
    ("precision", "device_memory"),
    ("steps",),
    ("recipe",),
    ("channels",),
    ("graph",),
    ("plan",),
    ("batches",),
    ("boundaries",),
    ("frontends",),
    ("statistics",),
    ("checkpoint",),
    ("refinement",),
    ("calibrate",),
    ("passes", "runtime"),
    ("iobs",),
    ("evaluate",),
    ("evaluate_pairs",),
    ("export",),
    ("sources",),
    ("pipeline",),
    ("api",),
    ("api_bench", "api_table"),
    (FACADE,),
    ("cli",),
    ("__main__",),
)


def module_name(path: Path) -> str:
    """Name the module that `path`, relative to the repository, holds."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def group(module: str) -> str:
    """Return the part of a module's name that the order speaks of."""
    return (module + ".").split(".")[1]


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, module or object) for every import of the package, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def offences(module: str, tree: ast.Module) -> list[str]:
    """Say in words which imports of `module` point downstream or across."""
    rank = {name: position for position, names in enumerate(ORDER) for name in names}
    here = group(module)
    if here not in rank:
        return [f"{module}: {here!r} has no place in the order; add it to ORDER"]
    found = []
    for line, target in imports(tree):
        there = group(target)
        there = there if there in rank else FACADE
        if there != here and rank[there] >= rank[here]:
            found.append(f"{module}:{line} imports {target}: {there or PACKAGE!r} does not stand before {here!r}")
    return found


def product_files() -> list[Path]:
    return [path for path in source_files(ROOT) if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "tests"]


def test_every_import_points_upstream() -> None:
    files = product_files()
    assert len(files) > 10, "the product's files were not found"
    found = [
        offence
        for path in files
        for offence in offences(module_name(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


def test_every_name_in_the_order_exists() -> None:
    present = {group(module_name(path.relative_to(ROOT))) for path in product_files()}
    assert {name for names in ORDER for name in names} == present


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sparsify_compiler.pattern", "import sparsify_compiler.recipe"),
        ("sparsify_compiler.pattern", "from sparsify_compiler.recipe import Recipe"),
        ("sparsify_compiler.pattern", "from sparsify_compiler import recipe"),
        ("sparsify_compiler.pattern", "def f():\n    from sparsify_compiler.api import compile"),
        ("sparsify_compiler.problem", "from sparsify_compiler.kernel import Packed"),
        ("sparsify_compiler.passes.fold", "from sparsify_compiler.runtime.formats import pack"),
        ("sparsify_compiler.runtime.tuning.tune", "from sparsify_compiler.passes.fold import Fold"),
        ("sparsify_compiler.sources.models", "import sparsify_compiler.pipeline.job"),
        ("sparsify_compiler.api", "from sparsify_compiler import compile"),
        ("sparsify_compiler.novelty", "import torch"),
    ],
)
def test_an_import_that_points_downstream_or_across_is_caught(module: str, source: str) -> None:
    assert len(offences(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sparsify_compiler.recipe", "from sparsify_compiler.pattern import NM"),
        ("sparsify_compiler.passes.fold", "from sparsify_compiler.passes.lower import lower"),
        ("sparsify_compiler.sources.models", "from sparsify_compiler.sources.huggingface import load_folder"),
        ("sparsify_compiler.pattern", "import torch"),
        ("sparsify_compiler", "from sparsify_compiler.api import compile"),
        ("sparsify_compiler.cli.main", "from sparsify_compiler import compile"),
    ],
)
def test_an_import_that_points_upstream_passes(module: str, source: str) -> None:
    assert offences(module, ast.parse(source)) == []


def test_the_linked_folders_take_their_names_inside_the_package() -> None:
    assert module_name(Path("passes/prune/wanda.py")) == "sparsify_compiler.passes.prune.wanda"
    assert module_name(Path("sparsify_compiler/__init__.py")) == "sparsify_compiler"
