"""The measured choice between a sparse convolution and conv2d, with a stopwatch that follows a script."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime import kernels as release
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import kernel_named, kernels
from sparsify_compiler.runtime.layers.conv_windows import ConvGeometry
from sparsify_compiler.runtime.tuning.cache import DiskCache
from sparsify_compiler.runtime.tuning.selftest import Outcome
from sparsify_compiler.runtime.tuning.timing import Measure
from sparsify_compiler.runtime.tuning.tune import Budget
from sparsify_compiler.runtime.tuning.tune_conv import ConvInput, ConvProblem, DenseConv, tune_conv


@dataclass(frozen=True)
class Fake(Dense):
    """A dense product under another name, wrong by `offset`, with variants or a refusal."""

    offset: float = 0.0
    refusal: str | None = None
    names: tuple[str, ...] = ("",)
    error: str = ""

    def rejects(self, spec: MatmulSpec) -> str | None:
        return self.refusal

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        return self.names

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        if self.error:
            raise RuntimeError(self.error)
        return replace(super().prepare(packed, spec), kernel=self.name)

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        return super().run(prepared, x, bias, activation) + self.offset


@dataclass
class Script:
    """Reads microseconds from a script by label, round after round."""

    times: Mapping[str, Sequence[float]]
    order: list[str] = field(default_factory=list)
    captured: dict[str, bool] = field(default_factory=dict)

    def load(self, label: str, calls: Sequence[Callable[[], object]], capture: bool = True) -> Measure:
        self.captured[label] = capture
        following = itertools.cycle(self.times[label])

        def once() -> float:
            self.order.append(label)
            return next(following)

        return Measure(once)

    def now(self) -> float:
        return 0.0


@dataclass
class Refusing:
    """A self-test that refuses one kernel."""

    name: str

    def test(self, kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None) -> Outcome:
        assert spec.run == 8
        return Outcome("its self-test crashed" if kernel == self.name else None)


@dataclass
class Uncapturable:
    """A self-test that finds one kernel which no CUDA graph can hold."""

    name: str

    def test(self, kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None) -> Outcome:
        return Outcome(uncapturable="it asks the host" if kernel == self.name else None)


def problem(bias: bool = True, groups: int = 1, channels_last: bool = False) -> ConvProblem:
    """2:4 weights of a 3x3 convolution of 8 channels a group to 12; 2 images of 5x6, so 60 positions."""
    generator = torch.Generator().manual_seed(0)
    geometry = ConvGeometry(8 * groups, (3, 3), padding=((1, 1), (1, 1)), groups=groups)
    packed = []
    for _ in range(groups):
        weight = torch.randn(12 // groups, 72, generator=generator)
        packed.append(format_for(NM(2, 4)).pack(weight, NM(2, 4).select(weight.abs(), 0.5, 8), NM(2, 4), 8))
    return ConvProblem(
        tuple(packed), geometry, ConvInput((2, 8 * groups, 5, 6), channels_last), torch.ones(12) if bias else None
    )


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Kernel, ...]]:
    """Make fake kernels known by name."""

    def put(*fakes: Kernel) -> tuple[Kernel, ...]:
        monkeypatch.setattr(release, "kernels", lambda: (Dense(), *fakes))
        kernel_named.cache_clear()
        return (Dense(), *fakes)

    yield put
    kernel_named.cache_clear()


def test_a_layer_that_is_faster_as_a_whole_wins_with_its_best_variant(known: Callable[..., tuple[Kernel, ...]]) -> None:
    fakes = known(Fake("sparse", names=("a", "b", "c")), Fake("slow"))
    script = Script({"dense 60": [10], "sparse a 60": [9], "sparse b 60": [5], "sparse c 60": [7], "slow 60": [30]})
    verdict = tune_conv(problem(), fakes, Budget(most_rounds=6), script)
    assert (verdict.kernel, verdict.variants) == ("sparse", "60=b")
    assert "sparse: 2.00x ±0.00 over 60 tokens" in verdict.reason
    assert verdict.reason.endswith("(the whole convolution, at input 2x8x5x6)")
    assert {row.kernel: row.speedup for row in verdict.timings} == {"sparse": 2, "slow": pytest.approx(1 / 3)}
    assert script.order.count("slow 60") == 3 + 3  # its variant's rounds, and those up to the look
    assert verdict.rounds == script.order.count("dense 60") == 6


def test_dense_stays_where_nothing_wins_or_runs(known: Callable[..., tuple[Kernel, ...]]) -> None:
    fakes = known(Fake("sparse"))
    verdict = tune_conv(problem(), fakes, Budget(most_rounds=6), Script({"dense 60": [10], "sparse 60": [12.5]}))
    assert verdict.kernel == "dense"
    assert "against sparse 0.80x ±0.00" in verdict.reason
    fakes = known(Fake("wrong", 0.1), Fake("no", refusal="needs a GPU"), Fake("bad", error="broken"), Fake("crash"))
    verdict = tune_conv(problem(), fakes, None, Script({"dense 60": [10]}), Refusing("crash"))
    assert "no sparse kernel can run this convolution" in verdict.reason
    assert "720 of 720 outputs differ" in verdict.refused["wrong"]
    assert verdict.refused["no"] == "needs a GPU"
    assert verdict.refused["bad"] == "failed: broken"
    assert verdict.refused["crash"] == "its self-test crashed"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_real_kernels_are_measured_on_this_machine(groups: int, channels_last: bool) -> None:
    verdict = tune_conv(problem(groups == 1, groups, channels_last), kernels(), Budget(seconds=0.05))
    assert verdict.timings or verdict.refused
    assert {row.tokens for row in verdict.timings} <= {60}
    assert all(row.time_us > 0 and row.dense_us > 0 for row in verdict.timings)


def test_what_is_measured_as_dense_is_conv2d() -> None:
    part = problem()
    x = torch.randn(2, 8, 5, 6)
    weight = part.module("dense").weight
    assert torch.equal(DenseConv(part)(x), nn.functional.conv2d(x, weight, part.bias, padding=1))
    uneven = ConvGeometry(8, (3, 3), padding=((1, 0), (0, 2)))
    moved = replace(part, geometry=uneven)
    torch.testing.assert_close(DenseConv(moved)(x), moved.module("dense")(x), rtol=0, atol=0)


def test_equal_convolutions_share_a_key_and_others_do_not() -> None:
    others = [problem(False), replace(problem(), input=ConvInput((1, 8, 5, 6))), replace(problem(), activation="relu")]
    keys = [json.dumps(other.key()) for other in (problem(), problem(), *others)]
    assert len(set(keys)) == 4
    with pytest.raises(KernelError, match="too small"):
        replace(problem(), input=ConvInput((1, 8, 0, 0))).key()


def test_a_convolution_is_measured_once_and_then_read(known: Callable[..., tuple[Kernel, ...]], tmp_path: Path) -> None:
    fakes, cache = known(Fake("sparse")), DiskCache(tmp_path)
    script = Script({"dense 60": [10], "sparse 60": [5]})
    first = tune_conv(problem(), fakes, stopwatch=script, cache=cache)
    asked = len(script.order)
    again = tune_conv(problem(), fakes, stopwatch=script, cache=cache)
    assert len(script.order) == asked
    assert replace(again, reason=first.reason) == first
    assert "from the cache" in again.reason
    tune_conv(replace(problem(), input=ConvInput((1, 8, 10, 6))), fakes, stopwatch=script, cache=cache)
    assert len(script.order) > asked


def test_a_lack_of_memory_is_not_kept(known: Callable[..., tuple[Kernel, ...]], tmp_path: Path) -> None:
    fakes = known(Fake("full", error="can't allocate memory: 9 GiB"))
    verdict = tune_conv(problem(), fakes, stopwatch=Script({"dense 60": [10]}), cache=DiskCache(tmp_path))
    assert verdict.refused["full"].startswith("out of memory")
    assert list(tmp_path.iterdir()) == []


def test_what_no_graph_can_hold_is_not_captured(known: Callable[..., tuple[Kernel, ...]], tmp_path: Path) -> None:
    fakes, cache = known(Fake("asks_the_host"), Fake("other")), DiskCache(tmp_path)
    for _ in range(2):  # measured now, and with the self-test's answer from the cache
        script = Script({"dense 60": [10], "asks_the_host 60": [5], "other 60": [7]})
        tune_conv(problem(), fakes, stopwatch=script, tester=Uncapturable("asks_the_host"), cache=cache)
        assert script.captured == {"dense 60": True, "asks_the_host 60": False, "other 60": True}
        for file in tmp_path.glob("verdict-*"):
            file.unlink()
