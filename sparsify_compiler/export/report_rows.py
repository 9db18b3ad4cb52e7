"""What both drawings of a report share: folded rows, chosen timings, and numbers and recipes in words."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

from sparsify_compiler.export.report import Quality, Report, SiteReport
from sparsify_compiler.runtime.tuning.verdicts import Timing, by_reason, without_found

T = TypeVar("T")

NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Row:
    """Sites told in one line. `name` names exactly `sites`: `layers.{0-2,4}.fc` stands for four of them."""

    name: str
    sites: tuple[SiteReport, ...]


def fold_sites(sites: Sequence[SiteReport]) -> tuple[Row, ...]:
    """Gather sites whose names differ only in numbers and for which all that was decided is the same.

    Errors, times, token counts, notes and the reasons for a kernel may differ inside a row; the drawing shows ranges.
    """
    return tuple(Row(name, members) for name, members in fold(sites, lambda site: site.name, _decision))


def single_rows(sites: Sequence[SiteReport]) -> tuple[Row, ...]:
    """One row a site."""
    return tuple(Row(site.name, (site,)) for site in sites)


def fold(
    items: Sequence[T], name: Callable[[T], str], same: Callable[[T], object]
) -> tuple[tuple[str, tuple[T, ...]], ...]:
    """Gather items of equal `same` whose names differ only in numbers, in order of first appearance.

    A folded name writes each number that differs as `{0-2,4}`. Where two numbers differ, every combination must be
    present, else the items are split until that holds: a folded name never claims an item that is not there.

        >>> fold(["a.0", "a.1", "a.3", "b.0"], str, lambda item: 0)
        (('a.{0-1,3}', ('a.0', 'a.1', 'a.3')), ('b.0', ('b.0',)))
    """
    groups: dict[tuple[str, object], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((NUMBER.sub("#", name(item)), same(item)), []).append(index)
    names = [name(item) for item in items]
    folded = sorted((row for group in groups.values() for row in _fold_group(group, names)), key=lambda row: row[1][0])
    return tuple((text, tuple(items[index] for index in members)) for text, members in folded)


def fold_names(names: Iterable[str]) -> str:
    """Write names as one comma-separated phrase, numbers folded.

    >>> fold_names(["h.0.fc", "h.1.fc", "head"])
    'h.{0-1}.fc, head'
    """
    return ", ".join(name for name, _ in fold(list(names), str, lambda item: 0))


def best_timings(site: SiteReport) -> dict[int, Timing]:
    """Return per token count the timing to show: the picked kernel's, or where dense was kept the fastest other's."""
    best: dict[int, Timing] = {}
    for timing in site.timings:
        if timing.kernel == "dense" or (site.kernel not in ("dense", timing.kernel)):
            continue
        if timing.tokens not in best or timing.speedup > best[timing.tokens].speedup:
            best[timing.tokens] = timing
    return dict(sorted(best.items()))


def eligible_kernels(site: SiteReport) -> tuple[str, ...]:
    """Name the kernels that could run the site and were timed, `dense` first."""
    return tuple(dict.fromkeys(["dense", *(timing.kernel for timing in site.timings)]))


def refusals(
    of_sites: Iterable[tuple[str, Mapping[str, str]]],
) -> Iterable[tuple[str, Sequence[str], Sequence[str]]]:
    """Yield each reason against kernels once, with the kernels that gave it and the sites they gave it at.

    `of_sites` are the sites' names, each with the refused kernels and their reasons.
    """
    sites = tuple(of_sites)
    for reason, kernels in by_reason(pair for _, refused in sites for pair in refused.items()).items():
        stem, gathered = without_found(reason), dict[tuple[str, ...], list[str]]()
        for kernel in kernels:
            where = (name for name, refused in sites if without_found(refused.get(kernel, "")) == stem)
            gathered.setdefault(tuple(where), []).append(kernel)
        yield from ((reason, each, where) for where, each in gathered.items())


def error_selected(site: SiteReport) -> float | None:
    """Return the relative error as the selector left it, before the re-solve, or None where it is not known."""
    if site.relative_error is None or site.loss_selected is None or not site.loss:
        return None
    return site.relative_error * site.loss_selected / site.loss


def weights_removed(report: Report) -> tuple[int, int]:
    """Count the weights removed and the weights of all sites, refused and dense ones included."""
    removed = sum(round(prod(site.shape) * site.sparsity) for site in report.sites if site.status == "pruned")
    return removed, sum(prod(site.shape) for site in report.sites)


def recipe_words(recipe: str) -> tuple[str, ...]:
    """Say each rule of a recipe's TOML in one phrase; a text that is no such TOML is returned as it stands."""
    try:
        table = tomllib.loads(recipe)
    except tomllib.TOMLDecodeError:
        return (recipe,)
    rules = table.get("rule")
    if not isinstance(rules, list):
        return (recipe,)
    words = [_rule_words(rule) for rule in rules]
    if table.get("rounds", 1) != 1:
        words.append(f"{table['rounds']} rounds, the best kept")
    for step, settings in table.items():
        if isinstance(settings, dict):
            words.append(f"{step}: {', '.join(f'{key} {value}' for key, value in settings.items())}")
    if table.get("keep_dense"):
        words.append(f"dense: {', '.join(table['keep_dense'])}")
    return tuple(words)


