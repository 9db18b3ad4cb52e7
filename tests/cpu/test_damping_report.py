"""A compiled model's report says of every site by how much its damping had to be raised."""

import pytest
import torch

import sparsify_compiler as sc
from sparsify_compiler.export.report import report_from_json
from sparsify_compiler.export.report_html import report_html
from sparsify_compiler.export.report_text import report_text
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.problem import Pruner
from tests.models.small import Mlp, seeded

DAMP = 1e-12
"""Far below the rounding of float32 products, 1e-7: with fewer tokens than inputs it leaves them indefinite."""

METHODS = (sc.SparseGPT(damp=DAMP), sc.ALPS(damp=DAMP), OBC(damp=DAMP), IOBS(damp=DAMP), WoodTaylor(damp=DAMP))


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_report_has_every_step_in_which_damping_was_raised(method: Pruner, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 32, generator=generator) for _ in range(3)]  # 18 tokens, 12 with one batch held out
    recipe = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), method, refit=False),), rounds=rounds)
    options = sc.Options(tokens=(1,), share_batches=rounds > 1)
    _, report = sc.compile(seeded(Mlp, depth=1), batches, recipe=recipe, options=options)
    site = next(site for site in report.sites if site.status == "pruned")
    steps = [note for note in site.notes if "indefinite at damp" in note]
    assert any(note.endswith("is indefinite at damp 1e-12: raised to 1e-11") for note in steps)
    assert site.damp is not None
    assert site.damp >= 1e-11
    assert any(note.endswith(f"raised to {site.damp:g}") for note in steps)
    assert report_from_json(report.to_json()) == report
    for drawn in (report_text(report), report_html(report)):
        assert "is indefinite at damp 1e-12: raised to 1e-11" in drawn
