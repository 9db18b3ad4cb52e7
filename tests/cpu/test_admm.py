"""The pieces of the descent: the decomposition, the penalty and the units."""

import pytest
import torch
from methods import inputs

from sparsify_compiler.passes.prune.admm import Schedule, exponent, scaled_spectrum

SCHEDULE = Schedule(0.1, 3, 1.3, 1.2, 1.1, 5.0, 1e6, 3e-4, 30, 300)


def test_the_scaled_spectrum_multiplies_back_to_the_damped_matrix() -> None:
    x = inputs(50, 9)
    x[:, 4] = 0
    gram = x.T @ x / 50
    spectrum = scaled_spectrum(gram, 0.01)
    matrix = spectrum.vectors @ torch.diag(spectrum.values) @ spectrum.vectors.T
    back = spectrum.scale[:, None] * matrix * spectrum.scale
    expected = gram + torch.diag((gram.diagonal() > 0) * 0.01 * gram.diagonal().mean())
    assert torch.allclose(back, expected, atol=1e-12 * float(gram.max()))  # float64, nine terms
    assert torch.allclose(matrix.diagonal(), torch.ones(9).double(), atol=1e-12)
    inverse = spectrum.inverse(0.3).double()
    # float32 entries of size at most 1 / 0.3, nine terms.
    assert torch.allclose(inverse @ (matrix + 0.3 * torch.eye(9).double()), torch.eye(9).double(), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "started", "factor", "then"),
    [
        (0.2, False, 1.3, True),
        (0.1, False, 1.2, True),
        (0.005, True, 1.1, True),
        (0.005, False, 0.2, False),
        (0.0, False, 0.2, False),
    ],
)
def test_the_penalty_grows_by_how_much_of_the_mask_moved(
    change: float, started: bool, factor: float, then: bool
) -> None:
    assert SCHEDULE.turn(1.0, 3, change, started) == (pytest.approx(factor), then, False)


def test_the_descent_ends_when_the_mask_stands_still() -> None:
    assert SCHEDULE.turn(1.0, 3, 0.0, True)[2]
    assert not SCHEDULE.turn(1.0, 30, 2e-4, True)[2]
    assert SCHEDULE.turn(1.0, 33, 2e-4, True)[2]
    assert not SCHEDULE.turn(1.0, 33, 4e-4, True)[2]
    assert SCHEDULE.turn(4e-6, 3, 0.0, False)[2]  # a lower penalty would change nothing
    assert SCHEDULE.turn(9e5, 3, 0.2, True)[0] * 9e5 == pytest.approx(1e6)


def test_a_power_of_two_above_the_largest_size() -> None:
    assert [exponent(torch.tensor([value, 0.0])) for value in (0.0, 1.0, -3.0, 0.25)] == [1.0, 2.0, 4.0, 0.5]
