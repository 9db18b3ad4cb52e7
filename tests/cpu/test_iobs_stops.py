"""When a minimisation over sparse vectors ends, and what it says ended it."""

import pytest
import torch

from sparsify_compiler.passes.prune.hard_thresholding import IHT
from sparsify_compiler.passes.prune.iobs import IOBSStep, Stop, minimise
from sparsify_compiler.passes.prune.smooth import Quadratic

# ½ Σ λ (θ − c)² of separate entries: k-IHT with step 1/L keeps the two largest and takes 1 − λ/L off their error.
CURVATURES = torch.tensor([4.0, 2.0, 1.0]).double()
CENTER = torch.tensor([[8.0, 8.0, 0.0]]).double()


def problem(scale: float = 1.0) -> Quadratic:
    return Quadratic(scale * torch.diag(CURVATURES), CENTER)


def descend(stop: Stop, scale: float) -> tuple[str, int]:
    """Run k-IHT from zero: the first entry is right after one step, the second has an error of 8 / 2^t after t."""
    found = minimise(problem(scale), IHT(smoothness=4.0 * scale), torch.zeros(1, 3), 2, stop)
    assert found.settled.tolist() == [found.ended != ("steps",)]
    return found.ended[0], found.steps


@pytest.mark.parametrize("scale", [1.0, 2.0**-80])
def test_each_rule_ends_the_descent_at_the_step_that_it_names(scale: float) -> None:
    assert descend(Stop(20, None), scale) == ("steps", 20)
    # the step to θ_t is 8 / 2^t, ‖θ_t‖ nearly 8 √2: 8 / 128 / 11.3 = 0.0055
    assert descend(Stop(20, 0.006), scale) == ("still", 7)
    assert descend(Stop(20, None, gradient=0.01), scale) == ("gradient", 6)  # 16 / 2^6 of √(32² + 16²)
    assert descend(Stop(20, None, gradient=0.0), scale)[0] == "steps"


def test_a_loss_that_hardly_falls_any_more_ends_it() -> None:
    far = Quadratic(torch.diag(CURVATURES), CENTER, offset=64.0)  # f after t steps is 64 + 64 / 4^t
    found = minimise(far, IHT(smoothness=4.0), torch.zeros(1, 3), 2, Stop(20, None, fall=0.01))
    assert found.ended == ("fall",)
    # step t lowers it by 192 / 4^t: 0.75 of 65 at t = 4, 0.19 of 64 at t = 5
    losses = found.trace.loss[:, 0]
    falls = (losses[:-1] - losses[1:]) / losses[:-1]
    assert bool((falls[:-1] > 0.01).all())
    assert float(falls[-1]) <= 0.01
    assert found.steps == len(falls) == 5


def test_the_first_of_several_rules_is_the_one_that_is_told_and_rows_end_each_by_their_own() -> None:
    every = Stop(5, 1e-12, 1e-12, 1e-12)
    start = torch.cat([CENTER, torch.zeros(1, 3).double()])
    both = Quadratic(torch.diag(CURVATURES), CENTER.expand(2, 3))
    found = minimise(both, IHT(smoothness=4.0), start, 2, every)
    assert found.ended == ("still", "steps")  # the first began at the solution, where all three hold
    assert found.settled.tolist() == [True, False]
    full = minimise(both, IOBSStep(), start, 2, Stop(5, 1e-12, gradient=1e-12))
    assert full.ended == ("still", "gradient")  # a full step lands at once where its support has no slope


def test_the_trace_holds_the_gradient_on_the_kept_set() -> None:
    trace = minimise(problem(), IHT(smoothness=4.0), torch.zeros(1, 3), 2, Stop(3, None)).trace
    first = (32.0**2 + 16.0**2) ** 0.5
    assert trace.slope[:, 0].tolist() == pytest.approx([0.0, 8 / first, 4 / first, 2 / first])
    assert len(trace.slope) == len(trace.loss) == 4
