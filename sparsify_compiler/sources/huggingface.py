"""Hugging Face folders and .gguf files: the module in float32 and the tokenizer, read without network and quietly.

transformers is an optional dependency (extra `hf`) and is imported when the first such model is read.
"""

import functools
import importlib
import importlib.util
import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sparsify_compiler.errors import ModelError, TrustError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    ImportError,
    struct.error,
    SafetensorError,
)
"""What transformers and its readers raise on damaged or unknown files."""

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """Where a model's tokenizer is: a folder of tokenizer files, or a .gguf file inside the folder."""

    folder: Path
    gguf: str | None = None

    def load(self) -> Any:
        """Read the tokenizer, a transformers PreTrainedTokenizerBase.

        Raises:
            ModelError: transformers is not installed, or the files cannot be read.
        """
        transformers = require_transformers(str(self.folder))
        options = {"gguf_file": self.gguf} if self.gguf else {}
        with quiet():
            try:
                return transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True, **options)
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise ModelError(
                    f"tokenizer of {str(self.folder)!r}: cannot be read ({_first_line(error)}); copy the model's "
                    "tokenizer files again, or give token ids as .npz with input_ids"
                ) from error

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`, so that what is written there can be evaluated on text."""
        if self.gguf:
            with quiet():
                self.load().save_pretrained(str(folder))
            return
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


def find_tokenizer(folder: Path) -> TokenizerFiles | None:
    """Return the tokenizer of a folder that holds a vocabulary, else None."""
    return TokenizerFiles(folder) if any((folder / name).is_file() for name in VOCABULARIES) else None


def require_transformers(what: str) -> Any:
    """Import transformers, or say which extra brings it."""
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(f"model {what!r}: reading it needs transformers; run pip install 'sparsify-compiler[hf]'")
    import transformers

    return transformers


def load_folder(folder: Path, trust: bool) -> nn.Module:
    """Read a Hugging Face folder as the class its config names, in float32 and eval mode.

    Raises:
        ModelError: config or weights missing, truncated or not fitting each other.
        TrustError: only pickled weights or remote code are at hand, and `trust` is False.
    """
    config = _read_config(folder)
    transformers = require_transformers(str(folder))
    pickled = _check_weights(folder, trust)
    model_class = _model_class(transformers, folder, config, trust)
    options: dict[str, Any] = {"use_safetensors": not pickled, "trust_remote_code": trust}
    return _from_pretrained(model_class, folder, str(folder), **options)


def load_gguf(path: Path) -> nn.Module:
    """Read a .gguf file as a causal language model, dequantised to float32, in eval mode.

    Raises:
        ModelError: not a .gguf file, truncated, of an architecture transformers does not know, or a package is missing.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"model {str(path)!r}: not a .gguf file (its first bytes are not GGUF); copy it again")
    transformers = require_transformers(str(path))
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"model {str(path)!r}: reading it needs {package}; run pip install 'sparsify-compiler[hf]'"
            )
    with _no_gguf_bar():
        module = _from_pretrained(transformers.AutoModelForCausalLM, path.parent, str(path), gguf_file=path.name)
    # The weights are plain float32 now; what says otherwise would make save_pretrained and copies fail.
    for owner, name in ((module, "hf_quantizer"), (module.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notices away, and restore its settings."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Keep the bar of the .gguf reader away: it is tqdm's own, which transformers' setting does not reach."""
    try:  # not an attribute of transformers: it is imported late
        reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:
        reader = None
    bar = getattr(reader, "tqdm", None)
    if bar is None:  # another version of transformers, which draws it elsewhere or not at all
        yield
        return
    vars(reader)["tqdm"] = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        vars(reader)["tqdm"] = bar


def _from_pretrained(model_class: Any, folder: Path, what: str, **options: Any) -> nn.Module:
    with quiet():
        try:
            module, loading = model_class.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
            )
        except READ_ERRORS as error:
            raise ModelError(
                f"model {what!r}: transformers cannot read it ({_first_line(error)}); copy the files again, or check "
                "that this version of transformers knows the architecture"
            ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"model {what!r}: the weights lack {len(missing)} tensors of {type(module).__name__} ({missing[0]}, ...); "
            "they would be random. Copy the weights again, or correct 'architectures' in config.json"
        )
    loaded: nn.Module = module
    return loaded.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {str(folder)!r}: config.json cannot be read ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"model {str(folder)!r}: config.json is not a table of settings; copy it again")
    return config


def _check_weights(folder: Path, trust: bool) -> bool:
    """Open every weight file that is needed; return True where they are pickles and trusted."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"model {str(folder)!r}: {index.name} cannot be read ({error}); copy it again") from error
    else:
        names = ["model.safetensors"]
    if not index.is_file() and not (folder / names[0]).is_file():
        if not list(folder.glob("pytorch_model*.bin")):
            raise ModelError(f"model {str(folder)!r}: no model.safetensors in the folder; copy the weights there")
        if not trust:
            raise TrustError(
                f"model {str(folder)!r}: its only weights are pytorch_model.bin, a pickle, which can run code when "
                "read; save them as safetensors, or add --trust if you trust the file"
            )
        return True
    for name in names:
        try:
            with safe_open(str(folder / name), framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"model {str(folder)!r}: {name} is missing, cut short or no safetensors file ({error}); copy it again"
            ) from error
    return False


def _model_class(transformers: Any, folder: Path, config: dict[str, Any], trust: bool) -> Any:
    name = (config.get("architectures") or [None])[0]
    remote = config.get("auto_map") or {}
    if isinstance(name, str) and isinstance(found := getattr(transformers, name, None), type):
        return found
    if remote and not trust:
        raise TrustError(
            f"model {str(folder)!r}: its class {name} comes as Python code in the folder; add --trust if you trust it"
        )
    if remote:
        return getattr(transformers, next((key for key in remote if key.startswith("AutoModel")), "AutoModel"))
    if name is None:
        return transformers.AutoModel
    raise ModelError(
        f"model {str(folder)!r}: transformers {transformers.__version__} has no class {name!r}; correct "
        "'architectures' in config.json, or install a version that has it"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
