"""Rows of a method table on disk as they are finished, so that an interrupted run can go on."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sparsify_compiler.checkpoint import digest, durable_write
from sparsify_compiler.errors import DataError, ExportError
from sparsify_compiler.export.method_table import TableRow, row_from_plain

ROWS = "rows.jsonl"


class RowLog:
    """The file `rows.jsonl` of `folder`: a line that says which table it is, then a line a row. None: nothing on disk.

    The file is replaced as a whole after every row, so that it is never cut short. `segments` is where a row that is
    not finished keeps what it has.
    """

    def __init__(self, folder: Path | None, resume: bool = False) -> None:
        """Prepare. Nothing is written yet.

        Raises:
            ExportError: the folder holds rows already and `resume` was not asked, or is a file.
        """
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ExportError(f"{folder} is a file; give a folder to write")
        if folder is not None and (folder / ROWS).exists() and not resume:
            raise ExportError(f"{folder / ROWS} exists; add --resume to go on with it, or choose another folder")
        self._folder = folder
        self._lines: list[str] = []
        self._rows: dict[str, TableRow] = {}
        self._asked: set[str] = set()

    def open(self, identity: str) -> None:
        """Read the rows that were finished before; `identity` stands for what all rows have in common.

        Raises:
            DataError: the rows are of another model, held-out data, machine or library version, or damaged.
            ExportError: the folder cannot be made.
        """
        self._lines = [json.dumps({"table": identity})]
        if self._folder is None:
            return
        path = self._folder / ROWS
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"cannot create {self._folder}: {error.strerror or error}") from None
        if not path.exists():
            return
        head, *rest = path.read_text(encoding="utf-8").splitlines() or [""]
        if head != self._lines[0]:
            raise DataError(
                f"--resume: {path} was started with another model, held-out data, machine or library version; "
                "choose another folder"
            )
        try:
            for line in rest:
                entry = json.loads(line)
                self._rows[entry["key"]] = row_from_plain(entry["row"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); choose another folder") from None
        self._lines += rest

    def row(self, key: str, make: Callable[[], TableRow]) -> TableRow:
        """Return the row of `key`: the finished one, else what `make` returns, which is written down."""
        self._asked.add(key)
        if key not in self._rows:
            row = self._rows[key] = make()
            self._lines.append(json.dumps({"key": key, "row": dataclasses.asdict(row)}))
            if self._folder is not None:
                durable_write(self._folder / ROWS, "".join(f"{line}\n" for line in self._lines).encode())
        if (unfinished := self.segments(key)) is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
            with suppress(OSError):  # others are not finished
                unfinished.parent.rmdir()
        return self._rows[key]

    def find(self, key: str) -> TableRow | None:
        """Return the row of `key` where it is finished."""
        self._asked.add(key)
        return self._rows.get(key)

    def unasked(self) -> int:
        """Count the finished rows that nobody has asked for."""
        return len(self._rows.keys() - self._asked)

    def segments(self, key: str) -> Path | None:
        """Return the folder in which the row of `key` keeps what a resumed run of it goes on from; None on no disk."""
        return self._folder / "unfinished" / digest((key,))[:16] if self._folder is not None else None
