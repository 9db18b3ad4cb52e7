"""Kernels that share a layer by token count: when the tuner forms one, what it says, and how it runs."""

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from scripted import Fake, decide, packed

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Kernel, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.cpu.csr import TorchCsr
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.oracle import difference
from sparsify_compiler.runtime.routed import Routed, is_routed, routed_name, routed_named

COUNTS = (1, 16, 64)


def times(**by_kernel: tuple[float, ...]) -> dict[tuple[str, int], list[float]]:
    return {(name, n): [t] for name, row in by_kernel.items() for n, t in zip(COUNTS, row, strict=True)}


def find(name: str) -> Kernel:
    if name == "absent":
        raise KernelError("kernel 'absent': this version has none")
    return Fake(name)


def test_two_kernels_that_each_win_somewhere_share_the_layer() -> None:
    verdict, _ = decide(
        times(dense=(10, 10, 10), few=(4, 5, 12), many=(9, 8, 6)), Fake("few"), Fake("many"), tokens=COUNTS
    )
    assert verdict.kernel == "few@16+many"
    # the cube roots of 10 * 10 * 10 / (4 * 5 * 6) and of 9 * 8 / (4 * 5)
    assert "few@16+many: 2.03x ±0.00 over 1, 16, 64 tokens, 1.53x over many alone" in verdict.reason
    assert "keeping at most 2.00x the dense weight's bytes" in verdict.reason  # every fake keeps a dense weight
    rows = {row.tokens: row for row in verdict.timings if row.kernel == verdict.kernel}
    assert [rows[n].time_us for n in COUNTS] == [4, 5, 6]
    assert verdict.size_bytes["few@16+many"] == 12 * 16 * 4  # both fakes keep the same tensor, so it is kept once


def test_a_route_that_gains_next_to_nothing_is_not_worth_its_memory() -> None:
    script = times(dense=(10, 10, 10), few=(4, 5, 6.3), many=(9, 8, 6))
    assert decide(script, Fake("few"), Fake("many"), tokens=COUNTS)[0].kernel == "few"  # the cube root of 6.3 / 6
    script["few", 64] = [6.5]
    assert decide(script, Fake("few"), Fake("many"), tokens=COUNTS)[0].kernel == "few@16+many"


def test_a_route_that_gains_no_more_than_the_spread_is_not_taken() -> None:
    script = times(dense=(10, 10, 10), few=(4, 5, 6.1), many=(9, 8, 6))
    script["few", 64] = [6.1, 5.8, 6.3, 5.9]
    assert decide(script, Fake("few"), Fake("many"), tokens=COUNTS)[0].kernel == "few"


def test_a_route_keeps_the_leader_where_another_is_no_faster_beyond_the_spread() -> None:
    script = times(dense=(10, 10, 10), few=(4, 5, 12), many=(9, 5, 6))
    script["many", 16] = [4.9, 5.2, 4.8, 5.1]
    # `many` leads, so at 16 tokens `few` would have to beat it.
    assert decide(script, Fake("few"), Fake("many"), tokens=COUNTS)[0].kernel == "few@1+many"


def test_kernels_that_lose_alone_may_win_together() -> None:
    verdict, _ = decide(
        times(dense=(10, 10, 10), few=(2, 10, 25), many=(20, 10, 3)), Fake("few"), Fake("many"), tokens=COUNTS
    )
    assert verdict.kernel == "few@16+many"
    together = [row for row in verdict.timings if row.kernel == verdict.kernel]
    assert [row.verdict.split(":")[0] for row in together] == ["faster", "no difference beyond the spread", "faster"]


def test_a_kernel_hopeless_in_total_is_measured_on_where_it_is_fast() -> None:
    script = times(dense=(10, 10, 10), few=(2, 30, 900), many=(9, 6, 6))
    verdict, watch = decide(script, Fake("few"), Fake("many"), tokens=COUNTS)
    assert [watch.order.count(f"few {n}") for n in COUNTS] == [8, 3, 3]
    assert verdict.kernel == "few@1+many"


def test_dense_is_no_part_without_leave_but_the_reason_says_what_it_would_give() -> None:
    script = times(dense=(10, 10, 10), few=(4, 5, 40))
    verdict, _ = decide(script, Fake("few"), tokens=COUNTS)
    assert verdict.kernel == "dense"
    assert "few 1.08x ±0.00 (slower at 64 (0.25x), 0.9x is the least that is taken)" in verdict.reason
    # the cube root of 10 * 10 / (4 * 5)
    assert "not taken unless a dense copy is allowed (dense_copy): few@16+dense: 1.71x" in verdict.reason
    allowed, _ = decide(script, Fake("few"), tokens=COUNTS, dense_copy=True)
    assert allowed.kernel == "few@16+dense"
    assert allowed.reason.startswith("few@16+dense: 1.71x")


def test_dense_beside_a_winner_is_offered_too() -> None:
    script = times(dense=(10, 10, 10), few=(2, 2, 11))
    verdict, _ = decide(script, Fake("few"), tokens=COUNTS)
    assert verdict.kernel == "few"
    assert "few@16+dense: 2.92x" in verdict.reason  # the cube root of 10 * 10 / (2 * 2)
    assert decide(script, Fake("few"), tokens=COUNTS, dense_copy=True)[0].kernel == "few@16+dense"


