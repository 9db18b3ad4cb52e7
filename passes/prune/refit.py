"""Re-solve the kept weights to optimality on the final keep mask, after any selector."""

from dataclasses import replace

from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune.algebra import (
    LARGEST_DAMP,
    MaskedLeastSquares,
    MaskedSolution,
    chunk_rows,
    damped_cholesky,
    require_finite,
    solve_masked_cg,
    solve_masked_exactly,
)
from sparsify_compiler.problem import Gram, LayerProblem, LayerSolution

SMALL = 128
"""Up to this many inputs a row's exact factorisation costs less than the iterations."""

TOLERANCE = 1e-6
"""Relative gradient to reach. Over SmolLM2-135M's layers at 2:4 the loss then exceeds the optimum by at most 5e-9."""

SETTLED = 1e-6
"""Share of a row's gain that 15 iterations must still bring for an exact solve to be worth its time."""

NOISE = 1e-6
"""Share of the diagonal below which a Gram matrix's curvature is rounding: its products are float32, right to 3e-7."""


def refit(problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
    """Return `solution` with its kept weights re-solved: min ‖X_dense Wᵀ − X Ŵᵀ‖² on the same mask, row by row.

    Without `problem.targets`, X_dense = X. A row is replaced only where its loss falls by more than the Gram matrix's
    rounding could feign, so the result is never worse.
    Conjugate gradients in general; a Cholesky factor a row for up to 128 inputs, and for rows that after 150 iterations
    neither reached a relative gradient of 1e-6 nor stopped gaining, which `notes` then says; not with fewer tokens than
    inputs, where many weights are optimal. Where the Gram matrix is indefinite by more than rounding, the damped
    problem is solved, whose ridge holds to the dense weights; damping rises tenfold, each step noted. Without a Gram
    matrix the solution comes back unchanged, with a note.
    `stats` gain "iterations", "relative_gradient" (largest of all rows, float64, before the weight is rounded to
    float32) and "exact_rows".

    Raises:
        CalibrationError: the Gram matrix is not finite.
        SingularGramError: it is indefinite beyond repair; more calibration tokens are needed.
    """
    if problem.gram is None:
        return replace(solution, notes=(*solution.notes, "not refitted: no Gram matrix was gathered for this method"))
    try:
        require_finite(problem.gram.matrix)
        damp, damping = _damping(problem.gram)
        least_squares = _least_squares(problem, problem.gram, solution, damp)
        solved, exact_rows = _solve(least_squares, determined=problem.gram.tokens >= problem.weight.shape[1])
    except CalibrationError as error:  # SingularGramError is one
        raise type(error)(f"layer {problem.name!r}: refit: {error}") from None
    weight, kept_rows = _better_rows(least_squares, solved)
    loss = problem.loss(weight)
    notes = [*solution.notes, *damping]
    if exact_rows and solved.iterations:
        # Without a count, so that equal notes of many layers are one line of the report; `stats` has it.
        notes.append("refit: rows too ill-conditioned for the iterations were solved with a Cholesky factor each")
    notes.extend(too_few_tokens(problem, "refit"))
    if solved.ridge > NOISE:
        notes.append(f"refit: the Gram matrix is singular on the kept columns: ridge raised to {solved.ridge:g}")
    if kept_rows:
        notes.append(
            f"refit: {kept_rows} of {len(weight)} rows stay as selected: what a re-solve would gain is within the "
            "rounding of the Gram matrix"
        )
    stats = {
        **solution.stats,
        "iterations": float(solved.iterations),
        "relative_gradient": float(solved.relative_gradient.max()),
        "exact_rows": float(exact_rows),
    }
    selected = solution.loss_selected if solution.loss_selected is not None else problem.loss(solution.weight)
    return LayerSolution(weight, solution.keep, selected, loss, stats, tuple(notes))


def too_few_tokens(problem: LayerProblem, step: str) -> tuple[str, ...]:
    """Return the note of `step` where fewer tokens than inputs were seen, else nothing."""
    in_ = problem.weight.shape[1]
    if problem.gram is None or problem.gram.tokens >= in_:
        return ()
    return (
        f"{step}: {problem.gram.tokens} tokens for {in_} inputs leave the weights undetermined; "
        "more calibration data gives a better model",
    )


def _damping(gram: Gram) -> tuple[float, tuple[str, ...]]:
    """Return the damping without which the matrix is indefinite by more than its rounding (0: none), and notes."""
    least = NOISE * len(gram.matrix)  # errors of NOISE √(Gᵢᵢ Gⱼⱼ) move no eigenvalue by more than this mean diagonal
    if least > LARGEST_DAMP or not bool(gram.matrix.diagonal().any()):
        return 0.0, ()
    used, notes = gram.cached("definite", lambda: damped_cholesky(gram.matrix, least, "set refit = false")[1:])
    return (used if notes else 0.0), tuple(f"refit: {note}" for note in notes)


def _least_squares(problem: LayerProblem, gram: Gram, solution: LayerSolution, damp: float) -> MaskedLeastSquares:
    cross = gram.matrix if problem.targets is None else problem.targets.cross
    moment = problem.weight.to(cross) @ cross.t()  # (out, in): row i is C w_i
    if not damp:
        return MaskedLeastSquares(gram.matrix, moment, solution.keep, solution.weight)
    ridge = damp * float(gram.matrix.diagonal().mean())
    matrix = gram.matrix.clone()
    matrix.diagonal().add_(ridge)
    return MaskedLeastSquares(matrix, moment + ridge * problem.weight, solution.keep, solution.weight)


def _solve(problem: MaskedLeastSquares, determined: bool) -> tuple[MaskedSolution, int]:
    """Return the solution and how many rows a Cholesky factor solved; beyond `SMALL` none where not `determined`."""
    rows, in_ = problem.keep.shape
    if in_ <= SMALL:
        return solve_masked_exactly(problem, ridge=NOISE), rows
    solved = solve_masked_cg(problem, TOLERANCE, settled=SETTLED)
    left = ((solved.relative_gradient > TOLERANCE) & (solved.last_gain > SETTLED)).nonzero()[:, 0]
    if not len(left) or not determined:
        return solved, 0
    rest = solve_masked_exactly(replace(problem.rows(left), start=solved.weight[left]), ridge=NOISE, steps=1)
    return (
        MaskedSolution(
            solved.weight.index_copy(0, left, rest.weight),
            solved.relative_gradient.index_copy(0, left, rest.relative_gradient),
            solved.last_gain.index_copy(0, left, rest.last_gain),
            solved.iterations,
            rest.ridge,
        ),
        len(left),
    )


def _better_rows(problem: MaskedLeastSquares, solved: MaskedSolution) -> tuple[Tensor, int]:
    """Round to float32 and take back the rows whose loss did not surely fall: the weight, and how many those are.

    For d = new − start the loss changes by −dᵀ(r_start + r_new), r = b − Gŵ: no difference of large numbers. Entries of
    G are right to NOISE √(Gᵢᵢ Gⱼⱼ), so the change is known to NOISE (Σ |dᵢ| √Gᵢᵢ)². A row that gains no more than that
    fits rounding: where inputs hardly differ, it would do so by weights of any size.
    """
    weight = solved.weight.float().masked_fill_(~problem.keep, 0.0)
    chunk = chunk_rows(weight.shape[1], weight.device)
    size = problem.gram.diagonal().clamp_min(0).sqrt()  # (in,)
    taken_back = 0
    for first in range(0, len(weight), chunk):
        rows = slice(first, first + chunk)
        start, new = problem.start[rows].double(), weight[rows].double()
        part = problem.rows(rows)
        change = -((new - start) * (part.gradient(start) + part.gradient(new))).sum(dim=1)
        doubt = NOISE * ((new - start).abs() @ size).square()
        worse = ~(change < -doubt)
        taken_back += int(worse.sum())
        weight[rows][worse] = problem.start[rows][worse]
    return weight, taken_back
