"""Tokens per second of a decoder of real size, dense against sparse, with random weights pruned to a pattern."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import KernelError, ModelError, first_line
from sparsify_compiler.kernel import MatmulSpec, Packed
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.runtime.benchmark.decoder import Decoder, DecoderConfig
from sparsify_compiler.runtime.benchmark.layers import random_layer
from sparsify_compiler.runtime.benchmark.models import BenchRow, Measured, compare, module_bytes
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.graphs import graphed
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.layers.modules import SparseLinear
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.tuning.tune import Verdict

MARGIN = 1.1
"""Memory asked for beyond the weights and caches that can be counted beforehand."""


@dataclass(frozen=True)
class DecodeCase:
    """What to decode: `layers` of `config` (None: all of them), `batch` sequences, caches of `context` tokens."""

    config: DecoderConfig
    pattern: Pattern
    sparsity: float | None
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    context: int = 512
    layers: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class DecodeBench:
    """The rows, dense ways first; the verdict of each distinct linear layer; what could not be run and why."""

    rows: tuple[BenchRow, ...]
    verdicts: tuple[tuple[str, Verdict], ...]
    notes: tuple[str, ...]


def bench_decode(
    case: DecodeCase,
    tune_one: Callable[[Packed, MatmulSpec], Verdict],
    repeats: int = 20,
    compiled: bool = False,
    progress: Progress = silent,
) -> DecodeBench:
    """Build the decoder dense and sparse, layer by layer, and time one decoding step of each in the same rounds.

    Every linear layer runs the kernel that `tune_one` chose for its shape (dense where dense won; the head is always
    dense). Eager, inside a CUDA graph (on CUDA) and, with `compiled`, after torch.compile; the base is the fastest
    dense way. The first layer's products are checked against float64.

    Raises:
        ModelError: the two models do not fit the device's free memory together.
        KernelError: a sparse layer gives a wrong result.
    """
    config = case.config if case.layers is None else replace(case.config, layers=case.layers)
    _check_memory(config, case)
    verdicts: dict[str, Verdict] = {}
    for name, shape in config.shapes().items():
        packed = random_layer(shape, case.pattern, case.sparsity, case.dtype, case.device, case.seed)
        progress("tune", len(verdicts), len(config.shapes()))
        verdicts[name] = tune_one(packed, spec_for(packed, (case.batch,), case.device))
        _check(_sparse_linear(packed, verdicts[name], case.batch), packed, case)
    embedding, head = (_random((config.vocabulary, config.hidden), case, seed) for seed in (1, 2))

    def dense_linear(layer: int, name: str, shape: tuple[int, int]) -> nn.Module:
        return _dense_linear(shape, case, layer)

    def sparse_linear(layer: int, name: str, shape: tuple[int, int]) -> nn.Module:
        progress("build", layer, config.layers)
        packed = random_layer(shape, case.pattern, case.sparsity, case.dtype, case.device, layer)
        return _sparse_linear(packed, verdicts[name], case.batch)

    dense = Decoder(config, dense_linear, embedding, head, case.batch, case.context)
    sparse = Decoder(config, sparse_linear, embedding, head, case.batch, case.context)
    ways, notes = _ways((("dense", dense), ("sparse", sparse)), case, compiled)
    sizes = {label: module_bytes(sparse if label.startswith("sparse") else dense) for label, _ in ways}
    words = f"decode, batch {case.batch}, context {case.context}, {config.layers} layers"
    rows = compare(
        ways,
        repeats,
        device=case.device,
        measured=Measured(size_bytes=sizes, case=words, tokens=case.batch),
        bases=[label for label, _ in ways if label.startswith("dense")],
    )
    return DecodeBench(rows, tuple(verdicts.items()), notes)


def _ways(
    models: Sequence[tuple[str, Decoder]], case: DecodeCase, compiled: bool
) -> tuple[list[tuple[str, Callable[[], object]]], tuple[str, ...]]:
    """Return every way to run each model that works here, and a note for each that does not."""
    tokens = torch.zeros(case.batch, dtype=torch.long, device=case.device)
    position = torch.full((1,), case.context - 1, dtype=torch.long, device=case.device)
    ways: list[tuple[str, Callable[[], object]]] = []
    notes = []
    for label, model in models:
        calls = {label: _step(model, tokens, position)}
        if compiled:
            calls[f"{label}, torch.compile"] = _step(torch.compile(model), tokens, position)
        for name, call in calls.items():
            ways.append((name, call))
            if case.device.type == "cuda":
                try:
                    ways.append((f"{name}, CUDA graph", graphed(call, case.device)))
                except RuntimeError as error:
                    notes.append(f"{name}: no CUDA graph: {first_line(error)}")
    return ways, tuple(notes)


def _step(model: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, position: Tensor) -> Callable[[], object]:
    def step() -> Tensor:
        with torch.no_grad():
            return model(tokens, position).argmax(dim=-1)

    return step


def _sparse_linear(packed: Packed, verdict: Verdict, batch: int) -> nn.Module:
    if verdict.kernel == "dense":
        linear = nn.Linear(packed.shape[1], packed.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(unpack(packed), requires_grad=False)
        return linear
    return SparseLinear(packed, None, verdict.kernel, (batch,), verdict.variants, offload=True)


def _dense_linear(shape: tuple[int, int], case: DecodeCase, seed: int) -> nn.Module:
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(_random(shape, case, seed), requires_grad=False)
    return linear


def _random(shape: tuple[int, int], case: DecodeCase, seed: int) -> Tensor:
    generator = torch.Generator(case.device).manual_seed(case.seed + seed)
    weight = torch.empty(shape, dtype=case.dtype, device=case.device)
    return weight.normal_(0.0, shape[1] ** -0.5, generator=generator)


def _check(module: nn.Module, packed: Packed, case: DecodeCase) -> None:
    x = torch.randn(case.batch, packed.shape[1], device=case.device).to(case.dtype)
    with torch.no_grad():
        wrong = difference(module(x), x, unpack(packed))
    if wrong:
        raise KernelError(f"the sparse layer {packed.shape} {packed.pattern} is wrong: {wrong}; nothing was measured")


def _check_memory(config: DecoderConfig, case: DecodeCase) -> None:
    if case.device.type != "cuda":
        return
    per_layer = sum(out * in_ for out, in_ in config.shapes().values())
    caches = 2 * case.batch * case.context * config.kv_heads * config.head_dim
    entries = 2 * config.layers * (per_layer + caches) + 2 * config.vocabulary * config.hidden
    needed = round(MARGIN * entries * case.dtype.itemsize)
    free = torch.cuda.mem_get_info(case.device)[0]
    if needed > free:
        fits = int(config.layers * free / needed)
        raise ModelError(
            f"a dense and a sparse decoder of {config.layers} layers need up to {needed / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free on {case.device}; measure fewer layers (about {fits} fit)"
        )
