"""The measured choice between a sparse convolution and conv2d, with a stopwatch that follows a script."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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

    def load(self, label: str, calls: Sequence[Callable[[], object]], capture: bool = True) -> Measure:
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
    assert "sparse: faster, 2.00x over 60 tokens on average" in verdict.reason
    assert verdict.reason.endswith("(the whole convolution, at input 2x8x5x6)")
    assert {row.kernel: row.speedup for row in verdict.timings} == {"sparse": 2, "slow": pytest.approx(1 / 3)}
    assert script.order.count("slow 60") == 3 + 3  # its variant's rounds, and those up to the look
    assert verdict.rounds == script.order.count("dense 60") == 6


def test_dense_stays_where_nothing_wins_or_runs(known: Callable[..., tuple[Kernel, ...]]) -> None:
    fakes = known(Fake("sparse"))
    verdict = tune_conv(problem(), fakes, Budget(most_rounds=6), Script({"dense 60": [10], "sparse 60": [12.5]}))
    assert verdict.kernel == "dense"
    assert "sparse: slower, 0.80x" in verdict.reason
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
    assert problem().key() == problem().key()
    assert len({problem().key(), *(other.key() for other in others)}) == 4
    with pytest.raises(KernelError, match="too small"):
        replace(problem(), input=ConvInput((1, 8, 0, 0))).key()
