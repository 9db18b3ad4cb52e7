"""Swaps against exhaustive search: gains are exact, the end is a 1-swap optimum, the loss never rises."""

from dataclasses import replace

import pytest
import torch
from methods import (
    METHODS,
    Case,
    every_case,
    every_method,
    inputs,
    obeys,
    problem_from,
    problem_of,
    scaled,
    with_targets,
)
from torch import Tensor

from sparsify_compiler.errors import CalibrationError, DataError, SingularGramError
from sparsify_compiler.passes.prune import swaps
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.quadratic import damped_quadratic, tile_of
from sparsify_compiler.passes.prune.refit import refit
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.swap_gains import disjoint_swaps, swap_gains
from sparsify_compiler.passes.prune.swaps import Swapped, refine
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.problem import Gram, LayerProblem, Needs, Pruner

TINY = (
    Case(Unstructured(), 0.5, 6, 8),
    Case(Unstructured(), 0.3, 4, 7),
    Case(NM(2, 4), 0.5, 5, 8),
    Case(NM(1, 3), 2 / 3, 4, 8),
    Case(NM(2, 3), 1 / 3, 3, 8, 4),
    Case(Block(1, 2), 0.5, 5, 8),
    Case(Block(2, 1), 0.5, 6, 8),
    Case(Block(3, 2), 0.4, 6, 8),
    Case(Block(2, 4), 0.5, 4, 16),
)

every_tiny = pytest.mark.parametrize("case", TINY, ids=str)


def best_loss(problem: LayerProblem, rows: slice, kept: Tensor) -> float:
    """The loss of some rows re-solved on `kept` (in,) by a general solver, up to a constant per row."""
    assert problem.gram is not None
    matrix = problem.gram.matrix
    cross = matrix if problem.targets is None else problem.targets.cross
    moment = (problem.weight[rows].double() @ cross.T)[:, kept]
    return -float((moment * torch.linalg.solve(matrix[kept][:, kept], moment.T).T).sum())


def neighbours(problem: LayerProblem, keep: Tensor) -> list[Tensor]:
    """Every mask (in,) that one swap of tiles makes of `keep` (in,), the pattern obeyed."""
    _, cols = tile_of(problem.pattern)
    found = []
    for out in range(0, len(keep), cols):
        for back in range(0, len(keep), cols):
            if keep[out] and not keep[back]:
                other = keep.clone()
                other[out : out + cols] = False
                other[back : back + cols] = True
                found.append(other)
    return [other for other in found if obeys(replace(problem).pattern, other[None], problem.run) is None]


def shifted(problem: LayerProblem) -> LayerProblem:
    """The same problem with dense targets that its inputs do not give."""
    in_ = problem.weight.shape[1]
    x_dense = inputs(4 * in_ + 8, in_, 1)
    x = x_dense + 0.5 * torch.randn(len(x_dense), in_, generator=torch.Generator().manual_seed(3)).double()
    return with_targets(problem_from(x, problem.weight, problem.pattern, problem.sparsity, problem.run), x, x_dense)


@every_tiny
@pytest.mark.parametrize("targets", [False, True], ids=["own", "dense targets"])
def test_the_end_is_a_mask_that_no_single_swap_improves(case: Case, targets: bool) -> None:
    problem = shifted(problem_of(case)) if targets else problem_of(case)
    rows, _ = tile_of(case.pattern)
    least_gain = 1e-4
    solution = refine(problem, Magnitude().prune(problem), rounds=100, least_gain=least_gain)
    assert solution.stats["swap_rounds"] < 100
    rest = best_loss(problem, slice(None), torch.ones(case.in_).bool())
    for lane in range(0, case.out, rows):
        here = slice(lane, lane + rows)
        now = best_loss(problem, here, solution.keep[lane])
        full = best_loss(problem, here, torch.ones(case.in_).bool())
        single = Block(1, case.pattern.cols) if isinstance(case.pattern, Block) else case.pattern
        for other in neighbours(replace(problem, pattern=single), solution.keep[lane]):
            # The ridge of 1e-6 that the search works with moves losses by about that share of the energy.
            assert now - best_loss(problem, here, other) <= least_gain * (now - full) + 1e-5 * abs(rest)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 1), (1, 2), (2, 2), (3, 4)])
