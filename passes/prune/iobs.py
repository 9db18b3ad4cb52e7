"""I-OBS: Newton steps projected onto the sparse vectors in the norm of the Hessian.

Wu, Modoranu, Safaryan, Kuznedelev & Alistarh 2024, "The Iterative Optimal Brain Surgeon: Faster Sparse Recovery by
Leveraging Second-Order Information" (arXiv 2408.17163), Alg. 1, for min f(θ) over ‖θ‖₀ <= k:

    θ⁺ = θ − η H⁻¹ ∇f(θ)                     the Newton point
    Q  = a support of k entries for θ⁺       supports.py and its neighbours
    θ  = argmin ‖θ − θ⁺‖_H on Q              option 2, or θ⁺ cut to Q (Topk-I-OBS, option 1)

    >>> problem = Quadratic.least_squares(x, y)                      # x (problems, n, d), y (problems, n)
    >>> minimise(problem, IOBSStep(GreedyOBS()), torch.zeros(1, 128), kept=16).weight

Departures: the projection is solved with H_QQ, not by I − H⁻¹Hˢ, which squares the condition number; the paper's
Lemma 7 bounds ‖H⁻¹Hˢ‖₂ by 1, but that projection is oblique, and only its H-norm is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune.curvature import Curvature
from sparsify_compiler.passes.prune.iobs_bounds import Bound, Constants, Rate
from sparsify_compiler.passes.prune.smooth import Smooth
from sparsify_compiler.passes.prune.supports import Selector, TopK, keep_counts


@dataclass(frozen=True)
class Point:
    """Where an iteration stands: `weight` (problems, d), zero off `keep` (problems, d) bool; `gradient` of the loss."""

    weight: Tensor
    keep: Tensor
    gradient: Tensor


class Update(Protocol):
    """One step of a method. An implementation is a frozen dataclass whose fields are its hyper-parameters."""

    @property
    def name(self) -> str:
        """The word in tables."""
        ...

    def advance(self, problem: Smooth, point: Point, kept: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return the next weight (problems, d), its keep mask with `kept` (problems,) entries a row, and notes."""
        ...

    def rate(self, constants: Constants, d: int, kept: Tensor) -> Rate | None:
        """Return the guarantee for one step, None where there is none."""
        ...


