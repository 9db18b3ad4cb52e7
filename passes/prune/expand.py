"""Differentiate the model's own loss at the weights of now: what WoodTaylor steps along, and by what it measures."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_compiler.batches import Batch, Padding, padding
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.layout import output_rows, row_chunks
from sparsify_compiler.graph import DifferentiableGraph, Layout, Site
from sparsify_compiler.passes.gradients import ModelLoss, backpropagate
from sparsify_compiler.passes.taps import Taps
from sparsify_compiler.problem import Expansion, Gram
from sparsify_compiler.progress import Progress, silent
from sparsify_compiler.statistics import SLICE_ROWS, add_gram


@dataclass(frozen=True)
class SiteExpansion:
    """A `problem.Expansion` of every group of one site, per term of the loss.

    `gradient` (groups, out, in) float32; `output_curvature` (groups, out) float64; `inputs` (groups, in, in) float64 is
    the second moment of the inputs in which every token counts by its squared gradient, over `tokens` tokens: zero for
    a group that no gradient reaches, None where that was not asked for or none arrived at all.
    """

    gradient: Tensor
    output_curvature: Tensor
    inputs: Tensor | None = None
    tokens: int = 0
    terms: int = 0
    sites: int = 1

    def of_group(self, group: int, device: torch.device) -> Expansion:
        """Return the expansion of one group's weight, on `device`; without `inputs` where no gradient reaches it."""
        inputs = None
        if self.inputs is not None and bool(self.output_curvature[group].any()):
            inputs = Gram(self.inputs[group].to(device), self.tokens)
        gradient, curvature = self.gradient[group].to(device), self.output_curvature[group].to(device)
        return Expansion(gradient.double(), curvature, inputs, self.terms, self.sites)


Expand = Callable[[Sequence[Batch], Mapping[str, Tensor]], Mapping[str, SiteExpansion]]
"""Called as expand(batches, dense weights by site name) on the graph as it is: the sites that need an expansion."""


def expand(
    graph: DifferentiableGraph,
    batches: Sequence[Batch],
    sites: Mapping[str, Site],
    loss: ModelLoss,
    weighing: frozenset[str] = frozenset(),
    progress: Progress = silent,
) -> dict[str, SiteExpansion]:
    """Return the expansion of `loss` around the weights that the graph has now, for `sites` by name.

    All of it is taken at one point, as I-OBS asks: also the weighed inputs, of the sites in `weighing`, are those of
    the graph as it is, not those through a prefix pruned meanwhile. A batch is run twice forwards and once backwards
    (once more of both where the loss has a probe). Memory beside that of `backpropagate`: 4 bytes a weight of `sites`,
    on the weight's device, and 8 in² a site that weighs, on the graph's.

    Rows that padding hides add nothing to the curvature, as they add nothing to a Gram matrix. Where a weight is used
    more than once in a term (the positions of an image, the tokens before the predicted one), the squared gradients of
    the uses are added, not their sum squared: Eschenhagen et al. 2023, K-FAC-expand, as Grosse & Martens 2016 do for
    convolutions.

    Raises:
        CalibrationError: the loss is not finite on a batch (named), or no batch has a term of it.
    """
    gradients: dict[str, Tensor] = {}
    squares = {name: _Squares(site, site.layout, name in weighing) for name, site in sites.items() if site.layout}
    terms = 0
    for number, batch in enumerate(batches):
        progress("gradient of the model's loss", number, len(batches))
        terms += loss.count(batch)
        probe = loss.probe(batch, number)
        taps = _taps(sites, squares, padding(batch))
        if probe is None:
            value, found = backpropagate(graph, batch, loss.objective(batch), sites, None, taps.read, taps.made)
        else:
            value, found = backpropagate(graph, batch, loss.objective(batch), sites)
            value += backpropagate(graph, batch, probe, sites, None, taps.read, taps.made, keep=False)[0]
        if not math.isfinite(value):
            raise CalibrationError(
                f"the model's loss is {value} on calibration batch {number}; check the data, the model's dtype and the "
                "weights it has by now"
            )
        for name, gradient in found.items():
            gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient
    progress("gradient of the model's loss", len(batches), len(batches))
    if not terms:
        raise CalibrationError("the model's loss has no term on any calibration batch; give longer or unmasked windows")
    made = {name: squares[name].expansion(gradient.div_(terms), terms) for name, gradient in gradients.items()}
    return {name: replace(each, terms=terms, sites=len(sites)) for name, each in made.items()}


@dataclass
class _Squares:
    """Sums of squared output gradients d of one site: Σ d² by output, and Σ ‖d‖² x xᵀ where it weighs."""

    site: Site
    layout: Layout
    weighs: bool
    tokens: int = 0
    _by_output: Tensor | None = None
    _inputs: Tensor | None = None

    def add(self, x: Tensor, gradient: Tensor, hidden: Padding | None) -> None:
        squared = output_rows(gradient, self.layout, hidden).float().square()  # (groups, tokens, out)
        groups, tokens, out = squared.shape
        if self._by_output is None:
            self._by_output = torch.zeros(groups, out, dtype=torch.float64, device=x.device)
        self._by_output += squared.sum(1, dtype=torch.float64)
        self.tokens += tokens
        if not self.weighs:
            return
        if self._inputs is None:
            self._inputs = torch.zeros(groups, *(2 * [self.site.in_]), dtype=torch.float64, device=x.device)
        share, first = squared.sum(2).sqrt()[:, :, None], 0
        for rows in row_chunks(x, self.layout, hidden):
            rows = rows.float() * share[:, first : first + rows.shape[1]]
            first += rows.shape[1]
            for start in range(0, rows.shape[1], SLICE_ROWS):
                add_gram(self._inputs, rows[:, start : start + SLICE_ROWS])

    def expansion(self, gradient: Tensor, terms: int) -> SiteExpansion:
        if self._by_output is None:
            return SiteExpansion(gradient, torch.zeros(gradient.shape[:2], dtype=torch.float64))
        curvature = self._by_output / terms
        if self._inputs is None:
            return SiteExpansion(gradient, curvature)
        total = self._by_output.sum(1)  # (groups,), Σ ‖d‖²; where it is 0, so are the inputs
        lower = self._inputs.tril() / torch.where(total == 0, 1.0, total)[:, None, None]
        return SiteExpansion(gradient, curvature, lower + lower.tril(-1).mT, self.tokens)


def _taps(sites: Mapping[str, Site], squares: Mapping[str, _Squares], hidden: Padding | None) -> Taps:
    """Return observers of one batch that add to `squares`."""
    watched = {name: site for name, site in sites.items() if name in squares}
    return Taps(watched, lambda name, x, gradient: squares[name].add(x, gradient, hidden))
