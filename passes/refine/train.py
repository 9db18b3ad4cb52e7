"""One training loop for weights with holes: Adam, exact zeros stay exact, masks selected anew where that is asked."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EPSILON = 1e-12
"""Adam's ε. The gradient of a relative loss at one of 1e8 weights is about 1e-9: torch's own 1e-8 would damp it."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What torch's Adam calls the mean gradient and the mean squared gradient of a weight."""

SHORT = 0.95
"""The decay rate of Adam's second moment for runs of tens of steps, not thousands: it forgets in twenty."""

Gradient = Callable[[Mapping[str, Tensor], Sequence[int]], float]
"""Called as gradient(weights, numbers): adds the gradient of the mean loss over the batches `numbers` to every
weight's `grad`, through `add_gradients`, and returns that mean."""

AfterEpoch = Callable[[int, float, Mapping[str, Tensor], Mapping[str, Tensor] | None], None]
"""Called as after_epoch(number from 1, mean training loss, weights with their zeros, keep masks)."""


@dataclass(frozen=True)
class TrainingState:
    """What training goes on from after the epochs that `losses` are of: weights, masks and Adam's moments, on the host.

    Names are "weight.", "keep." or a word of Adam's and a dot before the weight's name. Two runs, one of them cut short
    and gone on with from here, end with the same bits where gradients repeat. On a GPU those of attention may not:
    PyTorch's kernels add them up in no fixed order.
    """

    losses: tuple[float, ...]
    tensors: Mapping[str, Tensor]


