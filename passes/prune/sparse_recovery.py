"""The sparse recovery experiment of the I-OBS paper, its Figure 1: find a sparse θ* from y = X θ*.

Wu et al. 2024, section 5.1, with the settings that only its code tells (DiyuanWu/woodtaylor_simulation): every draw
follows that code's order from the same seed, so run for run the problems are the authors' own.

Gaussian prior: d = 128, n = 256, k* = 16 entries of N(0, 1), k = 64. MNIST prior: θ* is a random training image,
raw 0 to 255, d = 784, n = 1568, k = 2k*. X has entries of N(0, 1/n), there is no noise, and the start is the initial
weight of a linear layer, U(±1/√d).

The "paper" scale is what the authors ran: the gradient is that of the mean of n squares, (2/n) XᵀX(θ − θ*), against
the Hessian XᵀX and its largest eigenvalue, so both methods take a step of 2/n; losses are that mean. This, not the
method, is why its curves need hundreds of steps. The "correct" scale takes value, gradient and Hessian of
½ ‖Xθ − y‖²: a Newton step then recovers θ* at once.
"""

import random
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from sparsify_compiler.errors import DataError
from sparsify_compiler.passes.prune.hard_thresholding import IHT
from sparsify_compiler.passes.prune.iobs import IOBSStep, Stop, Update, minimise
from sparsify_compiler.passes.prune.smooth import Quadratic
from sparsify_compiler.passes.prune.sparse_recovery_result import Curve, Prior, RecoveryResult, Scale, quartiles
from sparsify_compiler.passes.prune.supports import TopK

SEED = 1234
"""The authors' seed."""


@dataclass(frozen=True)
class RecoveryProblem:
    """Independent runs: `truth` (runs, d), `kept` (runs,), `starts` (methods, runs, d), one start a method, float64."""

    problem: Quadratic
    truth: Tensor
    kept: Tensor
    starts: Tensor
    rows: int


def gaussian_prior(runs: int = 20, seed: int = SEED, device: str = "cpu") -> RecoveryProblem:
    """Draw the paper's Gaussian problems."""
    rows, d, nonzero = 256, 128, 16
    generator = torch.Generator().manual_seed(seed)
    truths, designs, starts = [], [], []
    for _ in range(runs):
        truth = torch.randn(d, generator=generator)
        truth[torch.randperm(d, generator=generator)[: d - nonzero]] = 0.0
        truths.append(truth)
        designs.append(torch.randn(rows, d, generator=generator) / sqrt(rows))
        starts.append(_linear_starts(3, d, generator))
    return _problem(truths, designs, starts, torch.full((runs,), 64), device)


def mnist_prior(images: Tensor, runs: int = 20, seed: int = SEED, device: str = "cpu") -> RecoveryProblem:
    """Draw the paper's MNIST problems from `images` (count, …), whole numbers from 0 to 255: its training images."""
    d = images[0].numel()
    rows = 2 * d
    generator, which = torch.Generator().manual_seed(seed), random.Random(seed)
    truths, designs, starts = [], [], []
    for _ in range(runs):
        truths.append(images[which.randint(0, len(images) - 1)].reshape(d).float())
        designs.append(torch.randn(rows, d, generator=generator) / sqrt(rows))
        starts.append(_linear_starts(2, d, generator))
    kept = torch.stack([(2 * (truth != 0).sum()).clamp(max=d) for truth in truths])
    return _problem(truths, designs, starts, kept, device)


def read_images(path: str | Path) -> Tensor:
    """Read images (count, rows, columns) with values from 0 to 255 from an .npz file: its `x_train`, or its only stack.

    Raises:
        DataError: no such file, or none or several stacks of images in it.
    """
    try:
        with np.load(path) as archive:
            stacks = {name: archive[name] for name in archive.files if archive[name].ndim == 3}
    except (OSError, ValueError, BadZipFile, AttributeError, TypeError) as error:
        raise DataError(f"cannot read images from {str(path)!r}: {error}; give an .npz file such as MNIST's") from None
    if "x_train" not in stacks and len(stacks) != 1:
        raise DataError(f"{str(path)!r} holds {len(stacks)} stacks of images (count, rows, columns); name one x_train")
    chosen = stacks["x_train"] if "x_train" in stacks else next(iter(stacks.values()))
    return torch.from_numpy(np.ascontiguousarray(chosen))