def test_gains_are_those_of_solving_anew(rows: int, cols: int) -> None:
    in_ = 4 * cols
    x = inputs(60, in_)
    gram = x.T @ x / 60
    moment = torch.randn(rows, in_, generator=torch.Generator().manual_seed(0)).double() @ gram

    def value(kept: list[int]) -> float:
        at = torch.cat([torch.arange(tile * cols, tile * cols + cols) for tile in kept])
        return float((moment[:, at] * torch.linalg.solve(gram[at][:, at], moment[:, at].T).T).sum())

    kept, removed = torch.arange(2 * cols), torch.arange(2 * cols, 4 * cols)
    inverse = torch.linalg.inv(gram[kept][:, kept])
    weight = inverse @ moment[:, kept].T
    cross = gram[removed][:, kept]
    own = torch.stack([gram[at : at + cols, at : at + cols] for at in (2 * cols, 3 * cols)])
    residual = moment[:, removed].T - cross @ weight
    gains = swap_gains(inverse[None], cross[None], own[None], weight[None], residual[None], cols)[0]
    for put_in in (0, 1):
        for out in (0, 1):
            expected = value([1 - out, 2 + put_in]) - value([0, 1])
            assert float(gains[put_in, out]) == pytest.approx(expected, rel=1e-8)  # float64, condition about 1e3


def test_gains_in_float32_are_near_those_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 8, 40))
    double = refine(problem, Magnitude().prune(problem))
    monkeypatch.setattr(swaps, "SINGLE", 0)
    single = refine(problem, Magnitude().prune(problem))
    assert double.loss is not None
    assert single.loss == pytest.approx(double.loss, rel=1e-2)  # near ties may fall the other way


@every_method
@every_case
def test_the_re_solved_loss_never_rises_and_pattern_and_counts_stay(method: Pruner, case: Case) -> None:
    problem = problem_of(case)
    assert problem.gram is not None
    before = problem.weight.clone(), problem.gram.matrix.clone()
    selected = method.prune(problem)
    solved = refit(problem, selected)
    solution = prune_with(problem, Swapped(method))
    assert obeys(case.pattern, solution.keep, case.run) is None
    assert torch.equal(solution.keep.sum(dim=1), selected.keep.sum(dim=1))
    assert solution.loss is not None
    assert solved.loss is not None
    energy = problem.energy()
    assert energy is not None
    assert solution.loss <= solved.loss + 1e-12 * energy  # float64 sums of the size of the energy
    assert torch.equal(before[0], problem.weight)
    assert torch.equal(before[1], problem.gram.matrix)


@every_case
def test_twice_the_same_and_free_of_scale(case: Case) -> None:
    problem = problem_of(case)
    first, again = Swapped(Wanda()).prune(problem), Swapped(Wanda()).prune(problem_of(case))
    assert torch.equal(first.weight, again.weight)
    other = Swapped(Wanda()).prune(scaled(problem, 8.0, 0.25))
    # Powers of two shift exponents only, so every step of the arithmetic is the same: exact equality.
    assert torch.equal(first.keep, other.keep)
    assert torch.equal(first.weight * 8, other.weight)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 4), Block(4, 4)], ids=str)
def test_swaps_gain_on_every_method(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    problem = problem_from(inputs(256, 48), torch.randn(32, 48, generator=generator), pattern, 0.5)
    for method in (Magnitude(), Wanda(), SparseGPT(), OBC()):
        plain, better = prune_with(problem, method).loss, prune_with(problem, Swapped(method)).loss
        assert plain is not None
        assert better is not None
        assert better < plain


@pytest.mark.parametrize("together", [1, 64])
def test_one_swap_a_round_or_many_end_alike(together: int) -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 12, 40))
    start = Magnitude().prune(problem)
    solution = refine(problem, start, rounds=100, together=together)
    reference = refine(problem, start, rounds=100, together=7)
    assert solution.loss is not None
    assert solution.loss == pytest.approx(reference.loss, rel=0.15)  # different local optima of one landscape


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 12, 20))
    start = Magnitude().prune(problem)
    whole = refine(problem, start)
    monkeypatch.setattr(swaps, "CPU_BYTES", 8 * 20 * 20 * 5)  # five lanes at a time
    parts = refine(problem, start)
    assert torch.equal(whole.keep, parts.keep)


