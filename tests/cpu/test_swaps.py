"""Swaps against exhaustive search: gains are exact, the end is a 1-swap optimum, the loss never rises."""

from dataclasses import replace

import pytest
import torch
from methods import (
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

from sparsify_compiler.calibrate import Walk
from sparsify_compiler.errors import CalibrationError, DataError, SingularGramError
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.passes.prune import swap_search
from sparsify_compiler.passes.prune.exchange import Tableau, blocks_of, columns_of, exchange
from sparsify_compiler.passes.prune.layerwise import prune_layerwise
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.quadratic import damped_quadratic, tile_of
from sparsify_compiler.passes.prune.refit import refit
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.swap_gains import swap_gains
from sparsify_compiler.passes.prune.swaps import refine
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.plan import decide
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution, Needs, Pruner
from sparsify_compiler.recipe import Recipe, make_rule
from tests.models.small import Mlp, mlp_batches, seeded

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


def tableau_of(gram: Tensor, moment: Tensor, kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """The tableau and its constants as `exchange` defines them, by a general inverse."""
    inverse = torch.linalg.inv(gram[kept][:, kept])
    image = gram[removed][:, kept] @ inverse
    weight = inverse @ moment[:, kept].T
    residual = moment[:, removed].T - gram[removed][:, kept] @ weight
    schur = gram[removed][:, removed] - image @ gram[kept][:, removed]
    matrix = torch.cat((torch.cat((inverse, -image.T), dim=1), torch.cat((image, schur), dim=1)))
    return matrix, torch.cat((weight, -residual))


@every_tiny
@pytest.mark.parametrize("targets", [False, True], ids=["own", "dense targets"])
@pytest.mark.parametrize("lists", [None, 1, 2], ids=["all tiles", "one at a time", "two at a time"])
def test_the_end_is_a_mask_that_no_single_swap_improves(
    case: Case, targets: bool, lists: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lists is not None:
        for name in ("WIDE", "SHORT", "LEAST"):
            monkeypatch.setattr(swap_search, name, lists)
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
    tableau, constant = tableau_of(gram, moment, kept, removed)
    inverse, pairs, schur = (
        tableau[: 2 * cols, : 2 * cols],
        tableau[2 * cols :, : 2 * cols],
        tableau[2 * cols :, 2 * cols :],
    )
    gains = swap_gains(
        blocks_of(inverse[None], cols),
        pairs[None],
        blocks_of(schur[None], cols),
        constant[None, : 2 * cols],
        -constant[None, 2 * cols :],
    )[0]
    for put_in in (0, 1):
        for out in (0, 1):
            expected = value([1 - out, 2 + put_in]) - value([0, 1])
            assert float(gains[put_in, out]) == pytest.approx(expected, rel=1e-8)  # float64, condition about 1e3


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_a_tableau_after_swaps_is_that_of_the_new_kept_set(rows: int, cols: int) -> None:
    x = inputs(60, 6 * cols)
    gram = x.T @ x / 60
    moment = torch.randn(rows, 6 * cols, generator=torch.Generator().manual_seed(0)).double() @ gram
    every = torch.arange(6 * cols)
    matrix, constant = tableau_of(gram, moment, every[: 3 * cols], every[3 * cols :])
    tableau = Tableau(
        matrix.repeat(3, 1, 1), constant.repeat(3, 1, 1), kept=3, cols=cols, held=torch.arange(6).repeat(3, 1)
    )
    # Lane 0 swaps tiles 0 and 4, then what came in (4, in slot 0) for 5; lane 1 only the second pair; lane 2 nothing.
    tableau.swap(torch.tensor([1, 0, 0]), torch.tensor([0, 2, 1]), torch.tensor([True, False, False]))
    tableau.swap(torch.tensor([2, 2, 0]), torch.tensor([0, 0, 0]), torch.tensor([True, True, False]))
    assert tableau.held.tolist() == [[5, 1, 2, 3, 0, 4], [5, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]]
    for lane in range(3):
        at = columns_of(tableau.held[lane : lane + 1], cols)[0]
        expected, constants = tableau_of(gram, moment, at[: 3 * cols], at[3 * cols :])
        assert torch.allclose(tableau.matrix[lane], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
        assert torch.allclose(tableau.constant[lane], constants, rtol=0, atol=1e-9 * float(constants.abs().max()))


def test_an_exchange_of_many_columns_gives_the_inverse_of_the_new_kept_set() -> None:
    x = inputs(60, 10)
    gram = x.T @ x / 60
    matrix, _ = tableau_of(gram, torch.ones(1, 10).double(), torch.arange(5), torch.arange(5, 10))
    gone, come = torch.tensor([3, 1]), torch.tensor([7, 5])
    both = torch.cat((gone, come))
    inverse = matrix[:5, :5].clone()[None]
    exchange(inverse, matrix[come, :5][None], matrix[both][:, both][None], gone[None])
    kept = torch.tensor([0, 5, 2, 7, 4])  # 7 in the slot of 3, 5 in that of 1
    assert torch.allclose(inverse[0], torch.linalg.inv(gram[kept][:, kept]), rtol=1e-9)


@every_method
@every_case
def test_the_re_solved_loss_never_rises_and_pattern_and_counts_stay(method: Pruner, case: Case) -> None:
    problem = problem_of(case)
    assert problem.gram is not None
    before = problem.weight.clone(), problem.gram.matrix.clone()
    selected = method.prune(problem)
    solved = refit(problem, selected)
    solution = prune_with(problem, method, swaps=3)
    assert obeys(case.pattern, solution.keep, case.run) is None
    assert torch.equal(solution.keep.sum(dim=1), selected.keep.sum(dim=1))
    selected_loss = problem.loss(selected.weight)
    assert selected_loss is not None
    assert solution.loss_selected == selected_loss
    assert solution.loss is not None
    assert solved.loss is not None
    energy = problem.energy()
    assert energy is not None
    assert solution.loss <= selected_loss + 1e-12 * energy  # float64 sums of the size of the energy
    assert solution.loss <= solved.loss + 1e-6 * energy  # the search's ridge, a share of the mean diagonal
    assert torch.equal(before[0], problem.weight)
    assert torch.equal(before[1], problem.gram.matrix)


@every_case
def test_twice_the_same_and_free_of_scale(case: Case) -> None:
    def solve(problem: LayerProblem) -> LayerSolution:
        return refine(problem, Wanda().prune(problem), rounds=3)

    problem = problem_of(case)
    first, again = solve(problem), solve(problem_of(case))
    assert torch.equal(first.weight, again.weight)
    other = solve(scaled(problem, 8.0, 0.25))
    # Powers of two shift exponents only, so every step of the arithmetic is the same: exact equality.
    assert torch.equal(first.keep, other.keep)
    assert torch.equal(first.weight * 8, other.weight)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 4), Block(4, 4)], ids=str)
def test_swaps_gain_on_every_method(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    problem = problem_from(inputs(256, 48), torch.randn(32, 48, generator=generator), pattern, 0.5)
    for method in (Magnitude(), Wanda(), SparseGPT(), OBC()):
        plain, better = prune_with(problem, method).loss, prune_with(problem, method, swaps=10)
        assert plain is not None
        assert better.loss is not None
        assert better.loss < plain
        # The re-solve before the swaps and the plain one have the same optimum, but for the ridge of 1e-6.
        assert better.stats["loss_before_swaps"] == pytest.approx(plain, rel=1e-4)
        assert better.stats["loss_after_swaps"] == better.loss


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 12, 20))
    start = Magnitude().prune(problem)
    whole = refine(problem, start, rounds=10)
    monkeypatch.setattr(swap_search, "CPU_BYTES", 1)  # one lane at a time
    parts = refine(problem, start, rounds=10)
    assert torch.equal(whole.keep, parts.keep)


