"""What the theorems of I-OBS say at the ends of their range, and beyond it, worked out by hand."""

from fractions import Fraction
from math import inf, isnan, nan, sqrt

import pytest
import torch
from torch import Tensor

from sparsify_compiler.passes.prune.iobs import IOBSStep, minimise
from sparsify_compiler.passes.prune.iobs_bounds import Constants
from sparsify_compiler.passes.prune.smooth import Quadratic


def constants(sparsity: Tensor, smoothness: float = 1.0) -> Constants:
    one = torch.ones(len(sparsity), dtype=torch.float64)
    return Constants(one, smoothness * one, one, sparsity, one)


def test_no_bound_is_given_where_the_reference_has_more_entries_than_are_kept() -> None:
    reference = torch.tensor([[1.0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.float64)
    problem = Quadratic(torch.eye(6).double(), reference)
    for compensate in (True, False):
        trace = minimise(
            problem,
            IOBSStep(compensate=compensate),
            torch.zeros(2, 6),
            3,
            reference=reference,
            constants=constants(torch.tensor([5, 2])),
        ).trace
        assert trace.distance is not None
        assert trace.bound is not None
        assert trace.distance[1].tolist() == [sqrt(2), 0.0]  # two of the five ones are lost
        for bound in (trace.bound.tight, trace.bound.printed):
            assert bound[1:, 0].isnan().all()
            assert not bound[1:, 1].isnan().any()


@pytest.mark.parametrize(
    ("sparsity", "kept", "tight", "printed"),
    [(2, 6, 1.0, inf), (6, 6, 1.0, 4.0), (3, 3, 4.0, 4.0), (0, 0, 4.0, 4.0), (6, 5, nan, nan), (1, 0, nan, nan)],
)
def test_the_factors_of_theorem_1_at_the_ends_of_its_range(
    sparsity: int, kept: int, tight: float, printed: float
) -> None:
    # L/μ = 9: c = 1 + 3 √ratio, the ratio (d − k)/(d − k*) of d = 6, printed upside down
    rate = constants(torch.tensor([sparsity]), 9.0).compensated(6, torch.tensor([kept]))
    assert rate.tight.tolist() == pytest.approx([tight], nan_ok=True)
    assert rate.printed.tolist() == pytest.approx([printed], nan_ok=True)


@pytest.mark.parametrize(
    ("sparsity", "kept", "tight", "printed"),
    [(2, 6, 1.0, 1 + sqrt(1 / 3)), (6, 6, 1.0, 2.0), (3, 3, 2.0, 2.0), (0, 0, 1.0, 1.0), (6, 5, nan, nan)],
)
def test_the_factors_of_lemma_3_at_the_ends_of_its_range(
    sparsity: int, kept: int, tight: float, printed: float
) -> None:
    rate = constants(torch.tensor([sparsity])).top_k(6, torch.tensor([kept]))
    assert rate.tight.tolist() == pytest.approx([tight], nan_ok=True)
    assert rate.printed.tolist() == pytest.approx([printed], nan_ok=True)


def test_an_infinite_factor_of_nothing_is_nothing_and_of_anything_infinite() -> None:
    rate = constants(torch.tensor([2])).compensated(6, torch.tensor([6]))
    bound = rate.along(torch.tensor([[0.0], [0.5], [0.1]], dtype=torch.float64))
    assert isnan(bound.printed[0])
    assert bound.printed[1:, 0].tolist() == [0.0, inf]
    assert bound.tight[1:, 0].tolist() == [0.0, 0.125]  # M e² / 2μ


def test_factors_are_divided_in_float64() -> None:
    d, kept, sparsity = 10_000_019, 9_999_990, 7
    given = constants(torch.tensor([sparsity]))
    tight = 1 + sqrt(Fraction(d - kept, d - sparsity))
    printed = 1 + sqrt(Fraction(d - sparsity, d - kept))
    rate = given.compensated(d, torch.tensor([kept]))
    assert float(rate.tight) == pytest.approx(tight, rel=1e-14)
    assert float(rate.printed) == pytest.approx(printed, rel=1e-14)
    assert float(given.top_k(d, torch.tensor([kept])).printed) == pytest.approx(
        1 + sqrt(Fraction(sparsity, kept)), rel=1e-14
    )