def test_rows_that_keep_all_or_nothing_stay() -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 4, 12))
    start = Magnitude().prune(problem)
    keep = start.keep.clone()
    keep[0], keep[1] = True, False
    solution = refine(problem, replace(start, weight=problem.weight * keep, keep=keep, loss=None))
    assert torch.equal(solution.keep[:2], keep[:2])
    assert torch.equal(solution.keep.sum(dim=1), keep.sum(dim=1))


def test_a_tie_of_two_claims_on_one_tile_goes_to_the_lowest_index() -> None:
    gains = torch.tensor([[[3.0, 1.0], [3.0, 2.0], [0.5, 1.5]]]).double()
    order, partner, best = disjoint_swaps(gains)
    # First tile 0 and tile 1 both claim partner 0: the lowest gets it. Then tile 1 claims partner 1 with more than 2.
    assert order[0].tolist() == [0, 2, 1]
    assert partner[0].tolist()[:2] == [0, 1]
    assert best[0].tolist() == [3.0, 1.5, -float("inf")]


def test_pairs_share_no_tile_and_start_with_the_best_swap() -> None:
    gains = torch.randn(20, 9, 7, generator=torch.Generator().manual_seed(0)).double()
    order, partner, best = disjoint_swaps(gains.clone())
    for lane in range(20):
        chosen = int((best[lane] > 0).sum())
        assert chosen >= 3
        assert len(set(order[lane, :chosen].tolist())) == len(set(partner[lane, :chosen].tolist())) == chosen
        assert best[lane, 0] == gains[lane].max()
        assert torch.equal(best[lane, :chosen], gains[lane, order[lane, :chosen], partner[lane, :chosen]])


def test_inputs_that_never_fired_are_swapped_out() -> None:
    x = inputs(80, 12)
    x[:, [1, 2]] = 0.0
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    weight[:, 1:3] = 50.0
    problem = problem_from(x, weight, Unstructured(), 0.5)
    start = Magnitude().prune(problem)
    assert start.keep[:, 1:3].all()
    solution = refine(problem, start)
    assert not solution.keep[:, 1:3].any()


def test_fewer_tokens_than_inputs_do_not_raise_the_loss() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    problem = problem_from(inputs(5, 32), weight, Unstructured(), 0.5)
    start = SparseGPT().prune(problem)
    solution, energy = refine(problem, start), problem.energy()
    assert solution.loss is not None
    assert energy is not None
    assert solution.loss <= (refit(problem, start).loss or 0.0) + 1e-12 * energy


def test_the_search_starts_from_the_minimiser_of_the_true_quadratic() -> None:
    problem = shifted(problem_of(Case(Unstructured(), 0.5, 3, 8)))
    assert problem.gram is not None
    assert problem.targets is not None
    quadratic = damped_quadratic(problem, 1e-9, "swaps")
    start = quadratic.start * quadratic.scale
    expected = torch.linalg.solve(problem.gram.matrix, problem.targets.cross @ problem.weight.double().T).T
    assert torch.allclose(start, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))  # the ridge of 1e-9


def test_names_and_needs_follow_the_inner_method() -> None:
    assert Swapped(SparseGPT()).name == "sparsegpt+swaps"
    assert {Swapped(method).needs for method in METHODS} == {Needs.GRAM}


def test_statistics_that_cannot_be_used_name_the_layer() -> None:
    problem = LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5)
    with pytest.raises(DataError, match="layer 'fc1': swaps needs a Gram matrix"):
        Swapped(Magnitude()).prune(problem)
    for bad, error in ((float("nan"), CalibrationError), (0.0, SingularGramError)):
        with pytest.raises(error, match="layer 'fc1': swaps: "):
            Swapped(Magnitude()).prune(replace(problem, gram=Gram(torch.full((4, 4), bad).double(), 9)))


@pytest.mark.parametrize("options", [{"rounds": 0}, {"together": 0}, {"least_gain": 1.0}, {"damp": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must "):
        Swapped(Magnitude(), **options)  # type: ignore[arg-type]