def shape_words(site: SiteReport) -> str:
    """Write the weight's shape: "576x1536", "64x3x3x3 in 4 groups"."""
    shape = "x".join(map(str, site.shape))
    return shape if site.groups == 1 else f"{shape} in {site.groups} groups"


def quality_change(quality: Quality) -> str:
    """Say how the sparse value stands to the dense one, or nothing where no dense value is known."""
    if not quality.dense:
        return ""
    return f"{quality.sparse / quality.dense:.2f}x"


def printable(text: str) -> str:
    """Replace control characters (a model's names may hold terminal escapes) by their code; keep line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def size(count: int) -> str:
    """Write a number of bytes with a binary unit: 1536 is "1.5 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """Write seconds for a reader: "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
    """Write a measure with four significant digits, without a needless exponent."""
    return f"{value:.4g}" if abs(value) < 1e4 or abs(value) >= 1e7 else f"{value:,.0f}"


def spread(values: Iterable[float | None], write: Callable[[float], str], missing: str = "") -> str:
    """Write the least and the greatest of `values` as "a–b", one value alone where they read the same."""
    known = [value for value in values if value is not None]
    if not known:
        return missing
    low, high = write(min(known)), write(max(known))
    return low if low == high else f"{low}–{high}"


def _decision(site: SiteReport) -> object:
    # a pruned site's reason says which kernel won, with that site's own figures
    reason = "" if site.status == "pruned" else site.reason
    what = (site.kind, site.shape, site.groups, site.status, reason, site.pattern, site.method, round(site.sparsity, 3))
    return (*what, site.kernel, eligible_kernels(site), tuple(site.refused_kernels.items()), site.onnx)


def _fold_group(group: Sequence[int], names: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    numbers = {index: NUMBER.findall(names[index]) for index in group}
    columns = [list(dict.fromkeys(column)) for column in zip(*numbers.values(), strict=True)]
    varying = [position for position, column in enumerate(columns) if len(column) > 1]
    distinct = len({names[index] for index in group})
    if not varying:  # equal names: nothing tells the items apart, so each keeps its own row
        return [(names[index], (index,)) for index in group]
    if not distinct == len(group) == prod(len(columns[position]) for position in varying):
        parts: dict[str, list[int]] = {}
        for index in group:
            parts.setdefault(numbers[index][varying[0]], []).append(index)
        return [row for part in parts.values() for row in _fold_group(part, names)]
    pieces = NUMBER.split(names[group[0]])
    written = [column[0] if len(column) == 1 else "{" + _ranges(column) + "}" for column in columns]
    return [(pieces[0] + "".join(a + b for a, b in zip(written, pieces[1:], strict=True)), tuple(group))]


def _ranges(texts: Sequence[str]) -> str:
    """Write numbers as "0-2,4"; a padded number such as "007" keeps its zeros and stands alone."""
    plain = sorted(int(text) for text in texts if text == str(int(text)))
    runs: list[list[int]] = []
    for value in plain:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    written = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ",".join(written + sorted(text for text in texts if text != str(int(text))))


def _rule_words(rule: dict[str, Any]) -> str:
    pattern = str(rule.get("pattern", ""))
    sparsity = f" at sparsity {rule['sparsity']:g}" if "sparsity" in rule else ""
    options = ", ".join(f"{key} {value}" for key, value in rule.get("options", {}).items())
    how = f"{rule.get('method', '')}{f' ({options})' if options else ''}"
    refit = "kept weights re-solved" if rule.get("refit", True) or rule.get("swaps") else "no re-solve"
    if rule.get("swaps"):
        refit = f"up to {rule['swaps']} rounds of swaps, {refit}"
    sites = "every site" if rule.get("sites", "*") == "*" else rule["sites"]
    return f"{sites}: {pattern}{sparsity}, {how}, {refit}"
