"""Time whole models the ways they are used: one call or one decoding step, eager, captured, compiled; sizes swept."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

import torch
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, call_arguments, named_tensors, to_device
from sparsify_compiler.errors import DataError, ModelError, first_line
from sparsify_compiler.frontends.torch_trace import inference
from sparsify_compiler.pipeline.forwards import forward_of
from sparsify_compiler.runtime.benchmark.models import BenchRow, Measured, compare, module_bytes
from sparsify_compiler.runtime.benchmark.report import BenchReport
from sparsify_compiler.runtime.graphs import graphed
from sparsify_compiler.runtime.machine import describe_machine
from sparsify_compiler.sources.models import Source

WARMUP = 3

Ways = Sequence[tuple[str, Callable[[], object]]]


@dataclass(frozen=True)
class Case:
    """One comparison: every model on `batch`, or (`decode`) one token more after it. `name` says it in words."""

    name: str
    batch: Batch
    decode: bool = False

    def tokens(self) -> int | None:
        """Count the tokens one call reads or makes, None where no input looks like token ids."""
        ids = token_ids(self.batch)
        return None if ids is None else ids.shape[0] if self.decode else ids.numel()


@dataclass(frozen=True)
class Bencher:
    """Times `sources` (labels and models) on `device` over `repeats` rounds; `compiled` adds torch.compile."""

    sources: Mapping[str, Source]
    device: torch.device
    repeats: int = 20
    compiled: bool = False

    def compare(self, case: Case) -> tuple[tuple[BenchRow, ...], tuple[str, ...]]:
        """Return one row a way of running each model, and a note for each way that does not work here.

        The base of every ratio is the fastest way of the first model.

        Raises:
            DataError: no model can run this case.
        """
        ways: list[tuple[str, Callable[[], object]]] = []
        notes: list[str] = []
        bases: list[str] = []
        peaks: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for label, source in self.sources.items():
            found, why = self._ways(label, source, case)
            ways += found
            notes += why
            bases = bases or [name for name, _ in found]
            sizes |= dict.fromkeys((name for name, _ in found), size_bytes(source))
            peaks |= {name: peak for name, call in found if (peak := self._peak(call, source)) is not None}
        if not ways:
            raise DataError(f"nothing to time for {case.name!r}: {'; '.join(notes)}")
        known = {name: size for name, size in sizes.items() if size}
        measured = Measured(peaks, known, case.name, case.tokens())
        rows = compare(ways, self.repeats, WARMUP, device=self.device, measured=measured, bases=bases)
        return rows, tuple(notes)

    def _ways(self, label: str, source: Source, case: Case) -> tuple[Ways, list[str]]:
        """Return the calls of one model by label, and why others are missing."""
        if case.decode and source.kind == "onnx":
            return (), [f"{label}: decoding is timed for torch models; export with --kv-cache and time the file itself"]
        notes: list[str] = []
        try:
            calls = self._calls(label, source, case)
        except (ModelError, DataError) as error:
            return (), [f"{label}: {error}"]
        ways = []
        for name, call in calls.items():
            ways.append((name, call))
            if self.device.type == "cuda" and source.kind != "onnx":
                try:
                    ways.append((f"{name}, CUDA graph", graphed(call, self.device)))
                except RuntimeError as error:
                    notes.append(f"{name}: no CUDA graph: {first_line(error)}")
        return ways, notes

    def _calls(self, label: str, source: Source, case: Case) -> dict[str, Callable[[], object]]:
        """Return the plain call of a model, and the compiled one where that was asked for."""
        batch = to_device(case.batch, self.device)
        if source.kind == "onnx":
            return {label: partial(forward_of(source, self.device), batch)}
        module = source.program.module() if source.program is not None else source.module
        if module is None:
            raise ModelError(f"model {source.reference!r}: the source holds no module")
        module.to(self.device)
        modules: dict[str, Callable[..., object]] = {label: module}
        if self.compiled:
            modules[f"{label}, torch.compile"] = torch.compile(module)
        if case.decode:
            # the rounds of `compare`, those of a capture, and room for torch.compile to look twice
            calls = 2 * (self.repeats + WARMUP) + 16
            return {name: decode_step(module, run, batch, calls) for name, run in modules.items()}
        args, kwargs = call_arguments(module, batch)
        return {name: _quietly(module, partial(run, *args, **kwargs)) for name, run in modules.items()}

    def _peak(self, call: Callable[[], object], source: Source) -> int | None:
        """Return the bytes one call needs at its peak, the model's own included; None where it cannot be told."""
        if self.device.type != "cuda" or source.module is None:
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before + module_bytes(source.module)


