"""Re-estimate BatchNorm statistics on a pruned torch module: worth more than most differences between methods."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify_compiler.batches import Batch, call, to_device
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.progress import Progress, silent


def reestimate_batchnorm(module: nn.Module, batches: Sequence[Batch], progress: Progress = silent) -> int:
    """Replace the running mean and variance of every BatchNorm in `module`, in place, by those of `batches`.

    Averages the statistics of the batches with equal weight, only BatchNorm layers being in training mode; everything
    else, and the mode each layer had, stays as it was. Returns the number of layers.

    Raises:
        CalibrationError: statistics that are not finite, or a batch of one value a channel.
    """
    layers = batchnorm_layers(module)
    if not layers or not batches:
        return 0
    modes = [(sub, sub.training) for sub in module.modules()]
    momenta = {name: layer.momentum for name, layer in layers.items()}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        module.eval()
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.training = True
        with torch.no_grad():
            for number, batch in enumerate(batches):
                progress("re-estimate BatchNorm", number, len(batches))
                try:
                    call(module, to_device(batch, device))
                except ValueError as error:  # torch refuses one value a channel: it has no variance
                    raise CalibrationError(
                        f"BatchNorm cannot be re-estimated on batch {number}: {error}; "
                        "give batches of more samples, or leave the statistics as they are"
                    ) from None
        progress("re-estimate BatchNorm", len(batches), len(batches))
    finally:
        for name, layer in layers.items():
            layer.momentum = momenta[name]
        for sub, mode in modes:
            sub.training = mode
    for name, layer in layers.items():
        if layer.running_var is None or not torch.isfinite(layer.running_var).all():
            raise CalibrationError(f"BatchNorm {name!r}: statistics on the calibration data are not finite")
    return len(layers)


def batchnorm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return by name the layers of `module` that normalise by statistics they keep."""
    named = module.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, _BatchNorm) and layer.track_running_stats}
