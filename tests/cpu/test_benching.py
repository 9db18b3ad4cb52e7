"""Whole models under the clock: cases of a sweep, the one-token step, labels, ways that do not work here."""

import dataclasses

import pytest
import torch
from torch import nn

from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.export.torch import Artefact, PrunedSite, pack_site
from sparsify_compiler.graph import ConvLayout, MatmulLayout, Site
from sparsify_compiler.kernel import MatmulSpec, Packed
from sparsify_compiler.pattern import NM
from sparsify_compiler.pipeline import bench_random
from sparsify_compiler.pipeline.bench_random import bench_pruned_sites
from sparsify_compiler.pipeline.benching import Bencher, Case, bench_sources, cases, decode_step, resized
from sparsify_compiler.runtime.tuning.verdicts import Timing, Verdict
from sparsify_compiler.sources.models import Source, module_source

CPU = torch.device("cpu")
IDS = torch.arange(6).reshape(2, 3)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_a_batch_is_repeated_and_cut_to_the_sizes_asked_for() -> None:
    assert resized(IDS, 3, 2).tolist() == [[0, 1], [3, 4], [0, 1]]
    assert resized(IDS, None, 5).tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    named = resized({"ids": IDS, "image": torch.zeros(2, 3)}, 1, 1)
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == {"ids": (1, 1), "image": (1, 3)}
    assert resized((IDS,), None, None)[0] is IDS


def test_a_sweep_has_every_combination_and_counts_its_tokens() -> None:
    found = [(case.name, case.tokens()) for case in cases(IDS, (1, 4), (2, 5), decode=True)]
    assert found[:4] == [
        ("batch 1, 2 tokens", 2),
        ("batch 1, 2 tokens, then one token", 1),
        ("batch 1, 5 tokens", 5),
        ("batch 1, 5 tokens, then one token", 1),
    ]
    assert len(found) == 8
    assert [(case.name, case.tokens()) for case in cases(torch.zeros(2, 4), (), (), False)] == [
        ("input 0 (2, 4)", None)
    ]


def test_one_more_token_costs_what_the_whole_sequence_would_say() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 11, (2, 5))
    step = decode_step(model, model, {"input_ids": ids}, calls=3)
    first, second = step().logits[:, -1].clone(), step().logits[:, -1]
    more = torch.cat([ids, ids[:, -1:], ids[:, -1:]], dim=1)
    with torch.no_grad():
        whole = model(more).logits
    torch.testing.assert_close(first, whole[:, 5], rtol=0, atol=1e-5)  # float32, logits of size 0.1
    torch.testing.assert_close(second, whole[:, 6], rtol=0, atol=1e-5)


def test_a_model_that_cannot_decode_says_so_and_others_are_still_timed() -> None:
    with pytest.raises(ModelError, match="causal language model"):
        decode_step(nn.Linear(2, 2), nn.Linear(2, 2), IDS, 3)
    bencher = Bencher({"m": module_source(small(), "m")}, CPU, repeats=5)
    with pytest.raises(DataError, match=r"nothing to time for 'x': m: Sequential cannot be timed one token"):
        bencher.compare(Case("x", torch.zeros(2, 4), decode=True))


def test_every_model_and_case_gets_a_row_and_modules_stay_in_their_mode() -> None:
    first, second = small(), small().eval()
    sources = [module_source(first, "a/one"), module_source(second, "a/two")]
    report = bench_sources(sources, [*cases(torch.zeros(2, 4), (1, 2), (), False)], CPU, 5, False)
    assert [(row.label, row.case) for row in report.rows] == [
        ("one", "input 0 (1, 4)"),
        ("two", "input 0 (1, 4)"),
        ("one", "input 0 (2, 4)"),
        ("two", "input 0 (2, 4)"),
    ]
    assert [row.verdict == "base" for row in report.rows] == [True, False, True, False]
    assert dict(report.machine)["device"] == "cpu"
    assert first.training
    assert not second.training


def pruned(name: str, weight: torch.Tensor, groups: int = 1) -> tuple[PrunedSite, Packed]:
    """Prune a Linear's weight, or a 3x3 Conv2d's, to 2:4 and pack it as an artefact does."""
    convolution = ConvLayout((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), groups)
    layout = convolution if weight.ndim == 4 else MatmulLayout(False, 0)
    out, in_, run = weight.shape[0] // groups, weight[0].numel(), weight.shape[1]
    site = Site(name, "kind", name, tuple(weight.shape), out, in_, groups, run, layout, "x", 0)
    keep = torch.stack([NM(2, 4).select(torch.rand(out, in_), 0.5, run) for _ in range(groups)])
    found = PrunedSite(site, "2:4", keep, (name,))
    return found, pack_site({name: weight}, found)


def test_alike_layers_of_a_folder_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [pruned("conv", torch.randn(8, 3, 3, 3), 2), pruned("a", torch.randn(8, 8)), pruned("b", torch.randn(8, 8))]
    packed = {site.site.name: weight for site, weight in parts}
    artefact = Artefact({}, {}, tuple(site for site, _ in parts), packed, "cpu", (1,))
    asked: list[tuple[tuple[int, int], int | None]] = []

    def one(tester: object, packed: Packed, spec: MatmulSpec) -> Verdict:
        asked.append((packed.shape, spec.run))
        row = Timing("fast", spec.tokens[0], 2.0, 6.0, 0.01, 3.0, "faster: 3.00x, spread 1%")
        return Verdict("fast", "fast: 3.00x", (row,))

    monkeypatch.setattr(bench_random, "_tune_one", one)
    found = bench_pruned_sites(artefact, (1,), CPU)
    assert [layer.rows[0].layer for layer in found.layers] == ["conv", "a and 1 like it"]
    assert asked == [((4, 27), 3), ((8, 8), None)]  # one group's product, whose groups of 2:4 start again at each tap
    with pytest.raises(DataError, match="no pruned layer"):
        bench_pruned_sites(dataclasses.replace(artefact, sites=()), (1,), CPU)


def test_models_of_one_name_are_told_apart() -> None:
    def labels(*references: str) -> list[str]:
        sources: list[Source] = [module_source(small(), reference) for reference in references]
        rows = bench_sources(sources, [*cases(torch.zeros(2, 4), (), (), False)], CPU, 5, False).rows
        return [row.label for row in rows]

    assert labels("x/m", "y/m", "z/n") == ["x/m", "y/m", "n"]
    assert labels("m", "m") == ["m", "m (2)"]
