"""Turn failures into one clear sentence and an exit status: 2 the user can act, 130 interrupted, 1 our own bug."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import typer
from rich.console import Console
from rich.text import Text

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.export.report_rows import printable

BAD_INPUT = 2
INTERRUPTED = 130


@contextmanager
def guard(debug: bool, interrupted: Callable[[], str] = str) -> Iterator[None]:
    """Run a verb. `interrupted` says, after Ctrl-C, how to go on; `debug` puts the traceback before the sentence.

    A failing disk or no memory left are the user's to act on, as `SparsifyError` is. Everything else passes through.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (SparsifyError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exception(error)
        _say(f"error: {sentence(error)}")
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as error:
        if debug:
            traceback.print_exception(error)
        _say("; ".join(filter(None, ("interrupted", interrupted()))))
        raise typer.Exit(INTERRUPTED) from None


def sentence(error: SparsifyError | OSError | MemoryError) -> str:
    """Write an error as one line: what was asked, what was found, what to do."""
    if isinstance(error, SparsifyError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "out of memory; lower --batch-size, --sequence-length or --windows, or choose a smaller model"
    where = f" {str(error.filename)!r}" if error.filename is not None else ""
    return f"cannot read or write{where}: {error.strerror or error}; check the path, the rights and the free space"


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line that this is our bug; an excepthook for runs without --debug. Python then exits with 1."""
    first = next(iter(str(error).splitlines()), "")
    _say(f"internal error: {kind.__name__}{f': {first}' if first else ''}; run again with --debug for the traceback")


def install_bug_report(arguments: list[str]) -> None:
    """Draw unexpected errors with `report_bug`, unless `arguments` hold --debug."""
    if "--debug" not in arguments:
        sys.excepthook = report_bug


def _say(text: str) -> None:
    style = "bold red" if text.startswith(("error", "internal error")) else "yellow"
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(printable(text), style=style))