@dataclass(frozen=True)
class IOBSStep:
    """The step of Alg. 1. `compensate` False is option 1 (with `TopK`, Topk-I-OBS).

    `step` is η in (0, 1], `damp` in [0, 1] a ridge on H as a share of its mean diagonal; a curvature that is not
    positive definite has it raised tenfold (first to 1e-8), which the solution's notes say.
    """

    selector: Selector = field(default_factory=TopK)
    compensate: bool = True
    step: float = 1.0
    damp: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step {self.step}: must lie in (0, 1], 1 is the Newton step")
        if not 0 <= self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie in [0, 1], a share of the mean diagonal of the Hessian")

    @property
    def name(self) -> str:
        """The selector's, and what is done with its choice."""
        return f"I-OBS, {self.selector.name}" if self.compensate else f"{self.selector.name} I-OBS, uncompensated"

    def advance(self, problem: Smooth, point: Point, kept: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """See `Update`.

        Raises:
            SingularGramError: the curvature is indefinite at every damping up to 1.
            DataError: the selector needs the entries of H, and the problem gives products.
        """
        curvature = problem.curvature(point.weight).damped(self.damp)
        target = point.weight - self.step * curvature.solve(point.gradient)
        keep = self.selector.select(target, curvature, kept)
        return self._fit(target, keep, curvature), keep, curvature.notes

    def _fit(self, target: Tensor, keep: Tensor, curvature: Curvature) -> Tensor:
        return curvature.project(target, keep) if self.compensate else target.masked_fill(~keep, 0.0)

    def rate(self, constants: Constants, d: int, kept: Tensor) -> Rate | None:
        """See `Update`; Theorem 1 for compensated steps, Lemma 3 for Topk-I-OBS."""
        if self.compensate:
            return constants.compensated(d, kept, self.step, self.damp) if self.selector.beats_top_k else None
        return constants.top_k(d, kept, self.step, self.damp) if isinstance(self.selector, TopK) else None


@dataclass(frozen=True)
class Trace:
    """What happened, one row an iterate θ_0, θ_1, … and one column a problem; float64, on the problem's device.

    `loss` f(θ_t); `distance` ‖θ_t − reference‖ (None without one); `changed` entries that entered or left the support
    in the step to θ_t; `moved` ‖θ_t − θ_{t−1}‖ / ‖θ_t‖; `slope` ‖∇f(θ_t)_Q‖ / ‖∇f(θ_0)‖ with Q the support of θ_t.
    `bound` holds what the theorem allows for the distance of θ_t, given that of θ_{t−1} (NaN for θ_0), None without
    constants or without a guarantee for the method.
    """

    loss: Tensor
    changed: Tensor
    moved: Tensor
    slope: Tensor
    distance: Tensor | None = None
    bound: Bound | None = None


@dataclass(frozen=True)
class SparseSolution:
    """`weight` (problems, d) float64, zero off `keep`; `settled` (problems,) bool: a rule of `Stop` held.

    `ended` says of every problem which one: "still", "fall" or "gradient", or "steps" where none did. `steps` is how
    many steps any problem took.
    """

    weight: Tensor
    keep: Tensor
    settled: Tensor
    steps: int
    trace: Trace
    ended: tuple[str, ...]
    notes: tuple[str, ...] = ()


RULES = ("steps", "still", "fall", "gradient")
"""What can end a problem: all steps taken, or the first rule of `Stop` that held."""


@dataclass(frozen=True)
class Stop:
    """Stop after `most_steps`, and a problem as soon as one of three rules holds; None never does.

    - still: its support stays and its step is short, ‖θ_{t+1} − θ_t‖ <= `tolerance` · ‖θ_{t+1}‖. A later step would
      give the same.
    - fall: its loss hardly changes, |f(θ_{t+1}) − f(θ_t)| <= `fall` · |f(θ_t)|, whatever its support does.
    - gradient: on the kept set its gradient is short, ‖∇f(θ_{t+1})_Q‖ <= `gradient` · ‖∇f(θ_0)‖: the weights are the
      best on that support. Another support may be better still, which a full step finds out only by one more.

    A problem that settled keeps its weight while others go on, so that its result does not depend on its neighbours.
    """

    most_steps: int = 100
    tolerance: float | None = 1e-12
    fall: float | None = None
    gradient: float | None = None

    def held(self, changed: Tensor, moved: Tensor, fallen: Tensor, slope: Tensor) -> Tensor:
        """Return (problems,) int64: which of `RULES` ended a problem by its last step, 0 where none did."""
        rules = (
            None if self.tolerance is None else (changed == 0) & (moved <= self.tolerance),
            None if self.fall is None else fallen <= self.fall,
            None if self.gradient is None else slope <= self.gradient,
        )
        ended = torch.zeros_like(changed)
        for number, holds in enumerate(rules, 1):
            if holds is not None:
                ended = torch.where((ended == 0) & holds, number, ended)
        return ended


def minimise(
    problem: Smooth,
    update: Update,
    start: Tensor,
    kept: int | Tensor,
    stop: Stop | None = None,
    reference: Tensor | None = None,
    constants: Constants | None = None,
    batches: Callable[[int], Smooth] | None = None,
) -> SparseSolution:
    """Minimise `problem` over weights with at most `kept` non-zeros a row, from `start` (problems, d).

    `kept` is one count or (problems,) of them. `start` need not be sparse: the first step makes it so. `reference`
    (problems, d) and `constants` fill the trace. `batches` gives the loss that step t takes its gradient and curvature
    from (the stochastic setting); the trace is of `problem` all the same. Runs in float64 on the device of `start`.

    Raises:
        ValueError: `kept` outside 0..d.
        CalibrationError: a loss or gradient that is not finite; the message names the step.
        SingularGramError, DataError: as the update says.
    """
    stop = stop or Stop()
    weight = start.detach().double().clone()
    counts = _counts(kept, weight)
    keep = weight != 0
    ended = torch.zeros_like(counts)
    value, gradient = _checked(problem, weight, 0)
    history = _History(gradient.norm(dim=1), reference)
    history.add(weight, keep, value, gradient, torch.zeros_like(counts), torch.zeros_like(value))
    notes: dict[str, None] = {}
    for step in range(stop.most_steps):
        used, slope = (problem, gradient) if batches is None else _drawn(batches, step, weight)
        new, new_keep, said = update.advance(used, Point(weight, keep, slope), counts)
        notes |= dict.fromkeys(said)
        new = torch.where(ended[:, None] > 0, weight, new)
        new_keep = torch.where(ended[:, None] > 0, keep, new_keep)
        changed, moved = (new_keep != keep).sum(dim=1), _share((new - weight).norm(dim=1), new.norm(dim=1))
        before, weight, keep = value, new, new_keep
        value, gradient = _checked(problem, weight, step + 1)
        history.add(weight, keep, value, gradient, changed, moved)
        fallen = _share((value - before).abs(), before.abs())
        ended = torch.where(ended > 0, ended, stop.held(changed, moved, fallen, history.slopes[-1]))
        if bool((ended > 0).all()):
            break
    trace = history.trace(lambda distance: _bound(update, constants, distance, weight.shape[1], counts))
    words = tuple(RULES[number] for number in ended.tolist())
    return SparseSolution(weight, keep, ended > 0, len(history.slopes) - 1, trace, words, tuple(notes))


class _History:
    """The rows of a `Trace` so far; `first` (problems,) is the length of the gradient at the start."""

    def __init__(self, first: Tensor, reference: Tensor | None) -> None:
        self.slopes: list[Tensor] = []
        self._first, self._reference = first, reference
        self._losses: list[Tensor] = []
        self._changes: list[Tensor] = []
        self._moves: list[Tensor] = []
        self._distances: list[Tensor] = []

    def add(
        self, weight: Tensor, keep: Tensor, value: Tensor, gradient: Tensor, changed: Tensor, moved: Tensor
    ) -> None:
        self.slopes.append(_share((gradient * keep).norm(dim=1), self._first))
        self._losses.append(value)
        self._changes.append(changed)
        self._moves.append(moved)
        if self._reference is not None:
            self._distances.append((weight - self._reference.to(weight)).square().sum(dim=1).sqrt())

    def trace(self, bound: Callable[[Tensor | None], Bound | None]) -> Trace:
        loss, changed, moved, slope = map(torch.stack, (self._losses, self._changes, self._moves, self.slopes))
        distance = torch.stack(self._distances) if self._distances else None
        return Trace(loss, changed, moved, slope, distance, bound(distance))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, 0 where both are."""
    return part / whole.clamp_min(torch.finfo(whole.dtype).tiny)


def top_k(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return T_k: `weight` (problems, d) with all but the `kept` (problems,) largest |entries| zero, and their mask."""
    keep = keep_counts(weight.abs(), kept)
    return weight.masked_fill(~keep, 0.0), keep


def _counts(kept: int | Tensor, weight: Tensor) -> Tensor:
    problems, d = weight.shape
    counts = torch.as_tensor(kept, device=weight.device).long().expand(problems)
    if bool(((counts < 0) | (counts > d)).any()):
        raise ValueError(f"kept {kept}: must lie in 0..{d}, the number of entries that stay")
    return counts


def _drawn(batches: Callable[[int], Smooth], step: int, weight: Tensor) -> tuple[Smooth, Tensor]:
    drawn = batches(step)
    return drawn, _checked(drawn, weight, step)[1]


def _checked(problem: Smooth, weight: Tensor, step: int) -> tuple[Tensor, Tensor]:
    value, gradient = problem.value_and_gradient(weight)
    if not (torch.isfinite(value).all() and torch.isfinite(gradient).all()):
        raise CalibrationError(
            f"the loss or its gradient is not finite after {step} steps; check the data, shorten the step or raise damp"
        )
    return value, gradient


def _bound(
    update: Update, constants: Constants | None, distance: Tensor | None, d: int, counts: Tensor
) -> Bound | None:
    rate = None if constants is None or distance is None else update.rate(constants, d, counts)
    return None if rate is None or distance is None else rate.along(distance)
