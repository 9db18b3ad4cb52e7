"""Sentences as an encoder's inputs: one a line, or scored pairs; tokenised one by one, padded batch by batch."""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, LazyBatches
from sparsify_compiler.errors import DataError
from sparsify_compiler.sources.models import Source
from sparsify_compiler.sources.tensors import as_batch, fit_tensors
from sparsify_compiler.sources.text import (
    generates,
    load_tokenizer,
    read_documents,
    tokenizer_limit,
    window_length,
)

CALIBRATION_SENTENCES = 16_384
"""Sentences drawn for calibration where nothing was asked: of 16 tokens each, as many as 128 windows of 2,048 hold."""

BATCH_TOKENS = 2048
SCORE_NAMES = ("score", "similarity_score")
STS_COLUMNS = (4, 5, 6)
"""Score and sentences in the seven or more columns of the STS benchmark's own files, which have no header."""


@dataclass(frozen=True)
class ScoredPairs:
    """The lines of a file of pairs: line k has `scores[k]` and the sentences 2 k and 2 k + 1 of `sentences`."""

    scores: tuple[float, ...]
    sentences: tuple[str, ...]

    def take(self, lines: Tensor) -> "ScoredPairs":
        """Return some of the pairs, by number."""
        chosen = lines.tolist()
        both = tuple(self.sentences[2 * line + side] for line in chosen for side in (0, 1))
        return ScoredPairs(tuple(self.scores[line] for line in chosen), both)


@dataclass(frozen=True)
class Tokenised:
    """Batches of padded sentences, longest first. Sentence k is row `places[k]` of all batches, counted through.

    `words` continue a description by what was done to them beside padding; empty where nothing was.
    """

    batches: Sequence[Batch]
    places: Tensor
    words: str


def read_pairs(path: Path) -> ScoredPairs:
    """Read a .tsv (tabs, nothing quoted) or .csv (commas, quoted as usual) with a score and two sentences a line.

    Columns are found by a header that names sentence1, sentence2 and score (or similarity_score); without one, a line
    of three has its score first or last, and one of seven or more is laid out as the STS benchmark's.

    Raises:
        DataError: not UTF-8, no such columns, or a line without them; names the line.
    """
    where = f"sentence pairs {str(path)!r}"
    lines = _lines(path, where)
    if not lines:
        raise DataError(f"{where}: the file holds no line; give a score and two sentences a line")
    header, columns = _columns(lines[0][1], where)
    scores, sentences = [], []
    for number, entries in lines[header:]:
        if len(entries) <= max(columns):
            raise DataError(
                f"{where}, line {number}: {len(entries)} columns, line {lines[0][0]} has {len(lines[0][1])}"
            )
        score, *both = (entries[column].strip() for column in columns)
        if not _is_number(score):
            raise DataError(
                f"{where}, line {number}: the score {score[:40]!r} is no number; correct or delete the line"
            )
        if not all(both):
            raise DataError(f"{where}, line {number}: a sentence is empty; correct or delete the line")
        scores.append(float(score))
        sentences.extend(both)
    if not scores:
        raise DataError(f"{where}: a header and no line; give a score and two sentences a line")
    return ScoredPairs(tuple(scores), tuple(sentences))


def read_sentences(path: Path) -> list[str]:
    """Read a .txt with one sentence a line, or a .jsonl with one a "text". Raises DataError for none at all."""
    documents = read_documents(path)
    if path.suffix.lower() == ".txt":
        documents = [line.strip() for line in documents[0].split("\n") if line.strip()]
    return documents