Remember = Callable[[TrainingState], None]
"""Called after every epoch, later than `AfterEpoch`."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `epochs` passes in a new order each, `batches` of them a step, drawn from `seed`.

    The rate rises to `rate` in a straight line over the share `warmup` of the steps, in [0, 1), and falls to zero along
    a cosine over the rest. `decay` is that of Adam's second moment.
    """

    epochs: int
    rate: float
    batches: int
    warmup: float = 0.0
    seed: int = 0
    decay: float = 0.999

    def steps(self, count: int) -> int:
        """Return the number of steps over `count` batches."""
        return self.epochs * -(-count // self.batches)

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of `step`, from 0, of `steps`."""
        ramp = math.ceil(self.warmup * steps)
        if step < ramp:
            return self.rate * (step + 1) / ramp
        return self.rate * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp))) / 2

    def order(self, count: int) -> Iterator[list[list[int]]]:
        """Yield for every epoch the batch numbers of its steps."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            numbers = torch.randperm(count, generator=generator).tolist()
            yield [numbers[start : start + self.batches] for start in range(0, count, self.batches)]


class Reselect(Protocol):
    """When masks are selected anew while training, and how. Until the last time, pruned weights train unseen.

    The model is run with the kept weights alone, and the gradient there moves all of them: a straight-through step.
    """

    def steps(self, steps: int) -> tuple[int, ...]:
        """Return, of `steps`, those after which masks are selected, in order."""
        ...

    def select(self, weights: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the new keep masks for `weights` without holes and the `second` moments of their gradients."""
        ...


@dataclass(frozen=True)
class Trained:
    """What `train` did: the mean loss of every epoch that ended, the masks it ended with, and notes for the report."""

    losses: tuple[float, ...]
    keep: Mapping[str, Tensor] | None
    notes: tuple[str, ...] = ()


def train(
    weights: Mapping[str, Tensor],
    keep: Mapping[str, Tensor] | None,
    count: int,
    gradient: Gradient,
    schedule: Schedule,
    reselect: Reselect | None = None,
    after_epoch: AfterEpoch | None = None,
    begin: TrainingState | None = None,
    remember: Remember | None = None,
    say: Callable[[int], None] | None = None,
) -> Trained:
    """Tune `weights`, leaf tensors (groups, out, in) float32, in place over `count` batches by Adam (Kingma & Ba 2015).

    Where `keep` (bool, as the weights) is False a weight must be zero and stays so exactly; None: all are free. A loss
    that is not finite ends the training, and a note says so: whoever calls this keeps the best weights it saw. With
    `begin`, what `remember` was given after an epoch, training goes on from there. `say` is called before every step
    with its number in the epoch, from 0.
    """
    loop = _Loop(weights, dict(keep) if keep is not None else None, reselect, schedule, schedule.steps(count))
    losses: list[float] = []
    step = 0
    if begin is not None:
        loop.restore(begin)
        losses = list(begin.losses)
        step = len(losses) * loop.steps // schedule.epochs
    for epoch, parts in enumerate(schedule.order(count), 1):
        if begin is not None and epoch <= len(begin.losses):
            continue
        total = 0.0
        for number, numbers in enumerate(parts):
            if say is not None:
                say(number)
            loss = loop.step(step, schedule.rate_at(step, loop.steps), numbers, gradient)
            if not math.isfinite(loss):
                note = f"the training loss is {loss} at step {step + 1} of {loop.steps}: training ended; lower the rate"
                return Trained(tuple(losses), loop.keep, (note,))
            total += loss * len(numbers)
            step += 1
        losses.append(total / count)
        if after_epoch is not None:
            after_epoch(epoch, losses[-1], loop.seen(step), loop.keep)
        if remember is not None:
            remember(TrainingState(tuple(losses), loop.tensors()))
    return Trained(tuple(losses), loop.keep)


class _Loop:
    """What goes from step to step."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        keep: dict[str, Tensor] | None,
        reselect: Reselect | None,
        schedule: Schedule,
        steps: int,
    ) -> None:
        self.weights, self.keep, self.steps = weights, keep, steps
        self._reselect = reselect
        self._selections = reselect.steps(steps) if reselect is not None and keep is not None else ()
        self._adam = torch.optim.Adam(list(weights.values()), betas=(0.9, schedule.decay), eps=EPSILON)

    def seen(self, step: int) -> Mapping[str, Tensor]:
        """Return the weights that the model runs with at `step`: leaves of their own while pruned ones train unseen."""
        if self.keep is None or not self._free(step):
            return self.weights
        return {n: (w.detach() * self.keep[n]).requires_grad_() for n, w in self.weights.items()}

    def step(self, step: int, rate: float, numbers: Sequence[int], gradient: Gradient) -> float:
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.zero_grad()
        seen = self.seen(step)
        loss = gradient(seen, numbers)
        if not math.isfinite(loss):
            return loss
        for name, weight in self.weights.items():
            weight.grad = seen[name].grad
            if self.keep is not None and weight.grad is not None and not self._free(step):
                weight.grad.masked_fill_(~self.keep[name], 0.0)
        self._adam.step()
        if step in self._selections:
            self._select(last=step == self._selections[-1])
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of everything that changes from step to step; see `TrainingState`."""
        found = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        found |= {f"keep.{name}": mask for name, mask in (self.keep or {}).items()}
        for name, weight in self.weights.items():
            found |= {f"{word}.{name}": value for word, value in self._adam.state.get(weight, {}).items()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

    def restore(self, state: TrainingState) -> None:
        """Take over what `tensors` returned."""
        for name, weight in self.weights.items():
            weight.detach().copy_(state.tensors[f"weight.{name}"])
            if self.keep is not None:
                self.keep[name] = state.tensors[f"keep.{name}"].to(weight.device)
            if f"step.{name}" in state.tensors:  # a weight that no output depends on has none
                count = state.tensors[f"step.{name}"]  # Adam wants it on the host
                moments = {word: state.tensors[f"{word}.{name}"].to(weight.device) for word in MOMENTS}
                self._adam.state[weight] = {"step": count.clone(), **moments}

    def _free(self, step: int) -> bool:
        return bool(self._selections) and step <= self._selections[-1]

    def _select(self, last: bool) -> None:
        assert self._reselect is not None
        state = self._adam.state  # a weight that no output depends on has none
        second = {n: state[w]["exp_avg_sq"] if w in state else torch.zeros_like(w) for n, w in self.weights.items()}
        self.keep = self._reselect.select({n: w.detach() for n, w in self.weights.items()}, second)
        if last:  # from here on exact zeros, in the weights and in what Adam remembers of their gradients
            for name, weight in self.weights.items():
                weight.detach().masked_fill_(~self.keep[name], 0.0)
                if weight in state:
                    state[weight]["exp_avg"].masked_fill_(~self.keep[name], 0.0)


def add_gradients(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    """Add `gradients` to the weights' `grad`; None adds nothing."""
    for name, gradient in gradients.items():
        if gradient is not None:
            old = weights[name].grad
            weights[name].grad = gradient.detach() if old is None else old.add_(gradient)
