"""How long jobs tell their caller where they are, without knowing who draws it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total), for example ("calibrate model.layers.3", 12, 30)."""


def silent(stage: str, done: int, total: int) -> None:
    """Draw nothing."""
