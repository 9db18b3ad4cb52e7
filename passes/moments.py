"""Give the convolutions of a pruned ONNX graph the per-channel mean and variance that they had dense.

An exported graph has no BatchNorm statistics to re-estimate (`batchnorm.py` does that for torch modules): exporters
fold them into the convolutions. The same correction by hand, for every output channel of a pruned convolution:

    Given:   %y = Conv(%x, %w, %b)        # mean m', variance v' on the data; the dense graph had m, v
    Result:  %y = Conv(%x, a * %w, %b1)   # a = sqrt(v / v'), b1 = b + what is missing to m
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, ModelError
from sparsify_compiler.frontends.onnx import OnnxGraph
from sparsify_compiler.graph import ConvLayout, Site, Values
from sparsify_compiler.progress import Progress, silent

DEAD = 1e-6
"""A channel whose variance fell below this share of the dense one is not scaled: only its mean is corrected."""


def correct_moments(
    graph: OnnxGraph,
    dense: OnnxGraph,
    batches: Sequence[Any],
    sites: Collection[str],
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Scale and shift the convolutions named in `sites`, front to back, each seeing the corrected ones before it.

    `dense` is the same model before pruning. `graph` is modified: rows of the weight are scaled, so zeros stay zeros;
    the shift goes into the bias, else the mean of the BatchNormalization behind, else a new bias. Sums run in float64
    over batches and positions. Both graphs' boundary values of one segment are held for all batches. A convolution
    used in several places, or whose bias a run computes, is left as it is and noted. Returns notes for the report.

    Raises:
        CalibrationError: outputs that are not finite.
        ModelError: `dense` is another model.
    """
    if [segment.needs for segment in graph.segments] != [segment.needs for segment in dense.segments]:
        raise ModelError("correct moments: the dense graph is another model; read it from the same file")
    chosen = [site for site in graph.sites if site.name in sites and isinstance(site.layout, ConvLayout)]
    notes = [note for site in chosen if (note := _unfit(graph, site))]
    chosen = [site for site in chosen if not _unfit(graph, site)]
    if not chosen or not batches:
        return tuple(notes)
    ours, theirs = ([each.enter(batch) for batch in batches] for each in (graph, dense))
    for segment in graph.segments[: max(site.segment for site in chosen) + 1]:
        progress(f"correct moments {segment.name}", segment.index, len(graph.segments))
        here = [site for site in chosen if site.segment == segment.index]
        names = {site.name: _output(graph, site) for site in here}
        targets = _run(dense, segment.index, theirs, names, advance=True)
        for site in here:
            found = _run(graph, segment.index, ours, {site.name: names[site.name]}, advance=False)
            _correct(graph, site, found[site.name], targets[site.name])
        _run(graph, segment.index, ours, {}, advance=True)
    progress("correct moments", len(graph.segments), len(graph.segments))
    notes.append(f"mean and variance of {len(chosen)} convolutions corrected on {len(batches)} batches")
    return tuple(notes)


class _Sums:
    """Running sums of one convolution's output, per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.first = torch.zeros(())
        self.second = torch.zeros(())

    def add(self, y: Tensor) -> None:
        """Take in an output (batch, channels, *positions)."""
        rows = y.detach().double().movedim(1, 0).flatten(1)  # (channels, positions)
        self.count += rows.shape[1]
        self.first = self.first + rows.sum(1)
        self.second = self.second + rows.square().sum(1)

    def moments(self, site: str) -> tuple[Tensor, Tensor]:
        """Return (mean, variance) per channel."""
        mean = self.first / max(self.count, 1)
        variance = (self.second / max(self.count, 1) - mean.square()).clamp_min(0)
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise CalibrationError(f"layer {site!r}: its outputs on the data are not finite; check the data")
        return mean, variance


def _run(
    graph: OnnxGraph, index: int, boundaries: list[Values], names: dict[str, str], advance: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run one segment over every batch; return (mean, variance) per site, and move the boundaries on if asked."""
    sums = {site: _Sums() for site in names}
    for number, values in enumerate(boundaries):
        after, made = graph.peek(index, values, tuple(names.values()))
        for site, name in names.items():
            sums[site].add(made[name])
        if advance:
            boundaries[number] = after
    return {site: each.moments(site) for site, each in sums.items()}


def _correct(graph: OnnxGraph, site: Site, found: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """Scale the rows of the weight and shift the output so that the moments `found` become `target`."""
    (mean, variance), (wanted_mean, wanted_variance) = found, target
    alive = variance > DEAD * wanted_variance
    scale = torch.where(alive, (wanted_variance / variance.clamp_min(1e-300)).sqrt(), torch.ones_like(variance))
    bias = graph.bias(site)
    assert bias is not None  # `_unfit` keeps the others away
    scaled_mean = scale * (mean - bias.double()) + bias.double()
    weight = graph.weight(site)  # (groups, out, in)
    graph.set_weight(site, weight * scale.float().reshape(site.groups, site.out, 1))
    graph.shift(site, (wanted_mean - scaled_mean).float())


def _unfit(graph: OnnxGraph, site: Site) -> str | None:
    if site.calls > 1:
        return f"{site.name}: used in {site.calls} places, its mean and variance are not corrected"
    if graph.bias(site) is None:
        return f"{site.name}: its bias is computed by the run, its mean and variance are not corrected"
    return None


def _output(graph: OnnxGraph, site: Site) -> str:
    node, _ = graph.products(site.name)[0]
    return node.outputs[0].name or ""