def sparse_recovery(
    prior: Prior = "gaussian",
    scale: Scale = "paper",
    runs: int = 20,
    steps: int | None = None,
    seed: int = SEED,
    images: Tensor | None = None,
    obc_mask: bool = False,
    device: str = "cpu",
) -> RecoveryResult:
    """Run Topk-I-OBS and k-IHT, and in the correct scale I-OBS with the optimal projection, on `runs` problems.

    `steps` defaults to the paper's 750 (4000 for MNIST), or 100 in the correct scale. `images` (count, 28, 28) are for
    the MNIST prior. `obc_mask` adds the authors' OBC-mask variant, defects and all (Gaussian prior, "paper" scale).

    Raises:
        DataError: no images for the MNIST prior, `obc_mask` elsewhere than it was published, or fewer than 1 run.
    """
    if runs < 1 or (steps is not None and steps < 1):
        raise DataError(f"{runs} runs of {steps} steps: needs at least one of each")
    if obc_mask and (prior, scale) != ("gaussian", "paper"):
        raise DataError("the OBC-mask variant was published for the gaussian prior at the paper's scale only")
    if prior == "mnist" and images is None:
        raise DataError("the mnist prior needs images: give a file with them, as MNIST's own .npz")
    if images is None or prior == "gaussian":
        drawn = gaussian_prior(runs, seed, device)
    else:
        drawn = mnist_prior(images, runs, seed, device)
    steps = steps or ((750 if prior == "gaussian" else 4000) if scale == "paper" else 100)
    share = 2 / drawn.rows if scale == "paper" else 1.0
    methods: list[tuple[str, Update]] = [("Topk-I-OBS", IOBSStep(TopK(), compensate=False, step=share))]
    methods.append(("k-IHT", IHT(step=share)))
    if scale == "correct":
        methods.append(("I-OBS", IOBSStep(TopK())))
    curves = []
    for number, (name, update) in enumerate(methods):
        start = drawn.starts[min(number, 1)]
        solution = minimise(drawn.problem, update, start, drawn.kept, Stop(steps, None), drawn.truth)
        assert solution.trace.distance is not None
        curves.append(Curve(name, quartiles(solution.trace.loss * share), quartiles(solution.trace.distance)))
    if obc_mask:
        losses, distances = obc_mask_variant(drawn, steps)
        curves.append(Curve("OBC mask", quartiles(losses * share), quartiles(distances)))
    return RecoveryResult(prior, scale, runs, seed, steps, tuple(curves))


def obc_mask_variant(drawn: RecoveryProblem, steps: int, epsilon: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Run the OBC-mask variant as it was published: losses ½‖Xθ − y‖² and distances, (steps + 1, runs) float64.

    θ⁺ is cut to the mask that greedy OBS finds on θ, not on θ⁺; `epsilon` on the diagonal of H⁻¹ makes each removal
    inexact; removed entries re-enter the search with what that leaves of them, which rounding decides (an exact zero is
    never chosen): so float32, as published; and H⁻¹ is downdated in place and never restored, so that from the second
    step on it is nearly zero. That is why the curve levels off. Kept for the figure: `GreedyOBS` is the method.
    """
    matrix, center, weight = drawn.problem.matrix.float(), drawn.problem.center.float(), drawn.starts[2].float()
    inverse = torch.linalg.inv(matrix)
    whole = inverse * (2 / drawn.rows)
    runs = torch.arange(len(weight), device=weight.device)
    losses, distances = [], []
    for step in range(steps + 1):
        gradient = torch.bmm((weight - center)[:, None, :], matrix)
        losses.append((gradient[:, 0] * (weight - center)).sum(dim=1) / 2)
        distances.append((weight - drawn.truth).square().sum(dim=1).sqrt())
        if step == steps:
            break
        moved = weight - torch.bmm(gradient, whole)[:, 0]
        mask = torch.ones_like(weight)
        for _ in range(weight.shape[1] - int(drawn.kept[0])):
            diagonal = inverse.diagonal(dim1=1, dim2=2) + epsilon
            scores = weight.square() / diagonal
            scores = torch.where(scores == 0, scores.amax(dim=1, keepdim=True) + 100, scores)
            gone = scores.argmin(dim=1)
            mask[runs, gone] = 0.0
            column, pivot = inverse[runs, :, gone], diagonal[runs, gone][:, None]
            row = inverse[runs, gone] / pivot
            weight = (weight - weight[runs, gone][:, None] / pivot * column) * mask
            inverse.baddbmm_(column[:, :, None], row[:, None, :], alpha=-1)
        weight = mask * moved
    return torch.stack(losses).double(), torch.stack(distances).double()


def _linear_starts(count: int, d: int, generator: torch.Generator) -> Tensor:
    """Draw `count` initial weights (count, d) of a linear layer of d inputs and one output."""
    bound = 1 / sqrt(d)
    return torch.stack([torch.empty(d).uniform_(-bound, bound, generator=generator) for _ in range(count)])


def _problem(
    truths: list[Tensor], designs: list[Tensor], starts: list[Tensor], kept: Tensor, device: str
) -> RecoveryProblem:
    truth = torch.stack(truths).to(device).double()
    x = torch.stack(designs).to(device).double()
    y = (x @ truth[:, :, None])[:, :, 0]
    problem = Quadratic.least_squares(x, y)
    return RecoveryProblem(problem, truth, kept.to(device), torch.stack(starts, dim=1).to(device).double(), x.shape[1])
