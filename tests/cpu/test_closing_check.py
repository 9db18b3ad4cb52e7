"""When the exported file fails its check, compile says what made it likely and how to keep the pruned model."""

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.errors import VerificationError
from sparsify_compiler.export import onnx_model
from sparsify_compiler.export.onnx_torch import export_torch
from sparsify_compiler.export.onnx_verify import write_onnx
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.pattern import NM
from sparsify_compiler.pipeline.closing_check import explained, growth
from sparsify_compiler.recipe import Recipe, make_rule

RECIPE = Recipe((make_rule("*", NM(2, 4), Magnitude(), refit=False),))


def fail(*arguments: object) -> None:
    raise VerificationError("model.onnx: differs")


@pytest.mark.parametrize("kind", ["module", "program", "onnx"])
def test_a_failed_check_offers_the_ways_on(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batch = torch.randn(4, 8)
    model: object = module
    if kind == "program":
        model = torch.export.export(module, (batch,))
    if kind == "onnx":
        model = tmp_path / "dense.onnx"
        write_onnx(export_torch(module, batch).model, model)
    monkeypatch.setattr(onnx_model, "verify", fail)
    with pytest.raises(VerificationError, match=r"differs; --no-onnx writes the torch artefact alone; with --resume"):
        sc.compile(model, [batch], recipe=RECIPE, options=sc.Options(output=tmp_path / "out", cache=None))  # type: ignore[arg-type]


def test_the_site_whose_weights_grew_most_is_named_where_that_is_a_likely_cause() -> None:
    error = VerificationError("e")
    assert "fc2 is 1,200 times its largest dense one" in str(explained(error, {"fc1": 150.0, "fc2": 1200.0}))
    assert "times" not in str(explained(error, {"fc1": 99.0}))
    assert "--resume" in str(explained(error, {}))


def test_growth_is_the_ratio_of_the_largest_magnitudes() -> None:
    assert growth(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -5.0]])) == 2.5
    assert growth(torch.zeros(2, 2), torch.ones(2, 2)) == 0
    assert growth(torch.zeros(0, 2), torch.zeros(0, 2)) == 0
