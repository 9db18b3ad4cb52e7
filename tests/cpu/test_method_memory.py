"""No method, nor the re-solve, nor swaps, makes a tensor that grows as rows x in x in."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from methods import METHODS, Case, problem_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify_compiler.passes.prune import algebra, curvature, elimination, kept, swap_search
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.refit import SMALL
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.pattern import NM, Block, Unstructured
from sparsify_compiler.problem import Pruner

OUT, IN = 64, 48
WORK = 1 << 17
"""Bytes that a solver may work on at once, in place of 32 to 128 MiB: seven float64 matrices of IN x IN, not OUT."""

CASES = (Case(Unstructured(), 0.5, OUT, IN), Case(NM(2, 4), 0.5, OUT, IN), Case(Block(2, 4), 0.5, OUT, IN))


class Largest(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    module: ModuleType
    for module in (algebra, curvature, elimination, kept, swap_search):
        monkeypatch.setattr(module, "work_bytes", lambda device, on_cpu: WORK)


def largest(method: Pruner, case: Case, swaps: int) -> int:
    problem = problem_of(case)
    with Largest() as watch:
        prune_with(problem, method, swaps=swaps)
    return watch.bytes


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_method_makes_a_tensor_of_rows_by_in_by_in(little_room: None, method: Pruner, case: Case) -> None:
    assert largest(method, case, swaps=0) <= WORK


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nor_do_swaps(little_room: None, case: Case) -> None:
    assert largest(METHODS[0], case, swaps=1) <= WORK


def test_nor_does_a_re_solve_by_iterations(little_room: None) -> None:
    wide = Case(Unstructured(), 0.5, OUT, SMALL + 8)
    assert largest(METHODS[0], wide, swaps=0) <= wide.in_**2 * 8  # the Gram matrix itself


def test_the_watch_sees_such_a_tensor() -> None:
    # With room for all of them at once, OBC takes it.
    assert largest(OBC(), CASES[0], swaps=0) >= OUT * IN * IN * 8
