"""Finished segments on disk, so that a killed run can go on where it was.

The folder holds one safetensors file a segment (of every round, where there are several) and `manifest.json`, which
names the finished ones. The manifest is replaced atomically after the segment's file is durable, so at any moment it
names only whole files.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify_compiler.errors import DataError, ExportError

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class SavedSite:
    """One finished site: its weight (groups, out, in) float32, keep mask likewise, and what the report says of it."""

    weight: Tensor
    keep: Tensor
    record: Mapping[str, Any]


class Checkpoint:
    """Read and write the finished segments of one run, identified by `fingerprint`."""

    def __init__(self, folder: Path, fingerprint: str, resume: bool) -> None:
        """Open or create `folder`.

        Raises:
            DataError: `resume` was asked and the folder belongs to another run (model, data, recipe or versions).
        """
        self.folder = folder
        self._finished: dict[str, str] = {}
        self._round = ""
        self._fingerprint = fingerprint
        manifest = folder / MANIFEST
        if resume and manifest.exists():
            try:
                table = json.loads(manifest.read_text())
            except ValueError as error:
                raise DataError(f"{manifest} is damaged ({error}); delete {folder} and start again") from None
            if table.get("version") != VERSION or table.get("fingerprint") != fingerprint:
                raise DataError(
                    f"--resume: {folder} was started with another model, data, recipe or library version; "
                    "delete that folder, or compile with --overwrite instead of --resume"
                )
            self._finished = table["segments"]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest()

    def of_round(self, number: int) -> "Checkpoint":
        """Return the checkpoint of round `number` of the same run, from 1; the first round's is this one itself."""
        if number == 1:
            return self
        other = copy(self)  # one table of finished segments between them, so that the manifest names them all
        other._round = f"round-{number}-"
        return other

    def finished(self) -> frozenset[int]:
        """Return the finished segments of this round."""
        keys = (key.removeprefix(self._round) for key in self._finished if key.startswith(self._round))
        return frozenset(int(key) for key in keys if key.isdigit())  # the first round's keys are plain numbers

    def read(self, segment: int) -> dict[str, SavedSite] | None:
        """Return the sites of a finished segment by name, or None where it is not finished."""
        name = self._finished.get(f"{self._round}{segment}")
        if name is None:
            return None
        tensors, metadata = self._load(name)
        records = json.loads(metadata["records"])
        return {
            site: SavedSite(tensors[f"{site}.weight"], tensors[f"{site}.keep"].bool(), record)
            for site, record in records.items()
        }

    def write(self, segment: int, sites: Mapping[str, SavedSite]) -> None:
        """Record a finished segment. Raises ExportError where the disk is full."""
        tensors: dict[str, Tensor] = {}
        for name, site in sites.items():
            tensors[f"{name}.weight"] = site.weight.contiguous()
            tensors[f"{name}.keep"] = site.keep.to(torch.uint8).contiguous()
        records = json.dumps({name: dict(site.record) for name, site in sites.items()})
        name = f"segment-{self._round}{segment:04d}.safetensors"
        durable_save(self.folder / name, tensors, {"records": records})
        self._finished[f"{self._round}{segment}"] = name
        self._write_manifest()

    def read_state(self, word: str) -> tuple[dict[str, Tensor], Mapping[str, Any]] | None:
        """Return the tensors and the record that `write_state` was last given for `word`, or None."""
        name = self._finished.get(word)
        if name is None:
            return None
        tensors, metadata = self._load(name)
        return tensors, json.loads(metadata["record"])

    def write_state(self, word: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Record how far the step `word` is, in the place of what was there. Raises ExportError where disks are full.

        Tensors lie on the host and share no memory; `record` is what JSON can hold.
        """
        name = f"{word}.safetensors"
        durable_save(self.folder / name, tensors, {"record": json.dumps(record)})
        if word not in self._finished:
            self._finished[word] = name
            self._write_manifest()

    def _load(self, name: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
        """Read a file that the manifest names. Raises DataError."""
        try:
            with safe_open(self.folder / name, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(
                f"{self.folder / name} is damaged ({error}); delete {self.folder} and start again"
            ) from None

    def _write_manifest(self) -> None:
        table = {"version": VERSION, "fingerprint": self._fingerprint, "segments": self._finished}
        durable_write(self.folder / MANIFEST, json.dumps(table, indent=1).encode())


def durable_write(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or absent, also after a power cut. Raises ExportError."""
    with _whole(path) as temporary:
        temporary.write_bytes(data)


def durable_save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as `durable_write` does, without a copy of it in memory."""
    with _whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, which is put in the place of `path` when it is durable."""
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free some space or choose another disk"
        ) from None


def digest(parts: Iterable[object]) -> str:
    """Hash tensors, bytes and printable values, taken one at a time, into a fingerprint."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            tensor = part.detach().cpu().contiguous()
            state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            if tensor.numel():
                state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            state.update(part if isinstance(part, bytes) else repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()
