"""Gradients against measured outputs on a real language model: do they put its sites in the same order?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.graph import Site
from sparsify_compiler.passes.error_curves import Outputs, dense_walk
from sparsify_compiler.passes.prune.solve import prune_with
from sparsify_compiler.passes.sensitivity import DivergenceProbe, Sensitivity
from sparsify_compiler.plan import decide
from sparsify_compiler.progress import silent
from sparsify_compiler.sources.models import load_model

pytestmark = pytest.mark.slow


def told_by(module: nn.Module, windows: int, length: int) -> Tensor:
    """Draw token ids (windows, length) from a language model itself."""
    generator, ids = torch.Generator().manual_seed(0), torch.ones(windows, 1, dtype=torch.long)
    with torch.no_grad():
        while ids.shape[1] < length:
            last = module(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(last.softmax(-1), 1, generator=generator)], 1)
    return ids


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def test_gradients_order_the_sites_of_a_real_model_as_its_measured_outputs_do(shared: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    module = load_model(str(shared / "stories260k")).module
    assert module is not None
    batches = [{"input_ids": each[None]} for each in told_by(module, 12, 128)]
    graph = trace_module(module, batches[0])
    decisions = decide(sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5),)), graph.sites)
    changes: dict[str, tuple[Site, Tensor]] = {}
    divergences, errors = [], []
    outputs = Outputs(graph, batches)
    with torch.no_grad():
        dense = [module(**batch).logits.log_softmax(-1) for batch in batches]
    for site, (problem,) in dense_walk(graph, batches, decisions, sc.SparseGPT(), silent):
        pruned = prune_with(problem, sc.SparseGPT(), refit=False).weight
        changes[site.name] = site, (pruned - problem.weight)[None]
        errors.append(outputs.moved(site, pruned[None]))
        weight = module.get_parameter(site.parameter)
        with torch.no_grad():
            weight += changes[site.name][1][0]
            pairs = zip(dense, batches, strict=True)
            found = [(y.exp() * (y - module(**batch).logits.log_softmax(-1))).sum(-1).mean() for y, batch in pairs]
            weight -= changes[site.name][1][0]
        divergences.append(float(torch.stack(found).mean()))
    sensitivity = Sensitivity(graph, DivergenceProbe(by_token=True))
    predicted = sensitivity.effects(batches, changes).sizes
    assert predicted == sensitivity.effects(batches, changes).sizes
    assert set(predicted) == set(changes)
    told = [predicted[name] for name in changes]
    # .99 and .98 when this was written; an order that says nothing has a correlation within .45 of zero (35 sites)
    assert float(torch.corrcoef(torch.stack([ranks(told), ranks(divergences)]))[0, 1]) > 0.95
    assert float(torch.corrcoef(torch.stack([ranks(told), ranks(errors)]))[0, 1]) > 0.9
    ratios = torch.tensor(told) / torch.tensor(divergences)
    assert float(ratios.min()) > 0.4  # to second order, and without what tokens do together: .48 to 1.01 then
    assert float(ratios.max()) < 1.6
