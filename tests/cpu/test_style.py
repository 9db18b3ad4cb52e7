"""The house rules of CONTRIBUTING.md that a syntax tree can tell; each check has a proof that it can fail."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from size import count_lines, source_files

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES = 330  # the rule is 300; the rest is slack for a docstring
FUNCTION_LINES = 60  # the rule is 50
MUTABLE_CALLS = frozenset({"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"})
VAGUE_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"})
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|farm|root|home|tmp|opt|Users)/[a-z]")

Check = Callable[[ast.Module], Iterator[str]]


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Find functions of more than FUNCTION_LINES lines, decorators and docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.lineno} {node.name} has {lines} lines; split it, at most {FUNCTION_LINES}"


def module_state(tree: ast.Module) -> Iterator[str]:
    """Find module-level lists, sets and dicts; a dict literal under an UPPER_CASE name is a constant table."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{node.lineno} global {', '.join(node.names)}; pass the value instead"
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        table = isinstance(node.value, ast.Dict) and node.value.keys and all(name.isupper() for name in names)
        if names != ["__all__"] and not table and _is_mutable(node.value):
            yield f"{node.lineno} {', '.join(names)} is mutable state of the module; use a tuple, or pass it"


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if not isinstance(value, ast.Call):
        return False
    called = value.func
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return name in MUTABLE_CALLS


def broad_handlers(tree: ast.Module) -> Iterator[str]:
    """Find handlers that could hide any failure; one that ends in a bare `raise` (to clean up) hides none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            last = node.body[-1]
            if _names_everything(node.type) and not (isinstance(last, ast.Raise) and last.exc is None):
                yield f"{node.lineno} catches everything; name the error that can be handled"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            broad = [argument for argument in node.args if _names_everything(argument)]
            yield from (f"{node.lineno} suppresses everything; name the error that can be handled" for _ in broad)


def _names_everything(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or ast.unparse(k).split(".")[-1] in ("Exception", "BaseException") for k in kinds)


def prints(tree: ast.Module) -> Iterator[str]:
    """Find `print`: the library returns values, the command line draws with rich."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno} prints; return the text, or draw it with rich"


def postponed_annotations(tree: ast.Module) -> Iterator[str]:
    """Find `from __future__ import annotations`, which hides field types from the checks that tests run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield f"{node.lineno} postpones annotations; remove the import"


CHECKS: tuple[Check, ...] = (long_functions, module_state, broad_handlers, prints, postponed_annotations)


def machine_paths(text: str) -> Iterator[str]:
    """Find absolute paths of somebody's machine."""
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{number} holds a path of a machine: {line.strip()[:80]}"


def loose_ends(text: str) -> Iterator[str]:
    """Find a TODO or FIXME that names no issue."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX)\b(?!.*#\d)", line):
            yield f"{number} is a loose end without an issue number: {line.strip()[:80]}"


def product_files() -> list[Path]:
    return [path for path in source_files(ROOT) if path.relative_to(ROOT).parts[0] != "tests"]


def tracked_text() -> Iterator[tuple[Path, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if b"\0" not in data[:8192]:
                yield Path(name), data.decode("utf-8")


def report(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_product_keeps_the_rule(check: Check) -> None:
    files = [path for path in product_files() if path.suffix == ".py"]
    assert files
    trees = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    report([f"{path}:{offence}" for path, tree in trees.items() for offence in check(tree)])


def test_no_file_is_too_long_to_read() -> None:
    lengths = {path.relative_to(ROOT): count_lines(path) for path in product_files()}
    report([f"{path} has {count} lines; at most {FILE_LINES}" for path, count in lengths.items() if count > FILE_LINES])


def test_no_file_is_named_for_nothing_in_particular() -> None:
    report([str(path.relative_to(ROOT)) for path in source_files(ROOT) if path.stem in VAGUE_NAMES])


def test_no_tracked_file_holds_a_path_of_a_machine_or_a_loose_end() -> None:
    here = Path(__file__).resolve().relative_to(ROOT)
    texts = {path: text for path, text in tracked_text() if path != here}
    found = [f"{path}:{offence}" for path, text in texts.items() for offence in machine_paths(text)]
    code = {path: text for path, text in texts.items() if path.suffix != ".md"}
    report(found + [f"{path}:{offence}" for path, text in code.items() for offence in loose_ends(text)])


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
        (module_state, "cache = {}"),
        (module_state, "CACHE: dict[str, int] = {}"),
        (module_state, "NAMES = ['a', 'b']"),
        (module_state, "SEEN = set()"),
        (module_state, "COUNTS = collections.defaultdict(int)"),
        (module_state, "squares = {n: n * n for n in range(3)}"),
        (module_state, "def f():\n    global counter\n    counter = 1"),
        (broad_handlers, "try:\n    f()\nexcept Exception:\n    pass"),
        (broad_handlers, "try:\n    f()\nexcept:\n    pass"),
        (broad_handlers, "try:\n    f()\nexcept (OSError, Exception) as error:\n    log(error)"),
        (broad_handlers, "try:\n    f()\nexcept BaseException:\n    return None"),
        (broad_handlers, "with contextlib.suppress(Exception):\n    f()"),
        (prints, "def f():\n    print('result')"),
        (postponed_annotations, "from __future__ import annotations"),
    ],
)
def test_each_check_catches_an_offence(check: Check, source: str) -> None:
    assert len(list(check(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)),
        (module_state, "METHODS = {'wanda': Wanda}"),
        (module_state, "NAMES = ('a', 'b')\n__all__ = ['a']\nKNOWN = frozenset({'a'})"),
        (module_state, "def f():\n    cache = {}\n    return cache"),
        (broad_handlers, "try:\n    f()\nexcept OSError:\n    pass"),
        (broad_handlers, "try:\n    f()\nexcept BaseException:\n    remove(folder)\n    raise"),
        (prints, "def f(console):\n    console.print('result')"),
    ],
)
def test_each_check_lets_good_code_pass(check: Check, source: str) -> None:
    assert list(check(ast.parse(source))) == []


def test_a_path_of_a_machine_and_a_loose_end_are_caught() -> None:
    assert len(list(machine_paths('open("/' + 'home/me/data.txt")'))) == 1
    assert list(machine_paths(f"https://example.org/home/page and .{'/tmp'}/x and a{'/work'}/b")) == []
    assert len(list(loose_ends("x = 1  # TO" + "DO make faster"))) == 1
    assert list(loose_ends("x = 1  # TO" + "DO (#12) make faster")) == []
