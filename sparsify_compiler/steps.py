"""Settings of the steps that stand around the layer-by-layer pruning of a recipe; each is a table of its file.

    [allocate]      # how much every site loses, the whole kept
    [permute]       # order input channels for N:M groups, folded into the layers before
    [finetune]      # between two rounds
    [reconstruct]   # segment by segment, towards the dense model's hidden state
    [distill]       # the whole model, towards the dense model's outputs

All of them are training-free in the usual sense of one-shot pruning: calibration data only, no labels, no parameter
added. A table that is left out is a step that is not taken.
"""

from dataclasses import dataclass
from typing import Literal

from sparsify_compiler.precision import Precision, check_precision


@dataclass(frozen=True)
class Allocate:
    """Give sites sparsities of their own, in [0, 1), their mean over weights the one asked for; free patterns only.

    `by` is "owl" (outliers of each segment, Yin et al. 2023) or "error-curve" (the layer error at several sparsities,
    weighed by what it does to the model's outputs). No site moves further than `spread` from the asked sparsity: by
    error curves 0.2 did better than 0.1 throughout, by outliers 0.08 suits 50 % and 0.2 70 % (passes/prune/NOTES.md).

    `weigh` is read by "error-curve" alone. "gradients" predicts all effects from one backward pass a batch; "outputs"
    measures each by running the model from the site on, half a run a site and batch, but needs no gradients
    and is the better guide at high sparsities (prune/NOTES.md).
    """

    by: Literal["owl", "error-curve"] = "error-curve"
    spread: float = 0.2
    weigh: Literal["gradients", "outputs"] = "gradients"

    def __post_init__(self) -> None:
        if self.by not in ("owl", "error-curve"):
            raise ValueError(f"by {self.by!r}: choose owl or error-curve")
        if not 0 < self.spread < 1:
            raise ValueError(f"spread {self.spread}: must lie in (0, 1), the furthest a site's sparsity may move")
        if self.weigh not in ("gradients", "outputs"):
            raise ValueError(f"weigh {self.weigh!r}: choose gradients or outputs")


@dataclass(frozen=True)
class Permute:
    """Order the input channels of N:M sites before pruning, where the order can be folded into the layers before.

    `sweeps` bounds the local search per site.
    """

    sweeps: int = 10

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"sweeps {self.sweeps}: must be at least 1")


@dataclass(frozen=True)
class FineTune:
    """Tune the weights between two rounds by Adam on the round's calibration batches, towards the model's own loss.

    That is the cross-entropy of the tokens themselves for a causal language model, else the squared distance to the
    dense model's outputs. The next round starts from the tuned weights, which iobs and woodtaylor do.

    `epochs` passes at a rate that falls from `rate` to zero, `batches` calibration batches a step. `masked` keeps
    pruned weights zero; else they are free until the next round prunes again, as in Wu et al. 2024 (I-OBS), section 5.
    """

    epochs: int = 1
    rate: float = 1e-5
    batches: int = 8
    masked: bool = False

    def __post_init__(self) -> None:
        check_training(self.epochs, self.rate, self.batches)


@dataclass(frozen=True)
class Reconstruct:
    """Tune each segment's kept weights by Adam after its sites were pruned, before the next segment is.

    The segment, fed by the pruned prefix, is to return what the dense model has there. `epochs` passes over the
    calibration batches at a learning rate that falls from `rate` to zero along a cosine, `batches` of them a step.
    `precision` is that of the products; weights and sums stay float32.
    """

    epochs: int = 8
    rate: float = 3e-4
    batches: int = 1
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_training(self.epochs, self.rate, self.batches)
        check_precision(self.precision)


@dataclass(frozen=True)
class Distill:
    """Tune all pruned sites at once by Adam towards the dense model's outputs, masks re-selected on the way.

    `epochs`, `rate`, `batches` and `precision` as in `Reconstruct`; the loss is the KL divergence between the
    distributions of a language model or a classifier, the mean square elsewhere. Masks are selected anew `reselect`
    times, evenly over the first half of the steps (0: never, which measured best). Small steps do: 1,000 to 4,000
    tokens each; more data is worth more than more epochs.
    """

    epochs: int = 4
    rate: float = 5e-4
    batches: int = 1
    reselect: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_training(self.epochs, self.rate, self.batches)
        check_precision(self.precision)
        if self.reselect < 0:
            raise ValueError(f"reselect {self.reselect}: must be at least 0, how often masks are selected anew")


def check_training(epochs: int, rate: float, batches: int) -> None:
    """Refuse settings that no training can have. Raises ValueError."""
    if epochs < 1:
        raise ValueError(f"epochs {epochs}: must be at least 1; leave the step out instead")
    if not 0 < rate < 1:
        raise ValueError(f"rate {rate}: must lie in (0, 1), Adam's learning rate")
    if batches < 1:
        raise ValueError(f"batches {batches}: must be at least 1, the calibration batches of one step")


Step = Allocate | Permute | FineTune | Reconstruct | Distill