def bench_sources(
    sources: Sequence[Source], found: Sequence[Case], device: torch.device, repeats: int, compiled: bool
) -> BenchReport:
    """Time every case on every source, and say on what machine.

    Raises:
        DataError: a case that no model can run.
    """
    bencher = Bencher(_labelled(sources), device, repeats, compiled)
    rows: list[BenchRow] = []
    notes: list[str] = []
    for case in found:
        timed, why = bencher.compare(case)
        rows += timed
        notes += why
    inputs = "; ".join(case.name for case in found)
    return BenchReport(describe_machine(device), inputs, None, tuple(rows), (), tuple(dict.fromkeys(notes)))


def _labelled(sources: Sequence[Source]) -> dict[str, Source]:
    """Name every source by the last part of its path, by the whole path where that says more, by number where not."""
    names = [source.reference for source in sources]
    short = [PurePath(name).name or name for name in names]
    labels: dict[str, Source] = {}
    for number, source in enumerate(sources):
        label = short[number] if short.count(short[number]) == 1 else names[number]
        labels[f"{label} ({number + 1})" if label in labels else label] = source
    return labels


def decode_step(module: nn.Module, run: Callable[..., object], batch: Batch, calls: int) -> Callable[[], object]:
    """Read `batch` into a static cache with room for `calls` more tokens; return the call that makes one more.

    `run` is the module itself, or what torch.compile made of it.

    Raises:
        ModelError: the module is no causal language model of transformers, or refuses a static cache.
    """
    ids = token_ids(batch)
    config = getattr(module, "config", None)
    if config is None or not hasattr(module, "generate") or ids is None:
        raise ModelError(
            f"{type(module).__name__} cannot be timed one token at a time: that needs a causal language model of "
            f"transformers and a batch of token ids (samples, tokens)"
        )
    transformers = importlib.import_module("transformers")
    try:
        cache = transformers.StaticCache(config=config, max_cache_len=ids.shape[1] + calls)
        _quietly(module, partial(module, input_ids=ids, past_key_values=cache, use_cache=True))()
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{type(module).__name__} cannot decode with a static cache: {type(error).__name__}: {error}"
        ) from None
    token = ids[:, -1:].clone()
    return _quietly(module, partial(run, input_ids=token, past_key_values=cache, use_cache=True))


def token_ids(batch: Batch) -> Tensor | None:
    """Return the first input if it looks like token ids: whole numbers (samples, tokens)."""
    first = next((tensor for _, tensor in named_tensors(batch)), None)
    return first if first is not None and first.ndim == 2 and not first.is_floating_point() else None


def resized(batch: Batch, samples: int | None, length: int | None) -> Batch:
    """Repeat or cut a batch to `samples` samples and its whole-number inputs (samples, tokens) to `length` tokens."""

    def fit(tensor: Tensor) -> Tensor:
        if samples is not None and tensor.ndim:
            tensor = tensor[torch.arange(samples, device=tensor.device) % tensor.shape[0]]
        if length is not None and tensor.ndim == 2 and not tensor.is_floating_point():
            tensor = tensor[:, torch.arange(length, device=tensor.device) % tensor.shape[1]]
        return tensor

    if isinstance(batch, dict):
        return {name: fit(tensor) for name, tensor in batch.items()}
    return tuple(fit(tensor) for tensor in batch) if isinstance(batch, tuple) else fit(batch)


def cases(batch: Batch, samples: Sequence[int], lengths: Sequence[int], decode: bool) -> Iterator[Case]:
    """Yield the cases of a sweep: every number of samples with every length (none given: as the batch is)."""
    for count in samples or (None,):
        for length in lengths or (None,):
            sized = resized(batch, count, length)
            name = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named_tensors(sized))
            if (ids := token_ids(sized)) is not None:
                name = f"batch {ids.shape[0]}, {ids.shape[1]} tokens"
            yield Case(name, sized)
            if decode:
                yield Case(f"{name}, then one token", sized, decode=True)


def _quietly(module: nn.Module, call: Callable[[], object]) -> Callable[[], object]:
    """Return `call` without gradients and, where the module is in training mode, in evaluation mode."""
    training = any(part.training for part in module.modules())

    def quiet() -> object:
        with inference(module) if training else torch.no_grad():
            return call()

    return quiet


def size_bytes(source: Source) -> int:
    """Return the bytes of a model's weights on disk; 0 where it has no file."""
    if source.path is None:
        return 0
    files = [source.path] if source.path.is_file() else source.path.glob("model*.safetensors")
    return sum(file.stat().st_size for file in files)
