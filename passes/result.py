"""What a pass over a graph returns: one record per pruning problem, whether anything changed, and notes."""

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class SiteOutcome:
    """What became of one pruning problem. A grouped convolution has one a group.

    `site` is the site's name, `problem` the problem's. `keep` (out, in) bool. `loss_selected`, `loss` and
    `relative_error` = loss / (‖X Wᵀ‖² / tokens) are None without a Gram matrix; `damp` where none was needed.
    """

    site: str
    problem: str
    keep: Tensor
    loss_selected: float | None
    loss: float | None
    relative_error: float | None
    damp: float | None
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()

    def sparsity(self) -> float:
        """Return the share removed."""
        return 1 - int(self.keep.sum()) / self.keep.numel()


@dataclass(frozen=True)
class PassResult:
    """What a pass did. `modified` is False where the graph came back as it was."""

    outcomes: tuple[SiteOutcome, ...] = ()
    modified: bool = False
    notes: tuple[str, ...] = ()


def outcome(site: str, problem: LayerProblem, solution: LayerSolution, seconds: float) -> SiteOutcome:
    """Sum up `solution` to `problem`, which took `seconds`."""
    energy = problem.energy()
    relative = solution.loss / energy if solution.loss is not None and energy else None
    return SiteOutcome(
        site=site,
        problem=problem.name,
        keep=solution.keep,
        loss_selected=solution.loss_selected,
        loss=solution.loss,
        relative_error=relative,
        damp=solution.stats.get("damp"),
        tokens=problem.gram.tokens if problem.gram is not None else 0,
        seconds=seconds,
        notes=solution.notes,
    )
