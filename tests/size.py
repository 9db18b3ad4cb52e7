"""Print the lines of Python and CUDA per folder, and the longest files: what a reader has to get through."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = frozenset({".py", ".cu", ".jinja"})
FOLDERS = ("sparsify_compiler", "passes", "runtime", "tests")


def source_files(root: Path) -> list[Path]:
    """List the source files under `root`, each once: the two linked folders are read where they really are."""
    found = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*")))
    return [path for path in found if path.suffix in SUFFIXES and path.is_file() and path == path.resolve()]


def count_lines(path: Path) -> int:
    """Count the lines of a text file."""
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file)


def size_report(root: Path, files: Iterable[Path], longest: int = 5) -> str:
    """Write one line per folder (lines, files), the sums with and without tests, and the `longest` files."""
    lines = {path.relative_to(root): count_lines(path) for path in files}
    per_folder: Counter[str] = Counter()
    for path, count in lines.items():
        per_folder[str(path.parent)] += count
    rows = [
        f"{count:7,} lines {sum(1 for path in lines if str(path.parent) == folder):3} files  {folder}"
        for folder, count in sorted(per_folder.items())
    ]
    tests = sum(count for path, count in lines.items() if path.parts[0] == "tests")
    rows.append(f"{sum(lines.values()) - tests:7,} lines of product, {tests:,} of tests")
    top = sorted(lines.items(), key=lambda item: -item[1])[:longest]
    rows.append("longest: " + ", ".join(f"{path} {count}" for path, count in top))
    return "\n".join(rows)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    print(size_report(here, source_files(here)))
