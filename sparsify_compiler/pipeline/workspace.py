"""The output folder: built beside its final place and renamed at the end, so that it is whole or absent."""

import os
import shutil
from pathlib import Path

from sparsify_compiler.errors import ExportError


class Workspace:
    """The folder `OUT.partial` while a job runs: `files` becomes OUT, `segments` is what `--resume` reads."""

    def __init__(self, output: Path, overwrite: bool = False, resume: bool = False) -> None:
        """Prepare to write `output`. Nothing is written yet.

        Raises:
            ExportError: `output` exists and `overwrite` was not asked, or is no folder of ours; or a stopped run left
                finished work there, and neither `resume` nor `overwrite` says what is to become of it.
        """
        self.output = output
        whole = Path(os.path.abspath(output))  # "." has no name of its own
        self.root = whole.with_name(whole.name + ".partial")
        self.files = self.root / "files"
        self.segments = self.root / "segments"
        if output.exists() and not overwrite:
            raise ExportError(f"{output} exists; choose another folder, or overwrite it with --overwrite")
        if output.exists() and not output.is_dir():
            raise ExportError(f"{output} is a file; give a folder to write")
        if output.exists() and any(output.iterdir()) and not (output / "report.json").exists():
            raise ExportError(f"{output} holds files that compile did not write; choose another folder")
        if self.has_segments() and not (resume or overwrite):
            raise ExportError(
                f"{self.root} holds the finished segments of a run that was stopped; go on with it with --resume, or "
                "drop them with --overwrite"
            )
        self._kept = resume

    def has_segments(self) -> bool:
        """Say whether finished segments, or a step between them, lie there for `--resume`."""
        return any(self.segments.glob("*.safetensors"))

    def start(self) -> None:
        """Create the partial folder, emptied unless a run is resumed. Raises ExportError."""
        try:
            if not self._kept:
                shutil.rmtree(self.root, ignore_errors=True)
            shutil.rmtree(self.files, ignore_errors=True)
            self.files.mkdir(parents=True)
        except OSError as error:
            raise ExportError(f"cannot create {self.root}: {error.strerror or error}") from None

    def commit(self) -> None:
        """Put `files` in the place of `output` and drop the rest. Raises ExportError."""
        old = self.root / "old"
        try:
            if self.output.exists():
                os.replace(self.output, old)
            os.replace(self.files, self.output)
        except OSError as error:
            if old.exists() and not self.output.exists():
                os.replace(old, self.output)
            raise ExportError(f"cannot rename {self.files} to {self.output}: {error.strerror or error}") from None
        shutil.rmtree(self.root, ignore_errors=True)

    def abandon(self) -> bool:
        """Drop the unfinished files; keep finished segments for a resumed run. Says whether any were kept."""
        shutil.rmtree(self.files, ignore_errors=True)
        if self.has_segments():
            return True
        shutil.rmtree(self.root, ignore_errors=True)
        return False
