"""How far the outputs move when one site changes, predicted to second order for all sites by one backward pass a batch.

Both distances are zero at the dense model, and so is their gradient: what counts is the curvature. With δ = J vec(Δ)
the first-order change of the outputs y when a site's weight changes by Δ, they are δᵀHδ / size: ‖δ‖² / ‖y‖² (H = I), or
the divergence δᵀFδ / 2 a token, F = diag(p) − ppᵀ the Fisher matrix of the probabilities p in their scores (Martens
2020, "New Insights and Perspectives on the Natural Gradient Method"). For a random v with E[vvᵀ] = H

    δᵀHδ = E[(vᵀ J vec(Δ))²] = E[(Σ_t g_tᵀ Δ x_t)²],    g_t = the gradient of vᵀy by the site's output for row t,

and every g_t of every site comes out of one backward pass from v. For H = I, v are random signs (Hutchinson 1990); for
F, v = ∇ log p(label) with labels drawn from p itself. Labels of the data would give the empirical Fisher matrix, which
is no curvature of the divergence (Kunstner et al. 2019). A product Σ h_r Δ_r G Δ_rᵀ of the mean squared gradients with
the Gram matrix (K-FAC's diagonal) would take the gradient to be independent of the inputs, which it is not where one
token of a window has nearly all of their energy (prune/NOTES.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsify_compiler.batches import Batch, Padding, padding, sample_count
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.layout import output_rows, row_chunks
from sparsify_compiler.graph import ConvLayout, DifferentiableGraph, Layout, Site
from sparsify_compiler.passes.gradients import backpropagate
from sparsify_compiler.passes.refine.teacher import ROWS_AT_A_TIME, SMALLEST, sums_to_one
from sparsify_compiler.passes.taps import Taps
from sparsify_compiler.progress import Progress, silent


class Probe(Protocol):
    """A distance between a model's outputs and the dense model's, as random functions with its curvature."""

    @property
    def words(self) -> str:
        """The distance, for the report."""
        ...

    @property
    def by_token(self) -> bool:
        """Whether rows of one sample are squared one by one; see `Sensitivity`."""
        ...

    def draw(self, outputs: tuple[Tensor, ...], hidden: Padding | None, number: int) -> tuple[Tensor, float]:
        """Return vᵀy up to a constant for the dense `outputs` y of batch `number`, and their size: see the module.

        Drawn on the host from `number`: the same on every device. Tokens that padding hides have no part in it. The
        size is NaN where outputs that are not finite leave nothing to draw from.
        """
        ...


@dataclass(frozen=True)
class ErrorProbe:
    """‖Y − Ŷ‖² / ‖Y‖² over all floating-point outputs."""

    words: str = "relative error of the outputs"
    by_token: bool = False

    def draw(self, outputs: tuple[Tensor, ...], hidden: Padding | None, number: int) -> tuple[Tensor, float]:
        """See `Probe`."""
        generator = torch.Generator().manual_seed(number)
        shown = [y if hidden is None else hidden.drop(y) for y in outputs if y.is_floating_point()]
        value, energy = torch.zeros(()), 0.0
        for y in shown:
            signs = torch.empty(y.shape, dtype=torch.bool).random_(0, 2, generator=generator).to(y.device)
            value = value.to(y.device) + torch.where(signs, -y, y).float().sum()
            energy += float(y.detach().float().square().sum(dtype=torch.float64))
        return value, energy


@dataclass(frozen=True)
class DivergenceProbe:
    """KL(dense ‖ other) in nats, a token or a sample, of the distributions over the last axis of the first output.

    Scores or probabilities, as `sums_to_one` finds them.
    """

    by_token: bool
    words: str = "KL divergence of the outputs"

    def draw(self, outputs: tuple[Tensor, ...], hidden: Padding | None, number: int) -> tuple[Tensor, float]:
        """See `Probe`."""
        scores = (outputs[0] if hidden is None else hidden.drop(outputs[0])).flatten(0, -2).float()
        if sums_to_one(scores.detach()):
            scores = scores.clamp_min(SMALLEST).log()
        if not bool(scores.detach().logsumexp(-1).isfinite().all()):
            return scores.sum(), math.nan
        uniform = torch.rand(len(scores), generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        labels = draw_labels(scores.detach(), uniform.to(scores.device))
        return cross_entropy(scores, labels, reduction="sum"), 2.0 * len(labels)


def draw_labels(scores: Tensor, uniform: Tensor) -> Tensor:
    """Return for each row of `scores` (rows, classes) the class int64 at which its probabilities sum beyond `uniform`.

    Every row has finite probabilities, and `uniform` (rows,) float64 lies in [0, 1). A few rows at a time; a class of
    probability zero is never drawn.
    """
    drawn = [torch.empty(0, dtype=torch.int64, device=scores.device)]
    for start in range(0, len(scores), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        sums = scores[part].float().softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn.append(torch.searchsorted(sums, uniform[part, None] * sums[:, -1:], right=True)[:, 0])
    return torch.cat(drawn)


@dataclass(frozen=True)
class Effects:
    """The distance when one site alone is changed, by site name; `words` say which.

    `by_row` names the sites of which some rows could not be told to samples; see `Sensitivity`.
    """

    sizes: Mapping[str, float]
    words: str
    by_row: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """The dense model as `graph`, and the distance that its outputs are to be measured by.

    The sum over t in the module's formula runs over the rows of one sample: one token each in a language model, or the
    positions of an image. What two samples share vanishes in the mean, as their parts of v are independent, so this is
    exact but for the draw, also where a weight is used several times. A language model has few samples and many tokens:
    `by_token` squares every row of every use by itself, as Eschenhagen et al. 2023 do in their setting "expand". That
    leaves out what the errors of two tokens do together and is far less noisy; measured figures of both are in
    prune/NOTES.md. Rows that cannot be told to samples, as `tells_samples` says, are squared one by one as well.
    """

    graph: DifferentiableGraph
    probe: Probe

    def effects(
        self, batches: Sequence[Batch], changes: Mapping[str, tuple[Site, Tensor]], progress: Progress = silent
    ) -> Effects:
        """Return the distance when one site alone is changed; sites that no gradient reaches are left out.

        A gradient of nothing but zeros counts as none: rounding gives that where the outputs do move.
        `changes` (groups, out, in) float32 are Δ by site name. A batch is run twice forwards and once backwards.
        Memory beside the changes: that of `backpropagate`, and one segment's inputs and gradients by its weights.

        Raises:
            ModelError: a segment cannot be run with gradients.
            CalibrationError: the outputs hold nothing to measure, or numbers are not finite.
        """
        squares: dict[str, Tensor] = {}
        by_row: set[str] = set()
        size = 0.0
        for number, batch in enumerate(batches):
            progress("allocate: gradients of the outputs", number, len(batches))
            size += self._add_batch(squares, by_row, batch, number, changes)
        progress("allocate: gradients of the outputs", len(batches), len(batches))
        if not size:
            raise self._unmeasurable(f"{len(batches)} calibration batches", size)
        found = {name: float(square) / size for name, square in squares.items()}
        for name, effect in found.items():
            if not math.isfinite(effect):
                raise CalibrationError(f"[allocate]: the gradients at {name!r} are not finite; check the data")
        reached = {name: effect for name, effect in found.items() if effect or not changes[name][1].any()}
        return Effects(reached, self.probe.words, tuple(name for name in changes if name in by_row))

    def _unmeasurable(self, where: str, size: float) -> CalibrationError:
        return CalibrationError(
            f"[allocate]: no {self.probe.words} can be taken on {where}, whose size is {size:g}: none is floating "
            'point, or they are not finite, or all zero; check the data, or allocate by = "owl"'
        )

    def _add_batch(
        self,
        squares: dict[str, Tensor],
        by_row: set[str],
        batch: Batch,
        number: int,
        changes: Mapping[str, tuple[Site, Tensor]],
    ) -> float:
        """Add one batch's Σ (vᵀ J vec(Δ))² to `squares` by site name, and return the size of its outputs."""
        hidden, samples = padding(batch), sample_count(batch)
        size = 0.0
        by_sample: dict[str, Tensor] = {}

        def objective(outputs: tuple[Tensor, ...]) -> Tensor:
            nonlocal size
            value, size = self.probe.draw(outputs, hidden, number)
            if not value.requires_grad or not math.isfinite(size + float(value.detach())):
                raise self._unmeasurable(f"calibration batch {number}", size)
            return value

        def tap(name: str, x: Tensor, gradient: Tensor) -> None:
            site, change = changes[name]
            assert site.layout is not None
            moved = along(change.to(x.device), site.layout, x, gradient)
            if not self.probe.by_token and tells_samples(x, site.layout, samples):
                _add(by_sample, name, moved.view(samples, -1).sum(1))
                return
            _add(squares, name, moved.square().sum())
            if not self.probe.by_token:
                by_row.add(name)

        sites = {name: site for name, (site, _) in changes.items()}
        taps = Taps(sites, tap)
        backpropagate(self.graph, batch, objective, sites, observe=taps.read, emit=taps.made, keep=False)
        for name, moved in by_sample.items():
            _add(squares, name, moved.square().sum())
        return size


