"""The README's one line per file, written from the first line of every module's docstring (`make readme`)."""

import ast
from itertools import groupby
from pathlib import Path

from size import source_files

START = "<!-- one line per file: written by `make readme` -->"
STOP = "<!-- end of one line per file -->"


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


def listing(root: Path) -> str:
    """Write the product's Python files as one table per folder; an `__init__.py` speaks for its folder."""
    files = [path for path in source_files(root) if path.suffix == ".py"]
    product = [path for path in files if path.relative_to(root).parts[0] != "tests"]
    blocks = []
    for folder, members in groupby(sorted(product, key=_folder_first), key=lambda path: path.parent):
        rows = {path.name: first_line(path) for path in members}
        about = rows.pop("__init__.py", "")
        table = "\n".join(f"| `{name}` | {line} |" for name, line in rows.items())
        blocks.append(f"**{folder.relative_to(root)}/**: {about}\n\n| file | purpose |\n|---|---|\n{table}")
    return "\n\n".join(blocks)


def _folder_first(path: Path) -> tuple[Path, str]:
    return path.parent, path.name


def with_listing(readme: str, text: str) -> str:
    """Return `readme` with `text` between the two marks."""
    before, rest = readme.split(START)
    return f"{before}{START}\n\n{text}\n\n{STOP}{rest.split(STOP)[1]}"


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    page = here / "README.md"
    page.write_text(with_listing(page.read_text(encoding="utf-8"), listing(here)), encoding="utf-8")
