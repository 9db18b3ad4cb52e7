"""Select masks anew while the model trains: I-OBS on the model's own loss with a diagonal curvature."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.graph import Site
from sparsify_compiler.pattern import Pattern


@dataclass(frozen=True)
class SiteMask:
    """What the mask of one site must be: its pattern, and how many entries of each group's (out, in) are removed."""

    site: Site
    pattern: Pattern
    removed: tuple[int, ...]


@dataclass(frozen=True)
class DiagonalReselect:
    """Keep the weights of largest w² √E[g²], `times` times, evenly over the first half of the steps.

    The score is the loss that removing one weight costs to second order (LeCun et al. 1989, eq. 5), with Adam's running
    root mean square of the gradient as the curvature. Between two selections all weights train, pruned ones unseen by
    the model (`train.Reselect`), from zero: a pruned weight comes back when its gradients agree for long enough. That
    is the step θ − H⁻¹g of Wu et al. 2024 (I-OBS), eq. 5, on the true loss, projected on the pattern. Every site and
    group keeps its count.
    """

    sites: tuple[SiteMask, ...]
    times: int

    def steps(self, steps: int) -> tuple[int, ...]:
        """See `train.Reselect`."""
        return tuple(sorted({max(round(steps / 2 * each / self.times) - 1, 0) for each in range(1, self.times + 1)}))

    def select(self, weights: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `train.Reselect`."""
        found = {}
        for each in self.sites:
            site, name = each.site, each.site.name
            scores = weights[name].square() * second[name].sqrt()
            shares = [removed / (site.out * site.in_) for removed in each.removed]
            masks = [each.pattern.select(scores[group], share, site.run) for group, share in enumerate(shares)]
            found[name] = torch.stack(masks)
        return found


def site_mask(site: Site, pattern: Pattern, keep: Tensor) -> SiteMask:
    """Read from `keep` (groups, out, in) how much of every group was removed."""
    return SiteMask(site, pattern, tuple(int(count) for count in (~keep).flatten(1).sum(1)))
