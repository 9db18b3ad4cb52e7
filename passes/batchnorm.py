"""Re-estimate BatchNorm statistics on a pruned torch module: worth more than most differences between methods.

Statistics taken anew from calibration data would be those of that data: without the augmentation a model was trained
with they are off before anything is pruned (ResNet20 on CIFAR-10 falls from 91.7 to 88.9 %). So they move by what
pruning changed, no more:

    Given:   %y = batch_norm(%x, mean, variance)    # %x has moments m', v' on the data; in the dense model m, v
    Result:  %y = batch_norm(%x, mean', variance')  # %y has the moments it has in the dense model
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify_compiler.batches import Batch, call
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.torch_trace import inference
from sparsify_compiler.progress import Progress, silent

DEAD = 1e-6
"""A channel whose variance fell below this share of the dense one is not scaled: only its mean is corrected."""


def reestimate_batchnorm(
    module: nn.Module,
    dense: nn.Module,
    batches: Sequence[Batch],
    orders: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> int:
    """Move the running mean and variance of every BatchNorm in `module`, in place, by what pruning did to its input.

    `dense` is the same model before pruning; it is run beside, in eval mode, and stays as it was. Channel c of a layer
    named in `orders` is channel `orders[name][c]` of the dense one. While one batch runs, layers use what that batch
    asks for, so that each sees inputs that are corrected already; then the moments of all batches together decide. A
    variance cannot fall below zero, so a channel is scaled up by at most what the layer's epsilon allows. Returns the
    number of layers.

    Raises:
        CalibrationError: statistics that are not finite.
    """
    before, orders = batchnorm_layers(dense), orders or {}
    pairs = {name: _Pair(layer, before[name], orders.get(name)) for name, layer in batchnorm_layers(module).items()}
    if not pairs or not batches:
        return 0
    with ExitStack() as hooks, inference(dense), inference(module):
        for pair in pairs.values():
            hooks.enter_context(_hooked(pair.before, pair.note))
            hooks.enter_context(_hooked(pair.layer, pair.match))
        for number, batch in enumerate(batches):
            progress("re-estimate BatchNorm", number, len(batches))
            for each in (dense, module):
                call(each, batch)
            for pair in pairs.values():
                pair.latest.clear()
        progress("re-estimate BatchNorm", len(batches), len(batches))
    for name, pair in pairs.items():
        pair.settle()
        held = (pair.layer.running_mean, pair.layer.running_var)
        if not all(each is not None and torch.isfinite(each).all() for each in held):
            raise CalibrationError(f"BatchNorm {name!r}: statistics on the calibration data are not finite")
    return len(pairs)


def batchnorm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return by name the layers of `module` that normalise by statistics they keep."""
    named = module.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, _BatchNorm) and layer.track_running_stats}


class _Pair:
    """A layer and the one it was before pruning, and what both read.

    `latest` holds the moments of what the dense one read in the batch that runs, its calls in order, in the order that
    the layer's channels have.
    """

    def __init__(self, layer: _BatchNorm, before: _BatchNorm, order: Tensor | None) -> None:
        self.layer = layer
        self.before = before
        self.latest: list[Tensor] = []
        self._order = order
        self._ours = _Sums()
        self._theirs = _Sums()

    def note(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Remember what the dense layer is about to read."""
        self.latest.append(self._ordered(self._theirs.add(inputs[0])))

    def match(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Set the layer's statistics for what it is about to read."""
        found = self._ours.add(inputs[0])
        if self.latest:
            self._set(self.latest.pop(0), found)

    def settle(self) -> None:
        """Set the layer's statistics for all batches."""
        if self._ours.count and self._theirs.count:
            self._set(self._ordered(self._theirs.moments()), self._ours.moments())

    def _ordered(self, values: Tensor) -> Tensor:
        return values if self._order is None else values.index_select(-1, self._order.to(values.device))

    def _set(self, wanted: Tensor, found: Tensor) -> None:
        """Let inputs of moments `found` leave the layer as inputs of moments `wanted` left it before pruning."""
        layer, before = self.layer, self.before
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert before.running_mean is not None
        assert before.running_var is not None
        wanted = wanted.to(found.device)
        mean = self._ordered(before.running_mean.to(found))
        scale = self._ordered(before.running_var.to(found)) + before.eps
        alive = (found[1] > DEAD * wanted[1]) & (wanted[1] > 0)
        ratio = torch.where(alive, found[1] / wanted[1].clamp_min(1e-300), 1.0)
        square = (scale * ratio).clamp_min(layer.eps)  # the variance beside epsilon is at least zero
        layer.running_mean.copy_(found[0] - (wanted[0] - mean) * (square / scale).sqrt())
        layer.running_var.copy_(square - layer.eps)


class _Sums:
    """Moments of one layer's inputs per channel: a batch's in float32, put together in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._moments: Tensor | None = None

    def add(self, x: Tensor) -> Tensor:
        """Take in an input (samples, channels, *positions) and return its own moments, as `moments` does."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        variance, mean = torch.var_mean(x.detach().float(), axes, correction=0)
        found = torch.stack((mean, variance)).double()
        count = x.numel() // x.shape[1]
        if self._moments is None:
            self._moments = found
        else:
            share = count / (self.count + count)
            apart = found[0] - self._moments[0]
            self._moments = torch.lerp(self._moments, found, share)
            self._moments[1] += share * (1 - share) * apart.square()
        self.count += count
        return found

    def moments(self) -> Tensor:
        """Return (mean, variance) per channel, (2, channels) float64."""
        assert self._moments is not None
        return self._moments


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