def test_a_route_that_is_wrong_as_a_whole_falls_back_to_the_best_single_kernel() -> None:
    @dataclass(frozen=True)
    class Fickle(Fake):
        """Right until its tensors come from a routed kernel: more calls than the checks before make."""

        calls: tuple[list[int], ...] = ()

        def run(self, prepared: Prepared, x: torch.Tensor, *rest: object) -> torch.Tensor:  # type: ignore[override]
            self.calls[0].append(1)
            return super().run(prepared, x, *rest) + (len(self.calls[0]) > 6)  # type: ignore[arg-type]

    script = times(dense=(10, 10, 10), few=(4, 5, 12), many=(9, 8, 6))
    verdict, _ = decide(script, Fickle("few", calls=([],)), Fake("many"), tokens=COUNTS)
    assert verdict.kernel == "many"
    assert verdict.refused["few@16+many"].startswith("wrong result for 1 tokens")


def test_the_variants_of_a_route_are_those_of_its_parts() -> None:
    script = {
        **times(dense=(10, 10, 10), many=(9, 8, 6)),
        ("few own", 1): [4.5],
        ("few b", 1): [4.0],
        ("few", 16): [5.0],
        ("few", 64): [12.0],
    }
    verdict, _ = decide(script, Fake("few", choices={1: ("own", "b")}), Fake("many"), tokens=COUNTS)
    assert (verdict.kernel, verdict.variants) == ("few@16+many", "1=b;16=;64=")


@pytest.mark.parametrize(
    "name", ["a@64+b", "a@1+b@64+a", "nm24_mma@64+cusparselt", "+".join(f"k{i}@{i + 1}" for i in range(7)) + "+z"]
)
def test_names_round_trip(name: str) -> None:
    routed = routed_named(name, find)
    assert routed.name == name
    assert is_routed(name)
    assert routed_name([(bound, kernel.name) for bound, kernel in routed.parts]) == name
    assert routed_named(name, find) == routed


@pytest.mark.parametrize(
    "name",
    ["a", "a@64", "a+b", "a@64+b@128", "a@64+b@64+c", "a@64+b@2+c", "a@0+b", "a@x+b", "@64+b", "a@64+", "a@6 4+b"],
)
def test_names_that_are_no_route_are_refused(name: str) -> None:
    with pytest.raises(KernelError, match="compile the model again"):
        routed_named(name, find)


def test_a_route_with_an_unknown_part_or_a_nested_one_is_refused() -> None:
    with pytest.raises(KernelError, match="'absent'"):
        routed_named("a@1+absent", find)
    inner = routed_named("a@1+b", find)
    with pytest.raises(KernelError, match="needs 2 to 8 kernels"):
        Routed(((4, inner), (None, Fake("c"))))


def test_each_count_runs_on_its_own_part_with_its_own_tensors_and_variants() -> None:
    seen: list[tuple[str, int, str]] = []

    @dataclass(frozen=True)
    class Telling(Fake):
        def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
            dense = unpack(packed)
            return Prepared(self.name, packed.shape, (torch.full((3,), len(self.name)), dense))

        def run(self, prepared: Prepared, x: torch.Tensor, *rest: object) -> torch.Tensor:  # type: ignore[override]
            assert int(prepared.tensors[0][0]) == len(self.name)
            seen.append((prepared.kernel, x.shape[0], prepared.variants))
            return x @ prepared.tensors[1].T

    routed = Routed(((4, Telling("a")), (16, Telling("bb")), (None, Telling("a"))))
    prepared = routed.prepare(packed(), spec_for(packed(), (1,)))
    assert len(prepared.tensors) == 3 + 3  # headers; two markers and one weight
    prepared = dataclasses.replace(prepared, variants="1=x;4=;16=y;64=z")
    for tokens in (0, 1, 4, 5, 16, 17, 300):
        x = torch.randn(tokens, 16)
        assert difference(routed.run(prepared, x), x, unpack(packed())) is None
    assert seen == [
        ("a", 0, "1=x;4="),
        ("a", 1, "1=x;4="),
        ("a", 4, "1=x;4="),
        ("bb", 5, "16=y"),
        ("bb", 16, "16=y"),
        ("a", 17, "64=z"),
        ("a", 300, "64=z"),
    ]
    assert routed.variants(spec_for(packed(), (1,)), 5) == ("",)


def test_the_places_survive_a_copy_and_a_move() -> None:
    routed = Routed(((2, Dense()), (None, TorchCsr())))
    spec = spec_for(packed(), (1, 8))
    if reason := routed.rejects(spec):
        pytest.skip(reason)
    prepared = routed.prepare(packed(), spec)
    moved = dataclasses.replace(prepared, tensors=tuple(copy.deepcopy(t).to("cpu").clone() for t in prepared.tensors))
    for tokens in (1, 2, 3, 9):
        x, bias = torch.randn(tokens, 16), torch.randn(12)
        assert difference(routed.run(moved, x, bias, "silu"), x, unpack(packed()), bias, "silu") is None


def test_a_route_refuses_what_a_part_refuses() -> None:
    routed = Routed(((4, Fake("a")), (None, Fake("b", refusal="needs a GPU"))))
    assert routed.rejects(spec_for(packed(), (1,))) == "b: needs a GPU"
