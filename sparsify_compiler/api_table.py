"""The public function that sets pruning methods side by side on one model: `method_table`."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import nn

from sparsify_compiler.api import Model, open_source
from sparsify_compiler.batches import Batch, named_tensors
from sparsify_compiler.errors import DataError, ExportError, ModelError
from sparsify_compiler.export.method_table import MethodTable
from sparsify_compiler.export.method_table_html import method_table_html
from sparsify_compiler.pipeline.method_table import Draw, Subject, run_method_table
from sparsify_compiler.pipeline.method_table_log import RowLog
from sparsify_compiler.pipeline.method_trials import Trial, method_trials, recipe_trial
from sparsify_compiler.pipeline.options import Options, check_share
from sparsify_compiler.pipeline.quality import Heldout
from sparsify_compiler.precision import Precision
from sparsify_compiler.progress import Progress, silent

__all__ = ["Draw", "MethodTable", "Trial", "method_table", "method_trials", "recipe_trial"]


def method_table(
    model: Model,
    draws: Sequence[Draw],
    heldout: Mapping[str, Heldout],
    trials: Sequence[Trial],
    *,
    output: Path | None = None,
    resume: bool = False,
    share_batches: bool = False,
    precision: Precision = "float32",
    device: str = "auto",
    progress: Progress = silent,
    trust: bool = False,
) -> MethodTable:
    """Prune `model` by every trial on every draw of calibration data and measure each on every held-out set.

    Nothing is lowered or exported, and the model stays as it is. `method_trials` makes trials of methods by patterns,
    `recipe_trial` one of a whole recipe. Rows go to `output`/rows.jsonl as they are finished, with `resume` those that
    are there are kept; in the end table.json and table.html are written beside them. Rounds are compared on calibration
    batches, kept aside where there are several, never on the held-out sets; `share_batches` gives every round all of
    its draw. Products of every model run in `precision`, while it is pruned and while it is measured.

    Raises:
        SparsifyError: anything the user can act on. Finished rows stay for `resume`.
    """
    check_share(share_batches, (trial.recipe for trial in trials))
    _check_draws(draws)
    log = RowLog(output, resume)
    source = open_source(model, trust)
    found = source.program if source.program is not None else source.module
    if found is None:
        raise ModelError(
            f"model {source.reference!r}: a method table prunes torch models; give the model that the file was made of"
        )
    options = Options(device=device, share_batches=share_batches, resume=resume, precision=precision)
    if isinstance(found, nn.Module) and source.kind != "module":
        found.to(options.torch_device())  # read here, so nobody else's
    table = run_method_table(Subject(source.reference, found, heldout), trials, draws, options, log, progress)
    if output is not None:
        _write(table, output)
    return table


def _check_draws(draws: Sequence[Draw]) -> None:
    """Refuse draws of the same data: their spread would be none, whatever the data does. Raises DataError."""
    for first, second in combinations(range(len(draws)), 2):
        one, other = draws[first].batches, draws[second].batches
        if len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True)):
            raise DataError(
                f"draw {second} of the calibration data is the same as draw {first} ({draws[second].description}), so "
                "that their spread would say nothing; give more data, or ask for one draw (--draws 1)"
            )


def _same(one: Batch, other: Batch) -> bool:
    first, second = dict(named_tensors(one)), dict(named_tensors(other))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _write(table: MethodTable, output: Path) -> None:
    try:
        (output / "table.json").write_text(table.to_json(), encoding="utf-8")
        (output / "table.html").write_text(method_table_html(table), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write to {output}: {error.strerror or error}") from None
