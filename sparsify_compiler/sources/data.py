"""Read a DATA reference into batches: text, sentences, arrays, images or a factory; or generate inputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, LazyBatches, named_tensors, sample_count
from sparsify_compiler.errors import DataError
from sparsify_compiler.evaluate_pairs import SentencePairs
from sparsify_compiler.sources.generated import generated_batches
from sparsify_compiler.sources.given import checked, split_labels
from sparsify_compiler.sources.images import ImageSet, Preprocess, array_images, read_images
from sparsify_compiler.sources.images import stack as stack_images
from sparsify_compiler.sources.models import FACTORY, Source, call_factory, import_attribute
from sparsify_compiler.sources.sentences import CALIBRATION_SENTENCES, read_pairs, read_sentences, tokenise
from sparsify_compiler.sources.tensors import (
    LABELS,
    Choice,
    Draw,
    as_batch,
    check_token_ids,
    first_input,
    fit_tensors,
    read_arrays,
)
from sparsify_compiler.sources.tensors import stack as stack_tensors
from sparsify_compiler.sources.text import framed, text_windows

IMAGES_A_BATCH = 32
CALIBRATION_WINDOWS = 128


@dataclass(frozen=True)
class Data:
    """Batches that can be read any number of times. `labels` is one int64 (samples,) per batch, or None.

    `samples` counts windows, sentences, rows or images; `description` says in words what they are, for the report.
    `pairs` are the scored pairs among sentences, None where there are none.
    """

    batches: Sequence[Batch]
    kind: Literal["text", "sentences", "tensors", "images", "generated", "factory"]
    samples: int
    description: str
    labels: Sequence[Tensor] | None = None
    pairs: SentencePairs | None = None


def load_data(
    reference: str,
    source: Source,
    *,
    windows: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    choose: Choice = "random",
    preprocess: Preprocess | None = None,
    seed: int = 0,
    part: bool = False,
    trust: bool = False,
) -> Data:
    """Read the data that `reference` names, for the model `source`.

    A .txt or .jsonl file, for an encoder a sentence a line unless `sequence_length` asks for windows; a .tsv or .csv of
    a score and two sentences a line, for an encoder; an .npz or .safetensors file of named inputs, or FILE:ARRAY for
    one array of it as the first input (with `preprocess`, uint8 images called "images"); a folder or .tar of images;
    package.module:factory. `windows` limits the samples, or pairs (without it at most 128 windows of text or 16,384
    sentences are drawn at random); `sequence_length` is for text alone. `part` takes seven samples in eight where all
    would be taken, so that another seed is another draw.

    Raises:
        DataError: missing, cut short, or not fitting the model's inputs: names, shapes, dtypes, vocabulary, NaN.
        TrustError: a factory without `trust`.
    """
    for name, value in (("windows", windows), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"{name} {value} was asked; give at least 1")
    path, select = _split(reference)
    draw = Draw(windows, choose, seed, part)
    if path is None:
        return _from_factory(reference, source, trust, draw)
    suffix = path.suffix.lower()
    if suffix in {".tsv", ".csv"}:
        return _from_pairs(path, source, sequence_length, batch_size, draw)
    if suffix in {".txt", ".jsonl"}:
        if sequence_length is None and framed(path, source):
            return _from_sentences(path, source, batch_size, draw)
        return _from_text(path, source, sequence_length, batch_size, draw)
    if suffix in {".npz", ".safetensors"}:
        return _from_arrays(path, select, source, batch_size, preprocess, draw)
    if path.is_dir() or suffix == ".tar":
        return _from_images(read_images(path), path.name, source, batch_size, preprocess, draw)
    raise DataError(
        f"data {reference!r}: cannot tell what it is; give .txt, .jsonl, .tsv, .csv, .npz or .safetensors, a folder "
        "or .tar of images, or package.module:factory"
    )


def generate_data(source: Source, seed: int = 0, refuses: Callable[[Batch], str | None] | None = None) -> Data:
    """Make inputs from what the model declares, or take those its factory gave.

    `refuses` runs one batch and returns why the model cannot take it, or None; with it, several lengths of free axes
    are tried.

    Raises:
        DataError: the model does not say enough to generate inputs.
    """
    if source.batches is not None:
        batches = checked(source.batches, f"batches of {source.reference!r}")
        return Data(
            batches, "factory", sum(map(sample_count, batches)), f"{len(batches)} batches of the model's factory"
        )
    made = generated_batches(source, seed, refuses)
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named_tensors(made[0]))
    return Data(
        made, "generated", sum(map(_samples, made)), f"generated inputs: {len(made)} random batches of {shapes}"
    )


def demo_text(part: Literal["calibration", "heldout"]) -> Path:
    """Find the WikiText-2 excerpt that the project ships: `calibration` is from its train, `heldout` from its test."""
    return Path(str(resources.files("sparsify_compiler").joinpath("demo", f"{part}.txt")))


def _split(reference: str) -> tuple[Path | None, str | None]:
    """Return the (path, array) that a reference names, or (None, None) for a factory."""
    path = Path(reference).expanduser()
    if path.exists():
        return path, None
    name, separator, array = reference.rpartition(":")
    if separator and Path(name).expanduser().is_file():
        return Path(name).expanduser(), array
    if FACTORY.fullmatch(reference):
        return None, None
    raise DataError(f"data {reference!r}: no such file or folder")


def _from_text(path: Path, source: Source, sequence_length: int | None, batch_size: int | None, draw: Draw) -> Data:
    ids = text_windows(path, source, sequence_length)
    count, length = ids.shape
    check_token_ids(ids, source.vocabulary, "input_ids", f"text {str(path)!r}")
    ids = ids[draw.of(count, CALIBRATION_WINDOWS)]
    arrays = {"input_ids": ids}
    for spec in source.inputs:
        if spec.required and spec.name in {"attention_mask", "token_type_ids", "position_ids"}:
            filler = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            arrays[spec.name] = filler.get(spec.name, torch.arange(length).expand_as(ids))
    what = f"text {str(path)!r}"
    stacked = stack_tensors(fit_tensors(arrays, source, what), source, batch_size, what)
    words = draw.words(len(ids), count, f"windows of {length} tokens")
    return Data(stacked.batches(source), "text", len(ids), f"{path.name}: {words}")


def _from_sentences(path: Path, source: Source, batch_size: int | None, draw: Draw) -> Data:
    sentences = read_sentences(path)
    taken = draw.of(len(sentences), CALIBRATION_SENTENCES)
    made = tokenise([sentences[index] for index in taken.tolist()], path, source, None, batch_size)
    words = draw.words(len(taken), len(sentences), "sentences") + made.words
    return Data(made.batches, "sentences", len(taken), f"{path.name}: {words}")


def _from_pairs(path: Path, source: Source, sequence_length: int | None, batch_size: int | None, draw: Draw) -> Data:
    table = read_pairs(path)
    taken = draw.of(len(table.scores), CALIBRATION_SENTENCES // 2)
    chosen = table.take(taken)
    made = tokenise(chosen.sentences, path, source, sequence_length, batch_size)
    pairs = SentencePairs(torch.tensor(chosen.scores, dtype=torch.float64), made.places.reshape(-1, 2))
    words = draw.words(len(taken), len(table.scores), "pairs of sentences") + made.words
    return Data(made.batches, "sentences", 2 * len(taken), f"{path.name}: {words}", pairs=pairs)


def _from_arrays(
    path: Path, select: str | None, source: Source, batch_size: int | None, preprocess: Preprocess | None, draw: Draw
) -> Data:
    where = f"data {str(path)!r}"
    arrays = read_arrays(path, select)
    labels = arrays.pop(LABELS, None) if select is None else None
    if preprocess is not None:
        images = arrays.get(select or "images", next(iter(arrays.values())))
        return _from_images(
            array_images(images.numpy(), _label_ids(labels, where), where),
            path.name,
            source,
            batch_size,
            preprocess,
            draw,
        )
    if select is not None:
        arrays = {first_input(source): arrays[select]}
    if not arrays:
        raise DataError(f"{where}: it holds labels alone; add the model's inputs")
    tensors = fit_tensors(arrays, source, where)
    main = next((name for name, tensor in tensors.items() if tensor.ndim), None)
    count = len(tensors[main]) if main else 1
    taken = draw.of(count)
    ids = _label_ids(labels, where)
    if len(taken) < count:
        if any(tensor.ndim and len(tensor) != count for tensor in tensors.values()):
            raise DataError(
                f"{where}: {len(taken)} of {count} samples were asked, but not every array has {count} rows"
            )
        tensors = {name: tensor[taken] if tensor.ndim else tensor for name, tensor in tensors.items()}
        ids = ids[taken] if ids is not None else None
    stacked = stack_tensors(tensors, source, batch_size, where)
    if ids is not None and (main is None or len(ids) != len(taken)):
        raise DataError(f"{where}: {len(ids)} labels for {len(taken)} samples; give one label each")
    split = stacked.split(ids, main) if ids is not None and main else None
    words = draw.words(len(taken), count, f"samples of {', '.join(tensors)}")
    return Data(stacked.batches(source), "tensors", len(taken), f"{path.name}: {words}", split)


def _from_images(
    images: ImageSet, name: str, source: Source, batch_size: int | None, preprocess: Preprocess | None, draw: Draw
) -> Data:
    where = f"images {name!r}"
    if preprocess is None:
        raise DataError(
            f"{where}: say how pixels become inputs, as in --preprocess 'mean=0.5 std=0.5 size=224 channels=rgb'"
        )
    taken = draw.of(images.count)
    required = [spec for spec in source.inputs if spec.required]
    if len(required) > 1:
        raise DataError(
            f"{where}: the model takes {', '.join(spec.name for spec in required)}, images are one input; give .npz"
        )
    spec = required[0] if required else next(iter(source.inputs), None)
    key = spec.name if spec else "input 0"
    fit_tensors({key: stack_images(images, preprocess, [int(taken[0])])}, source, where)
    fixed = spec.shape[0] if spec and spec.shape and isinstance(spec.shape[0], int) else None
    step = fixed or batch_size or IMAGES_A_BATCH
    if fixed:
        taken = taken[: len(taken) // fixed * fixed]
    parts = [taken[start : start + step].tolist() for start in range(0, len(taken), step)]
    if not parts:
        raise DataError(f"{where}: {images.count} images, one call of the model takes {fixed}; give more")

    def make(index: int) -> Batch:
        return as_batch({key: stack_images(images, preprocess, parts[index])}, source)

    labels = tuple(images.labels[part] for part in parts) if images.labels is not None else None
    words = draw.words(len(taken), images.count, "images")
    return Data(LazyBatches(len(parts), make), "images", len(taken), f"{name}: {words}, {preprocess}", labels)


def _from_factory(reference: str, source: Source, trust: bool, draw: Draw) -> Data:
    factory = import_attribute(reference, trust, "data")
    made = call_factory(factory, reference, "data") if callable(factory) else factory
    if not isinstance(made, Iterable):
        raise DataError(f"data {reference!r}: the factory gave {type(made).__name__}; return an iterable of batches")
    where = f"data {reference!r}"
    entries = call_factory(lambda: list(made), reference, "data")  # a generator runs only now
    assert isinstance(entries, list)
    pairs = [split_labels(entry, source) for entry in entries]
    batches = checked([batch for batch, _ in pairs], where)
    labels = [label for _, label in pairs if label is not None]
    taken = draw.of(len(batches)).tolist()
    chosen = [batches[index] for index in taken]
    kept = [labels[index] for index in taken] if len(labels) == len(batches) else None
    return Data(
        chosen,
        "factory",
        sum(map(_samples, chosen)),
        f"{reference}: {draw.words(len(chosen), len(batches), 'batches')}",
        kept,
    )


def _samples(batch: Batch) -> int:
    return sample_count(batch) if any(tensor.ndim for _, tensor in named_tensors(batch)) else 1


def _label_ids(labels: Tensor | None, where: str) -> Tensor | None:
    if labels is None:
        return None
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{where}: labels must be integers (samples,), found {labels.dtype} {tuple(labels.shape)}")
    return labels.to(torch.int64)
