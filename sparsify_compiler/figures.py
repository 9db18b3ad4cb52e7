"""Draw with matplotlib, which is optional, and save the drawing."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsify_compiler.errors import DataError


@contextmanager
def saved_figure(path: Path, inches: tuple[float, float]) -> Iterator[Any]:
    """Give an empty figure of `inches` (width, height) to draw on, and save it to `path` when the block ends.

    Raises:
        DataError: matplotlib is not installed, or the disk refused.
    """
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise DataError(
            f"cannot plot {path.name}: matplotlib is not installed; pip install 'sparsify-compiler[plot]'"
        ) from None
    # A Figure of its own, not pyplot: pyplot keeps global state and may look for a display.
    figure = figure_module.Figure(figsize=inches, layout="constrained")
    yield figure
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"cannot write the plot {path}: {error.strerror}; choose another place") from None
