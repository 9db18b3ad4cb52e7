"""What was measured once on this machine, kept on disk: verdicts and self-tests, by everything that decides them.

One small JSON file an entry, named by the hash of its key and holding the key in full. Files are replaced atomically,
so that processes may share a folder; one that cannot be read is ignored with a warning and written again.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec
from sparsify_compiler.runtime.machine import driver, processor
from sparsify_compiler.runtime.tuning.cold import last_level_cache
from sparsify_compiler.runtime.tuning.selftest import Case, Outcome
from sparsify_compiler.runtime.tuning.verdicts import Timing, Verdict

RUNTIME = Path(__file__).parents[1]

FORMAT = 1
"""Of the files; one of another format is measured again."""

_LIBRARIES: tuple[str, ...] = ("sparsify-compiler", "torch", "cupy", "triton", "pytorch-triton", "numba", "llvmlite")
_LIBRARIES += ("mkl", "numpy", "nvidia-")
"""How the names of distributions begin that run or compile kernels."""

Key = Mapping[str, Any]
"""Plain JSON values."""


def default_folder() -> Path | None:
    """Return the user's own cache folder: $XDG_CACHE_HOME/sparsify_compiler, else ~/.cache/sparsify_compiler.

    None for a user without a home, as in some containers: then nothing is kept.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(root):
        return Path(root) / "sparsify_compiler"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "sparsify_compiler" if os.path.isabs(home) else None


@dataclass(frozen=True)
class DiskCache:
    """Entries in `folder`, which is made when the first is written."""

    folder: Path

    def verdict(self, key: Key) -> Verdict | None:
        """Return a verdict measured before, its reason saying when, or None. Warns of a file that cannot be read."""
        table = self._read("verdict", key)
        if table is None:
            return None
        try:
            verdict = _verdict(table["entry"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self._warn(self._path("verdict", key), f"it holds no verdict ({error!r})")
            return None
        return dataclasses.replace(verdict, reason=f"{verdict.reason} (measured on {table['date']}, from the cache)")

    def keep_verdict(self, key: Key, verdict: Verdict) -> None:
        """Keep a verdict, unless the machine was busy while it was measured; warns where the disk refuses."""
        if not verdict.busy:
            self._write("verdict", key, dataclasses.asdict(verdict))

    def outcome(self, key: Key) -> Outcome | None:
        """Return what a self-test found before, or None."""
        table = self._read("selftest", key)
        try:
            return None if table is None else _outcome(table["entry"])
        except (KeyError, TypeError) as error:
            self._warn(self._path("selftest", key), f"it holds no outcome ({error!r})")
            return None

    def keep_outcome(self, key: Key, outcome: Outcome) -> None:
        """Keep what a self-test found; warns where the disk refuses."""
        self._write("selftest", key, dataclasses.asdict(outcome))

    def _path(self, kind: str, key: Key) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _read(self, kind: str, key: Key) -> dict[str, Any] | None:
        path = self._path(kind, key)
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self._warn(path, str(error))
            return None
        if not isinstance(table, dict) or not isinstance(table.get("date"), str):
            self._warn(path, "it is no entry of ours")
            return None
        same = table.get("format") == FORMAT and table.get("key") == json.loads(json.dumps(key))
        return table if same else None

    def _write(self, kind: str, key: Key, entry: Mapping[str, Any]) -> None:
        path = self._path(kind, key)
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        table = {"format": FORMAT, "date": date, "key": key, "entry": entry}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A name of its own: processes that write the same entry never see each other's halves.
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as own:
                partial = Path(own) / path.name
                partial.write_text(json.dumps(table, indent=1), encoding="utf-8")
                os.replace(partial, path)
        except OSError as error:
            warnings.warn(
                f"what was measured cannot be kept in {self.folder}: {error.strerror or error}; it will be measured "
                f"again next time; choose another cache folder, or none",
                stacklevel=2,
            )

    def _warn(self, path: Path, why: str) -> None:
        warnings.warn(f"ignoring the cache file {path}: {why}; it is measured and written again", stacklevel=2)


def layer_key(spec: MatmulSpec, bias: bool, activation: Activation | None) -> Key:
    """Return what decides a layer's verdict on one machine: layers of equal keys share it. Densities count to 1 %."""
    return {
        "out": spec.out,
        "in": spec.in_,
        "dtype": str(spec.dtype),
        "pattern": str(spec.pattern),
        "run": spec.run,
        "density": round(spec.density, 2),
        "tokens": list(spec.tokens),
        "bias": bias,
        "activation": activation,
    }


def verdict_key(layer: Key, kernels: Sequence[Kernel], device: torch.device, how: Mapping[str, Any]) -> Key:
    """Return all that decides a verdict: what `layer_key` says, the rivals, and `how` they were measured."""
    return {"layer": layer, "kernels": sorted(k.name for k in kernels), "how": dict(how), **environment(device)}


def outcome_key(case: Case) -> Key:
    """Return all that decides a self-test, but for how long it may take."""
    table = {name: value for name, value in dataclasses.asdict(case).items() if name != "step_seconds"}
    return {"case": table, **environment(torch.device(case.device))}


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the software that a figure depends on, as plain values."""
    here: dict[str, Any] = {"libraries": dict(_libraries()), "sources": sources_hash()}
    here["float32"] = float32_precision()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        here["device"] = [properties.name, properties.major, properties.minor, properties.multi_processor_count]
        here["driver"] = [driver(), torch.version.cuda]
        return here
    here["device"] = [device.type, processor(), last_level_cache(device)]
    here["threads"] = torch.get_num_threads()
    return here


def float32_precision() -> list[str]:
    """Say how exactly PyTorch is asked to multiply float32."""
    try:
        return [torch.get_float32_matmul_precision()]
    except RuntimeError:  # chosen through the newer settings, beside which PyTorch refuses to read the older one
        return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def sources_hash(folder: Path = RUNTIME) -> str:
    """Hash our own sources: another version of a kernel, or of what measures it, is another kernel."""
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            state.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def _libraries() -> tuple[tuple[str, str], ...]:
    """List the versions of ourselves and of the libraries that run or compile kernels."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith(_LIBRARIES):
            found.setdefault(name, distribution.version)  # of two on the path Python imports the first
    return tuple(sorted(found.items()))


def _verdict(table: dict[str, Any]) -> Verdict:
    timings = tuple(Timing(**timing) for timing in table.pop("timings"))
    verdict = Verdict(**table, timings=timings)
    figures = [value for t in timings for value in (t.tokens, t.time_us, t.dense_us, t.spread, t.speedup)]
    words = [verdict.kernel, verdict.reason, verdict.variants, *verdict.refused.values()]
    if not all(isinstance(value, int | float) for value in (*figures, verdict.rounds, *verdict.size_bytes.values())):
        raise TypeError("a figure is no number")
    if not all(isinstance(word, str) for word in words):
        raise TypeError("a word is no text")
    return verdict


def _outcome(table: dict[str, Any]) -> Outcome:
    outcome = Outcome(**table)
    if not isinstance(outcome.refused, str | None) or not isinstance(outcome.uncapturable, str | None):
        raise TypeError("a reason is no text")
    return outcome