def tokenise(
    sentences: Sequence[str], path: Path, source: Source, sequence_length: int | None, batch_size: int | None
) -> Tokenised:
    """Tokenise every sentence by the model's own tokenizer, special tokens included, and pad those of like length.

    A batch holds about 2,048 tokens, or `batch_size` sentences; an `attention_mask` hides the padding. Longer sentences
    than `sequence_length` (None: the longest the model allows, 2,048 at most) are cut. Where the model fixes a length,
    all are padded to it; where it fixes the sentences a call, copies of the last one fill the last batch.

    Raises:
        DataError: the model generates text, has no tokenizer or no attention_mask, or a sentence has no token.
    """
    where = f"text {str(path)!r}"
    names = [spec.name for spec in source.inputs]
    if generates(source) or "attention_mask" not in names:
        what = "generates text" if generates(source) else "takes no attention_mask to hide padding"
        raise DataError(
            f"{where}: sentences one by one are for encoders, and the model {what}; give a .txt of running text with "
            "--sequence-length, or token ids as .npz"
        )
    tokenizer = load_tokenizer(path, source)
    rows, length = _fixed_sizes(source)
    limit = min(window_length(source, sequence_length, tokenizer_limit(tokenizer)), length or sys.maxsize)
    ids = [list(map(int, found)) for found in tokenizer(list(sentences), verbose=False)["input_ids"]]
    long = [number for number, found in enumerate(ids) if len(found) > limit]
    for number in long:
        ids[number] = list(map(int, tokenizer(sentences[number], truncation=True, max_length=limit)["input_ids"]))
    if empty := [number for number, found in enumerate(ids) if not found]:
        raise DataError(f"{where}: the tokenizer makes no token of {sentences[empty[0]]!r}; delete that sentence")
    order = sorted(range(len(ids)), key=lambda number: (-len(ids[number]), number))
    places = torch.empty(len(ids), dtype=torch.int64)
    places[order] = torch.arange(len(ids))
    parts = _divide([len(ids[number]) for number in order], rows or batch_size)
    copies = parts[-1].stop - len(ids) if rows else 0
    ordered, pad = [ids[number] for number in order], tokenizer.pad_token_id or 0

    def make(index: int) -> Batch:
        chosen = [ordered[min(row, len(ids) - 1)] for row in parts[index] if rows or row < len(ids)]
        return _padded(chosen, length or len(chosen[0]), pad, source, where)

    make(0)  # what does not fit the model is said now
    words = f", {len(long)} cut to {limit} tokens" if long else ""
    words += f", {copies} copies of the last to fill a batch" if copies else ""
    return Tokenised(LazyBatches(len(parts), make), places, words)


def _fixed_sizes(source: Source) -> tuple[int | None, int | None]:
    """Return how many sentences of how many tokens the model takes a call, None where that is free."""
    shape = next((spec.shape for spec in source.inputs if spec.name == "input_ids"), None) or (None, None)
    rows, length = (axis if isinstance(axis, int) else None for axis in shape[:2])
    return rows, length


def _divide(lengths: Sequence[int], rows: int | None) -> list[range]:
    """Divide sentences, longest first, into batches of `rows`, or of as many as `BATCH_TOKENS` hold once padded.

    The last range may end beyond the sentences.
    """
    starts = [0]
    while starts[-1] < len(lengths):
        starts.append(starts[-1] + (rows or max(1, BATCH_TOKENS // lengths[starts[-1]])))
    return [range(start, stop) for start, stop in pairwise(starts)]


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int, source: Source, where: str) -> Batch:
    """Make one batch, every row padded to `length`, of the inputs that the model asks for."""
    arrays = {
        "input_ids": torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }
    required = {spec.name for spec in source.inputs if spec.required}
    for name in ("token_type_ids", "position_ids"):
        if name in required:
            arrays[name] = torch.zeros_like(arrays["input_ids"])
    if "position_ids" in arrays:
        arrays["position_ids"] += torch.arange(length)
    return as_batch(fit_tensors(arrays, source, where), source)


def _lines(path: Path, where: str) -> list[tuple[int, list[str]]]:
    """Return (line number from 1, entries) of every line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.reader(file, strict=True)
                return [(reader.line_num, entries) for entries in reader if any(map(str.strip, entries))]
            # Quotation marks are not special: the benchmark's sentences hold single ones.
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where}: cannot be read ({error}); save it as UTF-8 text") from None
    return [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, start=1) if line.strip()]


def _columns(first: Sequence[str], where: str) -> tuple[bool, tuple[int, int, int]]:
    """Say from the first line whether it is a header, and which columns hold the score and the sentences."""
    names = [entry.strip().lower() for entry in first]
    score = next((names.index(name) for name in SCORE_NAMES if name in names), None)
    if score is not None and "sentence1" in names and "sentence2" in names:
        return True, (score, names.index("sentence1"), names.index("sentence2"))
    if len(first) == 3 and _is_number(first[0]):
        return False, (0, 1, 2)
    if len(first) == 3:
        return False, (2, 0, 1)
    if len(first) > max(STS_COLUMNS):
        return False, STS_COLUMNS
    raise DataError(
        f"{where}: the first line has {len(first)} column{'s' * (len(first) > 1)}, a score and two sentences are "
        "needed; give these three, or a header that names score, sentence1 and sentence2 (sentences without scores: a "
        ".txt, one a line)"
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