def test_rows_that_keep_all_or_nothing_stay() -> None:
    problem = problem_of(Case(Unstructured(), 0.5, 4, 12))
    start = Magnitude().prune(problem)
    keep = start.keep.clone()
    keep[0], keep[1] = True, False
    solution = refine(problem, replace(start, weight=problem.weight * keep, keep=keep, loss=None), rounds=3)
    assert torch.equal(solution.keep[:2], keep[:2])
    assert torch.equal(solution.keep.sum(dim=1), keep.sum(dim=1))


def test_inputs_that_never_fired_are_swapped_out() -> None:
    x = inputs(80, 12)
    x[:, [1, 2]] = 0.0
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    weight[:, 1:3] = 50.0
    problem = problem_from(x, weight, Unstructured(), 0.5)
    start = Magnitude().prune(problem)
    assert start.keep[:, 1:3].all()
    solution = refine(problem, start, rounds=10)
    assert not solution.keep[:, 1:3].any()


def test_fewer_tokens_than_inputs_do_not_raise_the_loss() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    problem = problem_from(inputs(5, 32), weight, Unstructured(), 0.5)
    start = SparseGPT().prune(problem)
    solution, energy = refine(problem, start, rounds=10), problem.energy()
    assert solution.loss is not None
    assert energy is not None
    assert solution.loss <= (start.loss or 0.0) + 1e-12 * energy
    assert "swaps: 5 tokens for 32 inputs leave the weights undetermined" in solution.notes[-1]


