"""Everything one run of the benchmark found, as one value that is written to JSON and read back."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify_compiler.errors import DataError
from sparsify_compiler.runtime.benchmark.ceilings import Ceilings
from sparsify_compiler.runtime.benchmark.layers import LayerBench, LayerRow
from sparsify_compiler.runtime.benchmark.models import BenchRow

FORMAT = 2
"""Files of format 1 were the bare list of rows; they are still read."""


@dataclass(frozen=True)
class BenchReport:
    """Rows of whole models, rows of single layers, and what they were measured on.

    `machine` is what `describe_machine` found, `inputs` says in words what the models were run on, `notes` what could
    not be measured and why.
    """

    machine: tuple[tuple[str, str], ...] = ()
    inputs: str = ""
    ceilings: Ceilings | None = None
    rows: tuple[BenchRow, ...] = ()
    layers: tuple[LayerBench, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Write every number; `bench_report_from_json` is the inverse."""
        rows = [dataclasses.asdict(row) | {"tokens_per_s": row.tokens_per_s} for row in self.rows]
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self), "rows": rows}, indent=1)


def bench_report_from_json(text: str) -> BenchReport:
    """Read what `BenchReport.to_json` wrote, or the list of rows of an older version.

    Raises:
        DataError: the text is neither, or of a newer format.
    """
    try:
        found = json.loads(text)
        if isinstance(found, list):
            return BenchReport(rows=tuple(BenchRow(**row) for row in found))
        if found["format"] > FORMAT:
            raise DataError(f"benchmark file of format {found['format']}; this version reads up to {FORMAT}; update")
        return BenchReport(
            machine=tuple((name, value) for name, value in found["machine"]),
            inputs=found["inputs"],
            ceilings=Ceilings(**found["ceilings"]) if found["ceilings"] else None,
            rows=tuple(BenchRow(**_without(row, "tokens_per_s")) for row in found["rows"]),
            layers=tuple(_layer(layer) for layer in found["layers"]),
            notes=tuple(found["notes"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"not a benchmark file of this program ({type(error).__name__}: {error})") from None


def _layer(found: Mapping[str, Any]) -> LayerBench:
    rows = tuple(LayerRow(**{**row, "shape": tuple(row["shape"])}) for row in found["rows"])
    return LayerBench(rows, found["chosen"], found["reason"], tuple((a, b) for a, b in found["refused"]))


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}
