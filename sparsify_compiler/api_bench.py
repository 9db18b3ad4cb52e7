"""The public functions that time things: models, single layers, a decoder of real size."""

from collections.abc import Sequence
from pathlib import Path

from sparsify_compiler.api import Model, open_source, random_batches
from sparsify_compiler.batches import Batch
from sparsify_compiler.errors import DataError
from sparsify_compiler.export.torch import read_artefact
from sparsify_compiler.pattern import Pattern
from sparsify_compiler.pipeline.bench_random import (
    DecodeChoice,
    RandomLayers,
    bench_pruned_sites,
    bench_random_decoder,
    bench_random_layers,
)
from sparsify_compiler.pipeline.benching import bench_sources, cases
from sparsify_compiler.pipeline.kernel_survey import Survey, survey
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.runtime.benchmark.report import BenchReport
from sparsify_compiler.runtime.tuning.selftest import SelfTest
from sparsify_compiler.sources.models import Source

__all__ = ["BenchReport", "DecodeChoice", "RandomLayers", "bench", "bench_decoder", "bench_layers"]
__all__ += ["bench_sites", "survey_kernels"]


def bench(
    models: Sequence[Model],
    batch: Batch | None = None,
    *,
    samples: Sequence[int] = (),
    lengths: Sequence[int] = (),
    decode: bool = False,
    compiled: bool = False,
    repeats: int = 20,
    device: str = "auto",
    seed: int = 0,
    trust: bool = False,
) -> BenchReport:
    """Time `models` on `batch` (or generated inputs) in one run, rounds interleaved, against the first's fastest way.

    `samples` and `lengths` sweep the batch's sizes, `decode` adds one-token steps of language models, `compiled`
    torch.compile. On CUDA every way is timed with and without a CUDA graph.

    Raises:
        SparsifyError: a model cannot be read, or cannot take the batch.
    """
    where = Options(device=device).torch_device()
    sources = [open_source(model, trust) for model in models]
    _check_lengths(sources, lengths)
    example = batch if batch is not None else random_batches(sources[0], seed, where)[0]
    found = [*cases(example, samples, lengths, decode)]
    return bench_sources(sources, found, where, repeats, compiled)


def _check_lengths(sources: Sequence[Source], lengths: Sequence[int]) -> None:
    """Refuse a sequence longer than a model has positions for, where it says how many. Raises DataError."""
    for source in sources:
        config = getattr(source.module, "config", None)
        most = source.max_positions or getattr(config, "max_position_embeddings", None)
        if lengths and isinstance(most, int) and max(lengths) > most:
            raise DataError(
                f"sequences of {max(lengths)} tokens for {source.reference!r}: its config says max_position_embeddings "
                f"{most}; ask for at most {most}"
            )


def bench_layers(asked: RandomLayers, *, device: str = "auto", progress: Progress = silent) -> BenchReport:
    """Time every kernel on random weights pruned to patterns, beside dense and what the machine could do at most.

    Raises:
        SparsifyError: a pattern does not fit a shape, or needs a sparsity.
    """
    with SelfTest() as tester:
        return bench_random_layers(asked, Options(device=device).torch_device(), tester, progress)


def bench_sites(
    folder: Path | str, tokens: Sequence[int] = (1, 16, 512), *, device: str = "auto", progress: Progress = silent
) -> BenchReport:
    """Time every kernel on the distinct pruned layers of a folder that `compile` wrote.

    Raises:
        SparsifyError: not such a folder, or nothing in it was pruned.
    """
    artefact = read_artefact(Path(folder))
    with SelfTest() as tester:
        return bench_pruned_sites(artefact, tuple(tokens), Options(device=device).torch_device(), tester, progress)


def bench_decoder(
    config: str, pattern: Pattern, choice: DecodeChoice | None = None, progress: Progress = silent
) -> BenchReport:
    """Time a decoder of `config` (a name such as "llama-3-8b", or a config.json) with random weights, token by token.

    Raises:
        SparsifyError: no such config, or the models do not fit the device.
    """
    choice = choice or DecodeChoice()
    with SelfTest() as tester:
        device = Options(device=choice.device).torch_device()
        return bench_random_decoder(config, pattern, choice, device, tester, progress)


def survey_kernels(device: str = "auto", *, selftest: bool = True, progress: Progress = silent) -> Survey:
    """Ask every kernel what it runs on this machine; `selftest` tries each against float64 in a process of its own.

    Raises:
        SparsifyError: there is no such device.
    """
    where = Options(device=device).torch_device()
    if not selftest:
        return survey(where, progress=progress)
    with SelfTest() as tester:
        return survey(where, tester, progress=progress)