def test_the_search_starts_from_the_minimiser_of_the_true_quadratic() -> None:
    problem = shifted(problem_of(Case(Unstructured(), 0.5, 3, 8)))
    assert problem.gram is not None
    assert problem.targets is not None
    quadratic = damped_quadratic(problem, 1e-9, "swaps")
    start = quadratic.start * quadratic.scale
    expected = torch.linalg.solve(problem.gram.matrix, problem.targets.cross @ problem.weight.double().T).T
    assert torch.allclose(start, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))  # the ridge of 1e-9


def test_swaps_make_a_rule_need_the_gram_matrix() -> None:
    assert make_rule("*", NM(2, 4), Magnitude()).needs is Needs.NOTHING
    assert make_rule("*", NM(2, 4), Magnitude(), swaps=1).needs is Needs.GRAM


def test_statistics_that_cannot_be_used_name_the_layer() -> None:
    problem = LayerProblem("fc1", torch.ones(2, 4), NM(2, 4), 0.5)
    with pytest.raises(DataError, match="layer 'fc1': swaps needs a Gram matrix"):
        prune_with(problem, Magnitude(), swaps=1)
    for bad, error in ((float("nan"), CalibrationError), (0.0, SingularGramError)):
        with pytest.raises(error, match="layer 'fc1': swaps: "):
            prune_with(replace(problem, gram=Gram(torch.full((4, 4), bad).double(), 9)), Magnitude(), swaps=1)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": 1, "least_gain": 1.0}, {"rounds": 1, "damp": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    problem = problem_of(Case(NM(2, 4), 0.5, 2, 8))
    with pytest.raises(ValueError, match="must "):
        refine(problem, Magnitude().prune(problem), **options)  # type: ignore[arg-type]


def test_a_rule_with_swaps_gathers_what_they_read_and_prunes_a_graph_better() -> None:
    outcomes = []
    for swaps in (0, 3):
        module, batches = seeded(Mlp), mlp_batches()
        graph = trace_module(module, batches[0])
        rule = make_rule("*", Unstructured(), Magnitude(), 0.5, refit=swaps == 0, swaps=swaps)
        walk = Walk(graph, batches, decide(Recipe((rule,)), graph.sites))
        outcomes.append(prune_layerwise(walk))
    plain, swapped = outcomes
    first = next(iter(plain))  # the only site that both see the same inputs of
    assert swapped[first].sparsity == plain[first].sparsity == 0.5
    assert swapped[first].loss_selected == plain[first].loss_selected
    assert (swapped[first].loss or 0.0) < (plain[first].loss or 0.0)
    assert all((outcome.loss or 0.0) < (outcome.loss_selected or 0.0) for outcome in swapped.values())