def tells_samples(x: Tensor, layout: Layout, samples: int) -> bool:
    """Say whether the rows of a layer's input `x` are known to come sample by sample, equally many of each.

    So they are where axis 0 has as many entries as the batch has samples, and no other axis of rows has: else either
    may count them. nn.MultiheadAttention(batch_first=True) reads (length, samples, width), then (length · samples,
    width); an expert's rows, of any number, are of the samples that were sent to it. All are of a batch's only sample.
    """
    if samples == 1:
        return True
    if isinstance(layout, ConvLayout):  # axis 0 counts images, if there is an axis for them
        return x.dim() == len(layout.kernel) + 2 and x.shape[0] == samples
    lengths = x.movedim(layout.input_axis, -1).shape[:-1]
    return layout.input_axis % x.dim() != 0 and lengths[0] == samples and lengths.count(samples) == 1


def along(change: Tensor, layout: Layout, x: Tensor, gradient: Tensor) -> Tensor:
    """Return gᵀ Δ x of every row that a layer reads, (rows,) float64: how the objective moves as the weight does.

    `change` (groups, out, in) is Δ, `x` the layer's input and `gradient` that by its output, as `output_rows` takes it.
    """
    made, parts, first = output_rows(gradient, layout).float(), [x.new_empty(0, dtype=torch.float64)], 0
    for rows in row_chunks(x, layout):
        part = made[:, first : first + rows.shape[1]]
        first += rows.shape[1]
        parts.append(((rows.float() @ change.mT) * part).sum((0, 2), dtype=torch.float64))
    return torch.cat(parts)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
