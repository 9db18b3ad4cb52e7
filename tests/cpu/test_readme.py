"""The README names every file as the file describes itself, and only commands that exist."""

import re
from pathlib import Path

from listing import START, STOP, first_line, listing, with_listing
from size import source_files

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
