"""Describe a module as data, so that an artefact can be turned back into it, and build it from that description."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from sparsify_compiler.errors import ModelError

Import = Callable[[str], object]
"""Imports a factory `package.module:name` where the user trusts it."""

_NEEDED: Mapping[str, Mapping[str, type]] = {
    "transformers": {"class": str, "config": dict},
    "factory": {"reference": str},
}
"""What a description of each kind must hold."""


def describe(module: nn.Module, reference: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the description and notes for the report. `reference` is a factory `package.module:name`, or empty."""
    kind = type(module)
    config = getattr(module, "config", None)
    if kind.__module__.startswith("transformers.") and config is not None and hasattr(config, "to_dict"):
        table: dict[str, Any] = {"kind": "transformers", "class": kind.__name__, "config": config.to_dict()}
        generation = getattr(module, "generation_config", None)
        if generation is not None:
            table["generation_config"] = generation.to_dict()
        return table, ()
    if reference:
        return {"kind": "factory", "reference": reference}, ()
    name = f"{kind.__module__}:{kind.__qualname__}"
    if isinstance(module, fx.GraphModule):
        note = "the artefact holds weights only: load it into the same traced program with load(folder, into=program)"
    else:
        note = f"the artefact does not say how {name} is constructed: load it with load(folder, into=your_module)"
    return {"kind": "module", "class": name}, (note,)


def rebuild(description: Mapping[str, Any], folder: Path, import_factory: Import) -> nn.Module:
    """Build the module that `description` speaks of, with weights still to be loaded.

    Raises:
        ModelError: the class cannot be found or built from the description; says to give the module.
        TrustError: it is a factory and `import_factory` refuses it.
    """
    kind = description.get("kind")
    for key, value in _NEEDED.get(str(kind), {}).items():
        if not isinstance(description.get(key), value):
            raise ModelError(f"{folder}: the model's description lacks its {key}; compile it again")
    if kind == "transformers":
        return _transformers(description, folder)
    if kind == "factory":
        made = import_factory(description["reference"])
        model = made() if callable(made) else made
        model = model[0] if isinstance(model, tuple) else model
        if not isinstance(model, nn.Module):
            raise ModelError(f"{folder}: the factory {description['reference']!r} returned no nn.Module")
        return model.eval()
    raise ModelError(f"{folder}: holds the weights of {description.get('class')}; give the module as load(..., into=)")


def _transformers(description: Mapping[str, Any], folder: Path) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ModelError(
            f"{folder}: a transformers model; install the extra: pip install 'sparsify-compiler[hf]'"
        ) from None
    found = getattr(transformers, description["class"], None)
    if found is None:
        raise ModelError(f"{folder}: transformers {transformers.__version__} has no class {description['class']!r}")
    config = found.config_class.from_dict(dict(description["config"]))
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced; the caller's generator is not moved
        module: nn.Module = found(config)
    if "generation_config" in description and hasattr(module, "generation_config"):
        module.generation_config = transformers.GenerationConfig.from_dict(dict(description["generation_config"]))
    return module.eval()
