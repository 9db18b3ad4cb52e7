"""Draw progress: bars with elapsed time and time left on a terminal, plain lines in a file or a pipe."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from sparsify_compiler.export.report_rows import duration, printable
from sparsify_compiler.progress import Progress

LINE_SECONDS = 10.0
"""Without a terminal a running stage says where it is this often."""

RATE_SECONDS = 900.0
"""Time left is reckoned from the steps of this long: one step may take half a minute."""


@contextmanager
def draw_progress(console: Console) -> Iterator[Progress]:
    """Yield a `Progress` that draws on `console` until the block ends.

    Calls whose stage begins with the same word are one bar: "calibrate model.layers.3" moves the bar "calibrate".
    """
    if not console.is_terminal:
        yield _Lines(console, time.monotonic)
        return
    columns = (
        TextColumn("{task.fields[stage]}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, refresh_per_second=4, speed_estimate_period=RATE_SECONDS, expand=True) as bars:
        yield _Bars(bars)


@dataclass(frozen=True)
class _Bars:
    bars: Bars
    tasks: dict[str, TaskID] = field(default_factory=dict)

    def __call__(self, stage: str, done: int, total: int) -> None:
        key = stage.partition(" ")[0]
        # a stage that begins anew, such as the perplexity of a second model, is a bar of its own
        if key not in self.tasks or self.bars.tasks[self.tasks[key]].completed > done:
            self.tasks[key] = self.bars.add_task("", total=max(total, 1), stage=printable(stage))
        text = printable(key if done >= total else stage)
        # a stage of no steps is a finished one
        self.bars.update(self.tasks[key], completed=done if total else 1, total=max(total, 1), stage=text)


@dataclass
class _Running:
    key: str
    began: float
    said: float
    first: int
    done: int


@dataclass
class _Lines:
    """One line when a stage begins, ends, or has run for `LINE_SECONDS` since its last line."""

    console: Console
    clock: Callable[[], float]
    running: _Running | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, key = self.clock(), stage.partition(" ")[0]
        running = self.running
        if running is None or running.key != key or done < running.done:
            running = self.running = _Running(key, now, now, done, done)
        elif done < total and now - running.said < LINE_SECONDS:
            return
        running.said, running.done = now, done
        spent = now - running.began
        steps = done - running.first
        left = (
            f", about {duration(spent / steps * (total - done))} left" if steps and done < total and spent >= 1 else ""
        )
        line = f"{printable(stage)}: {done} of {total}, {duration(spent)}{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
