"""Convolutions through the whole job: measured on the inputs that the model feeds them, swapped, saved and loaded."""

from pathlib import Path

import pytest
import torch
from models.small import Cnn, image_batches, seeded
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.api import Options
from sparsify_compiler.pipeline import tuning
from sparsify_compiler.pipeline.tuning import conv_inputs
from sparsify_compiler.runtime.layers.conv import SparseConv2d
from sparsify_compiler.runtime.tuning.tune_conv import ConvInput, ConvProblem
from sparsify_compiler.runtime.tuning.verdicts import Verdict

HALF = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.5),))


def test_a_convolution_gets_a_verdict_measured_on_its_own_input() -> None:
    compiled, report = sc.compile(seeded(Cnn), image_batches(), recipe=HALF)
    sites = {site.name: site for site in report.sites}
    for name, size, tokens in (("stem", "8x3x16x16", 2048), ("grouped", "8x16x16x16", 2048), ("point", "8x16", 512)):
        assert f"the whole convolution, at input {size}" in sites[name].reason
        assert {row.tokens for row in sites[name].timings} <= {tokens}
        swapped = isinstance(compiled.get_submodule(name), SparseConv2d)  # type: ignore[union-attr]
        assert swapped == (sites[name].kernel != "dense")


def test_a_convolution_that_won_is_swapped_saved_and_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch was built without MKL, so torch_csr cannot run on the CPU")

    def won(problem: ConvProblem, *rest: object, **options: object) -> Verdict:
        return Verdict("torch_csr", f"won at {problem.tokens}")

    batches = image_batches()
    dense, _ = sc.compile(seeded(Cnn), batches, recipe=HALF, options=Options(tokens=(1,)))
    monkeypatch.setattr(tuning, "tune_conv", won)
    compiled, report = sc.compile(seeded(Cnn), batches, recipe=HALF, options=Options(output=tmp_path / "out"))
    loaded = sc.load(tmp_path / "out", into=seeded(Cnn, seed=4))
    names = {"stem", "grouped", "point"}
    for module in (compiled, loaded):
        found = {name for name, sub in module.named_modules() if isinstance(sub, SparseConv2d)}  # type: ignore[union-attr]
        assert found == names
    assert {site.name for site in report.sites if site.kernel == "torch_csr"} >= names
    with torch.no_grad():
        expected = compiled(batches[0])  # type: ignore[misc, operator]
        assert torch.equal(loaded(batches[0]), expected)
        # Ten layers of sums of at most 144 float32 terms of size 1.
        torch.testing.assert_close(dense(batches[0]), expected, rtol=1e-4, atol=1e-4)  # type: ignore[misc, operator]


class Fork(nn.Module):
    """Runs one of two convolutions, on channels-last input."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.taken(x.to(memory_format=torch.channels_last))


def test_inputs_are_those_of_the_convolutions_that_a_batch_reaches() -> None:
    module = Fork().train()
    found = conv_inputs(module, ("taken", "other"), torch.randn(2, 4, 6, 5))
    assert found == {"taken": ConvInput((2, 4, 6, 5), channels_last=True)}
    assert module.training
    assert not module.taken._forward_pre_hooks
