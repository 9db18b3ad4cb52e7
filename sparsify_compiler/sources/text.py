"""Text as model inputs: read .txt and .jsonl, tokenise with the model's own tokenizer, cut into windows."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.errors import DataError
from sparsify_compiler.sources.models import Source

DEFAULT_LENGTH = 2048


def read_documents(path: Path) -> list[str]:
    """Read a .txt file as one document, a .jsonl file as one per line (its field "text").

    Raises:
        DataError: not UTF-8, a line that is no JSON table with a "text", or no text at all.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"text {str(path)!r}: cannot be read as UTF-8 ({error}); save it as UTF-8 text") from None
    documents = [content]
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(content.splitlines(), start=1)
        documents = [_document(line, number, path) for number, line in lines if line.strip()]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"text {str(path)!r}: the file holds no text")
    return documents


def text_windows(path: Path, source: Source, sequence_length: int | None) -> Tensor:
    """Tokenise a file and cut it into consecutive windows that do not overlap: int64 (windows, length).

    Documents are joined, each ended by the tokenizer's end-of-text token where there are several; a rest shorter than a
    window is left out. An encoder (a model that does not generate) gets its [CLS] and [SEP] around every window.
    `sequence_length` None takes 2,048, or the longest the model allows if that is less.

    Raises:
        DataError: the model has no tokenizer, the length is more than the model allows, or the text fills no window.
    """
    tokenizer = load_tokenizer(path, source)
    length = window_length(source, sequence_length, tokenizer_limit(tokenizer))
    documents = read_documents(path)
    ids = _tokenise(tokenizer, documents)
    first, last = _frame(tokenizer, source)
    inner = length - len(first) - len(last)
    if inner < 1 or len(ids) < inner:
        raise DataError(
            f"text {str(path)!r}: one window of {length} tokens was asked, the text has {len(ids)}; give more text or "
            "a smaller --sequence-length"
        )
    count = len(ids) // inner
    windows = torch.tensor(ids[: count * inner], dtype=torch.int64).reshape(count, inner)
    return torch.cat([torch.tensor(first).expand(count, -1), windows, torch.tensor(last).expand(count, -1)], 1).long()


def window_length(source: Source, asked: int | None, limit: int | None = None) -> int:
    """Return the tokens of a window: what was asked, or 2,048 and no more than the model allows.

    Raises:
        DataError: fewer than two tokens, or more than the model has positions for.
    """
    limits = [value for value in (source.max_positions, limit) if value]
    longest = min(limits, default=None)
    if asked is None:
        return min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if asked < 2 or (longest is not None and asked > longest):
        span = f"2 to {longest}" if longest else "at least 2"
        raise DataError(f"sequence length {asked} was asked, the model takes {span} tokens; choose one of these")
    return asked


def load_tokenizer(path: Path, source: Source) -> Any:
    """Read the model's tokenizer for the text in `path`. Raises DataError where it has none."""
    if source.tokenizer is None:
        raise DataError(
            f"text {str(path)!r}: the model {source.reference!r} comes without tokenizer files; put them in its "
            "folder, or give token ids as an .npz with input_ids (windows, length)"
        )
    return source.tokenizer.load()


def generates(source: Source) -> bool:
    """Say whether the model is known to generate text, as a causal language model does."""
    can = getattr(source.module, "can_generate", None)
    return bool(callable(can) and can())


def framed(path: Path, source: Source) -> bool:
    """Say whether the model is an encoder whose tokenizer puts [CLS] and [SEP] around a text."""
    return source.tokenizer is not None and bool(_frame(load_tokenizer(path, source), source)[0])


def _tokenise(tokenizer: Any, documents: list[str]) -> list[int]:
    end = [] if len(documents) == 1 or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [int(token) for document in encoded for token in [*document, *end]]


def tokenizer_limit(tokenizer: Any) -> int | None:
    """Return the tokenizer's own longest sequence; transformers writes 1e30 for none."""
    longest = tokenizer.model_max_length
    return int(longest) if isinstance(longest, int) and 1 < longest < 2**31 else None


def _frame(tokenizer: Any, source: Source) -> tuple[list[int], list[int]]:
    if source.module is None or generates(source):
        return [], []
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    return ([], []) if first is None or last is None else ([int(first)], [int(last)])


def _document(line: str, number: int, path: Path) -> str:
    try:
        table = json.loads(line)
    except ValueError:
        table = None
    if not isinstance(table, dict) or not isinstance(table.get("text"), str):
        raise DataError(
            f'text {str(path)!r}, line {number}: every line must be a JSON table with a "text", as {{"text": "..."}}'
        )
    return str(table["text"])
