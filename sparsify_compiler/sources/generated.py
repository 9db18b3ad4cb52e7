"""Inputs made from what a model declares, for methods that need no statistics and for checking exported files."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsify_compiler.batches import Axis, Batch, InputSpec
from sparsify_compiler.errors import DataError
from sparsify_compiler.frontends.onnx import load_onnx
from sparsify_compiler.frontends.onnx_generate import generate_inputs
from sparsify_compiler.sources.models import Source
from sparsify_compiler.sources.tensors import as_batch

SAMPLES = 2
BATCHES = 2
TEXT_LENGTHS = (32, 16, 128, 512, 576)
"""Lengths tried for a free axis of an input with up to three axes."""
IMAGE_SIDES = (64, 48, 224, 256)
"""Lengths tried for a free axis of an input with four axes or more."""


def generated_batches(source: Source, seed: int, refuses: Callable[[Batch], str | None] | None = None) -> list[Batch]:
    """Make `BATCHES` seeded random batches of `SAMPLES` samples that the model accepts.

    Floats are standard normal; integers lie below the table that reads them where there is one; masks are ones.
    Inputs that share the name of a free axis share its length. For an ONNX file ONNX Runtime itself says what it
    takes (`frontends.onnx_generate`). `refuses` runs a batch and returns None, or why the
    model cannot take it: lengths of free axes are tried in a few steps.

    Raises:
        DataError: the model does not say what it takes, or refuses everything tried.
    """
    if source.kind == "onnx" and source.path is not None:
        graph = load_onnx(source.path)
        return [generate_inputs(graph, seed + number, SAMPLES) for number in range(BATCHES)]
    specs = declared_inputs(source)
    reason: str | None = None
    for lengths in _attempts(specs):
        generator = torch.Generator().manual_seed(seed)
        batches = [
            as_batch({spec.name: _value(spec, lengths, source, generator) for spec in specs}, source)
            for _ in range(BATCHES)
        ]
        reason = refuses(batches[0]) if refuses else None
        if reason is None:
            return batches
    raise DataError(f"generated inputs: the model {source.reference!r} refused them ({reason}); give data of its own")


def declared_inputs(source: Source) -> tuple[InputSpec, ...]:
    """Return the inputs to generate, each with a dtype and a shape.

    Raises:
        DataError: a plain module, which does not say what it takes.
    """
    config = getattr(source.module, "config", None)
    main = getattr(source.module, "main_input_name", None)
    if config is not None and isinstance(main, str):
        return (_transformers_input(main, config, source),)
    specs = tuple(spec for spec in source.inputs if spec.required)
    if not specs or any(spec.dtype is None or spec.shape is None for spec in specs):
        raise DataError(
            f"the model {source.reference!r} does not say what it takes, so no inputs can be generated; give data, or "
            "let its factory return (module, batches)"
        )
    return specs


def _transformers_input(name: str, config: object, source: Source) -> InputSpec:
    if name == "input_ids":
        length = min(TEXT_LENGTHS[0], source.max_positions or TEXT_LENGTHS[0])
        return InputSpec(name, torch.int64, ("batch", length), below=source.vocabulary)
    if name == "pixel_values" and hasattr(config, "image_size"):
        side = config.image_size
        high, wide = (side, side) if isinstance(side, int) else tuple(side)
        return InputSpec(name, torch.float32, ("batch", int(getattr(config, "num_channels", 3)), high, wide))
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # Whisper's second convolution halves the frames.
        shape = ("batch", int(config.num_mel_bins), 2 * int(config.max_source_positions))
        return InputSpec(name, torch.float32, shape)
    raise DataError(
        f"the model {source.reference!r} takes {name!r}, for which no inputs can be generated; give data as .npz with "
        f"{name}"
    )


def _attempts(specs: tuple[InputSpec, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield (samples, length, side) to try for free axes; one attempt where none is free."""
    yield SAMPLES, TEXT_LENGTHS[0], IMAGE_SIDES[0]
    if not any(not isinstance(axis, int) for spec in specs for axis in spec.shape or ()):
        return
    for samples in (SAMPLES, 1):
        for length in TEXT_LENGTHS:
            for side in IMAGE_SIDES:
                if (samples, length, side) != (SAMPLES, TEXT_LENGTHS[0], IMAGE_SIDES[0]):
                    yield samples, length, side


def _value(spec: InputSpec, lengths: tuple[int, int, int], source: Source, generator: torch.Generator) -> Tensor:
    samples, length, side = lengths
    free = side if len(spec.shape or ()) >= 4 else length
    shape = tuple(
        axis if isinstance(axis, int) else samples if _counts_samples(spec.shape or (), position) else free
        for position, axis in enumerate(spec.shape or ())
    )
    dtype = spec.dtype or torch.float32
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool or "mask" in spec.name:
        return torch.ones(shape, dtype=dtype)
    below = spec.below or (source.vocabulary if spec.name == "input_ids" else None)
    if below:
        return torch.randint(below, shape, generator=generator).to(dtype)
    if "position" in spec.name and shape:
        return torch.arange(shape[-1]).expand(shape).contiguous().to(dtype)
    if "length" in spec.name:
        return torch.full(shape, length, dtype=dtype)
    if "type" in spec.name:
        return torch.zeros(shape, dtype=dtype)
    if spec.name in {"sr", "sample_rate", "sampling_rate"}:
        return torch.full(shape, 16_000, dtype=dtype)
    return torch.randint(2, shape, generator=generator).to(dtype)


def _counts_samples(shape: tuple[Axis, ...], position: int) -> bool:
    """Say whether a free axis counts samples: the first, one called so, or the middle of (fixed, free, fixed).

    The last is the state of a recurrent network: (layers, samples, width).
    """
    state = len(shape) == 3 and position == 1 and isinstance(shape[0], int) and isinstance(shape[2], int)
    return position == 0 or shape[position] in {"batch", "batch_size", "N"} or state
