"""Where the values between two segments wait: on the GPU that made them while there is room, else on the host.

A CPU stands in for the GPU: what it says of its free memory is made up.
"""

from collections.abc import Sequence
from copy import copy

import pytest
import torch
from torch import Tensor

from sparsify_compiler.boundaries import GPU_SHARE, Boundaries, values_bytes
from sparsify_compiler.calibrate import Walk
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.graph import Values
from sparsify_compiler.passes.prune.layerwise import prune_layerwise
from sparsify_compiler.passes.prune.rounds import prune_in_rounds
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.pattern import Unstructured
from sparsify_compiler.plan import Decision, decide
from sparsify_compiler.recipe import Recipe, make_rule
from tests.models.small import Mlp, mlp_batches, seeded


def free(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr("sparsify_compiler.boundaries.free_bytes", lambda device: count)


def graph_of(batches: Sequence[Tensor]) -> TorchGraph:
    return trace_module(seeded(Mlp), batches[0])


def stayed(made: Sequence[Values], kept: Sequence[Values]) -> list[bool]:
    """Tell of every tensor whether it is the one that the segment made."""
    pairs = [(old, new) for left, right in zip(made, kept, strict=True) for old, new in _tensors(left, right)]
    assert all(torch.equal(old, new) for old, new in pairs)
    return [old.data_ptr() == new.data_ptr() for old, new in pairs]


def _tensors(left: Values, right: Values) -> list[tuple[Tensor, Tensor]]:
    assert list(left) == list(right)
    return [(value, right[name]) for name, value in left.items() if isinstance(value, Tensor)]


def advanced(monkeypatch: pytest.MonkeyPatch, room: int | None, batches: Sequence[Tensor]) -> tuple[list[bool], int]:
    """Advance by one segment with `room` bytes to wait in; say which values stayed, and what was sent to the host."""
    free(monkeypatch, None)
    boundaries = Boundaries(graph_of(batches), batches)
    held = sum(values_bytes(values) for values in boundaries.values)
    made = [boundaries.run(0, number) for number in range(len(batches))]
    monkeypatch.setattr(boundaries, "run", lambda index, number, *rest: made[number])
    free(monkeypatch, None if room is None else room * GPU_SHARE - held)  # what is held is freed as values come in
    boundaries.advance(0)
    return stayed(made, boundaries.values), boundaries.host_bytes


def test_values_stay_on_a_gpu_that_has_room_and_only_the_rest_goes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = mlp_batches(4)
    each = batches[0].nbytes  # a block returns what is alive after it: one tensor like its input
    assert advanced(monkeypatch, 4 * each, batches) == ([True] * 4, 0)
    assert advanced(monkeypatch, 4 * each - 1, batches) == ([True] * 3 + [False], each)
    assert advanced(monkeypatch, 2 * each, batches) == ([True] * 2 + [False] * 2, 2 * each)
    assert advanced(monkeypatch, 0, batches) == ([False] * 4, 4 * each)


def test_without_a_gpu_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advanced(monkeypatch, None, mlp_batches(3)) == ([True] * 3, 0)


def test_a_part_of_a_larger_tensor_does_not_keep_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = mlp_batches(1)
    free(monkeypatch, 1 << 30)
    boundaries = Boundaries(graph_of(batches), batches)
    whole = torch.arange(100.0)
    monkeypatch.setattr(boundaries, "run", lambda *given: {"part": whole[10:20], "all": whole, "sizes": (2, 3)})
    boundaries.advance(0)
    values = boundaries.values[0]
    assert values["part"].untyped_storage().nbytes() == 40
    assert torch.equal(values["part"], torch.arange(10.0, 20.0))
    assert values["all"] is whole
    assert values["sizes"] == (2, 3)


def test_a_copy_shares_the_tensors_of_now_and_advances_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = mlp_batches(2)
    free(monkeypatch, 1 << 30)
    boundaries = Boundaries(graph_of(batches), batches)
    boundaries.advance(0)
    twin, before = copy(boundaries), list(boundaries.values)
    assert all(stayed(boundaries.values, twin.values))
    twin.advance(1)
    assert all(old is new for old, new in zip(before, boundaries.values, strict=True))


def decisions(graph: TorchGraph) -> tuple[Decision, ...]:
    rule = make_rule("*", Unstructured(), SparseGPT(), 0.5, True)
    return tuple(decide(Recipe((rule,)), graph.sites))


def test_where_values_wait_changes_no_bit_and_a_note_says_what_found_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = mlp_batches(4)
    weights, notes = [], []
    for room in (None, 1 << 30, 0):
        free(monkeypatch, room)
        graph = graph_of(batches)
        walk = Walk(graph, batches, decisions(graph))
        prune_layerwise(walk)
        weights.append([graph.weight(site) for site in graph.sites])
        notes.append(walk.notes)
    for others in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))
    assert notes[:2] == [[], []]
    (note,) = notes[2]
    assert "GB of the values between segments waited in the host's memory" in note


def test_rounds_say_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = mlp_batches(4)
    free(monkeypatch, 0)
    graph = graph_of(batches)
    rounds = prune_in_rounds(graph, [batches[:2], batches[2:]], decisions(graph), 2, lambda dense: 1.0)
    assert sum("waited in the host's memory" in note for note in rounds.notes) >= 1
    assert len(set(rounds.notes)) == len(rounds.notes)
