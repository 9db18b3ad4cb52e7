"""A table of pruning methods side by side: one row a way of pruning and calibration draw, means and spreads, JSON.

`method_table_text` and `method_table_html` draw it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sparsify_compiler.errors import DataError
from sparsify_compiler.export.report import Quality

FORMAT = 1


@dataclass(frozen=True)
class RoundPoint:
    """The model after round `number` (from 1) on every held-out set, finished as the last would be.

    `chosen` marks the round whose weights the row has.
    """

    number: int
    quality: tuple[Quality, ...]
    chosen: bool


@dataclass(frozen=True)
class TableRow:
    """One way of pruning on one calibration draw.

    `draw` counts from 0. `sparsity` is the share removed that was realised, over the `sites` that were pruned;
    `error` the sum of their relative errors, None without Gram matrices. `quality` is the model as it is handed out:
    with BatchNorm statistics re-estimated where it has some, and then `without` is the model before that; empty else.
    `seconds` are those of tracing and pruning, rounds measured in between included; `peak_memory_bytes` is the most
    that the process (on CUDA: the device) held meanwhile, model and data included.
    """

    method: str
    pattern: str
    refit: bool
    draw: int
    sparsity: float
    sites: int
    error: float | None
    seconds: float
    peak_memory_bytes: int
    quality: tuple[Quality, ...]
    without: tuple[Quality, ...] = ()
    rounds: tuple[RoundPoint, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of one figure over the draws."""

    mean: float
    least: float
    most: float


@dataclass(frozen=True)
class Summary:
    """The rows that differ in their draw alone, `draws` of them; figures by (held-out set, measure), in order."""

    method: str
    pattern: str
    refit: bool
    draws: int
    sparsity: float
    seconds: float
    peak_memory_bytes: int
    quality: Mapping[tuple[str, str], Spread]
    without: Mapping[tuple[str, str], Spread]


@dataclass(frozen=True)
class MethodTable:
    """Every row, and what it takes to make them again.

    `calibration` says of every draw in words what it is, `heldout` of every held-out set by name. `dense` are the
    figures of the model as it was given.
    """

    model: str
    command: str
    created: str
    environment: Mapping[str, str]
    calibration: tuple[str, ...]
    heldout: Mapping[str, str]
    dense: tuple[Quality, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()

    def summaries(self) -> tuple[Summary, ...]:
        """Gather rows that differ in their draw alone, in order of first appearance."""
        groups: dict[tuple[str, str, bool], list[TableRow]] = {}
        for row in self.rows:
            groups.setdefault((row.method, row.pattern, row.refit), []).append(row)
        return tuple(_summary(rows) for rows in groups.values())

    def to_json(self) -> str:
        """Write every number, means and spreads too; `method_table_from_json` is the inverse."""
        means = [
            {**dataclasses.asdict(each), "quality": _listed(each.quality), "without": _listed(each.without)}
            for each in self.summaries()
        ]
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self), "summaries": means}, indent=1)


def method_table_from_json(text: str) -> MethodTable:
    """Read what `MethodTable.to_json` wrote.

    Raises:
        DataError: the text is something else, or of a newer format.
    """
    try:
        found = json.loads(text)
        if found.pop("format") > FORMAT:
            raise DataError("a method table of a newer format; update this program")
        del found["summaries"]
        found["rows"] = tuple(row_from_plain(row) for row in found["rows"])
        found["dense"] = _qualities(found["dense"])
        return MethodTable(**{**found, "calibration": tuple(found["calibration"]), "notes": tuple(found["notes"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a method table of this program ({type(error).__name__}: {error})") from None


def row_from_plain(row: Mapping[str, Any]) -> TableRow:
    """Read one row back from what `dataclasses.asdict` and JSON made of it."""
    rounds = tuple(RoundPoint(**{**point, "quality": _qualities(point["quality"])}) for point in row["rounds"])
    plain = {"quality": _qualities(row["quality"]), "without": _qualities(row["without"]), "rounds": rounds}
    return TableRow(**{**row, **plain, "notes": tuple(row["notes"])})


def spread_of(values: Sequence[float]) -> Spread:
    """Return mean, least and greatest of at least one value."""
    return Spread(fmean(values), min(values), max(values))


def _summary(rows: Sequence[TableRow]) -> Summary:
    first = rows[0]
    return Summary(
        method=first.method,
        pattern=first.pattern,
        refit=first.refit,
        draws=len(rows),
        sparsity=fmean(row.sparsity for row in rows),
        seconds=fmean(row.seconds for row in rows),
        peak_memory_bytes=max(row.peak_memory_bytes for row in rows),
        quality=_spreads([row.quality for row in rows]),
        without=_spreads([row.without for row in rows]),
    )


def _spreads(found: Sequence[Sequence[Quality]]) -> dict[tuple[str, str], Spread]:
    values: dict[tuple[str, str], list[float]] = {}
    for qualities in found:
        for quality in qualities:
            values.setdefault((quality.data, quality.measure), []).append(quality.sparse)
    return {key: spread_of(each) for key, each in values.items()}


def _listed(spreads: Mapping[tuple[str, str], Spread]) -> list[dict[str, Any]]:
    """Write keys that JSON has no form for as entries."""
    return [{"data": key[0], "measure": key[1], **dataclasses.asdict(value)} for key, value in spreads.items()]


def _qualities(plain: Sequence[Mapping[str, Any]]) -> tuple[Quality, ...]:
    return tuple(Quality(**each) for each in plain)
