"""A whole model is tuned: equal layers once, in one child process, kept on disk; what won travels with the artefact."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from kernels import skip_without_mkl
from models.small import Mlp, mlp_batches, seeded
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.api import Options
from sparsify_compiler.errors import KernelError
from sparsify_compiler.export.report import Timing, report_from_json
from sparsify_compiler.graph import MatmulLayout, Site
from sparsify_compiler.passes.lower import Lowerable
from sparsify_compiler.pattern import Unstructured
from sparsify_compiler.pipeline import tuning
from sparsify_compiler.pipeline.tuning import Tuner
from sparsify_compiler.runtime.cpu.csr import TorchCsr
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.layers.modules import SparseLinear
from sparsify_compiler.runtime.tuning import verdicts as verdicts_module
from sparsify_compiler.runtime.tuning.candidates import Budget
from sparsify_compiler.runtime.tuning.selftest import SelfTest

CPU = torch.device("cpu")
QUICK = Budget(seconds=0.02, least_rounds=3, variant_seconds=0.1)
ROUTE = "dense@2+torch_csr"


def part(name: str, out: int = 24, in_: int = 40) -> Lowerable:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(len(name)))
    keep = Unstructured().select(weight.abs(), 0.9)
    site = Site(
        name=name,
        kind="linear",
        parameter=f"{name}.weight",
        shape=(out, in_),
        out=out,
        in_=in_,
        groups=1,
        run=in_,
        layout=MatmulLayout(False, 0),
        reads="",
        segment=0,
        calls=1,
    )
    return Lowerable(site, weight * keep, keep, torch.zeros(out))


@pytest.mark.usefixtures("child_processes")
def test_equal_layers_are_measured_once_and_known_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "kernels", lambda: (Dense(), TorchCsr()))  # those that nobody has to compile first
    monkeypatch.setattr(verdicts_module, "MOST_SPREAD", float("inf"))  # a verdict of a busy machine is not kept
    parts = {"a": part("a"), "b": part("b"), "wide": part("wide", 24, 56)}
    patterns = dict.fromkeys(parts, Unstructured())
    told: list[tuple[str, int, int]] = []
    with Tuner((1, 3), torch.float32, CPU, lambda *at: told.append(at), tmp_path, QUICK) as tuner:
        verdicts = tuner.verdicts(parts, patterns)
        assert isinstance(tuner.tester, SelfTest)
        child = tuner.tester._child
        assert child is not None
        assert child.process.poll() is None
    assert child.process.poll() is not None  # left with the tuner
    assert told == [("tune", 0, 3), ("tune", 1, 3), ("tune", 2, 3), ("tune", 3, 3)]
    assert verdicts["a"] is verdicts["b"]
    assert verdicts["wide"] is not verdicts["a"]
    assert {row.kernel for row in verdicts["a"].timings} or verdicts["a"].refused
    with Tuner((1, 3), torch.float32, CPU, cache=tmp_path, budget=QUICK) as later:
        again = later.verdicts(parts, patterns)
        assert isinstance(later.tester, SelfTest)
        assert later.tester._child is None
    assert {name: verdict.kernel for name, verdict in again.items()} == {n: v.kernel for n, v in verdicts.items()}
    assert again["wide"].reason.endswith("from the cache)")
    assert again["a"].timings == verdicts["a"].timings


def test_without_a_cache_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Tuner((1,), torch.float32, CPU, budget=QUICK).verdict(part("a"), Unstructured())
    assert list(tmp_path.iterdir()) == []


def written(folder: Path, **site: str) -> Path:
    recipe = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.9),))
    sc.compile(seeded(Mlp), mlp_batches(1), recipe=recipe, options=Options(output=folder, tokens=(1, 9), onnx=False))
    table = json.loads((folder / "sparsify.json").read_text())
    for entry in table["sites"].values():
        entry.update(site)
    (folder / "sparsify.json").write_text(json.dumps(table))
    return folder


def test_a_routed_kernel_and_its_variants_come_back_from_the_artefact(tmp_path: Path) -> None:
    skip_without_mkl("torch_csr")
    module = sc.load(written(tmp_path / "out", kernel=ROUTE, variants="1=;9=x"), into=seeded(Mlp))
    sparse = [layer for layer in module.modules() if isinstance(layer, SparseLinear)]
    assert len(sparse) == 8
    assert {(layer.kernel, layer.variants) for layer in sparse} == {(ROUTE, "1=;9=x")}
    dense = sc.load(written(tmp_path / "dense", kernel="dense"), into=seeded(Mlp))
    for tokens in (1, 2, 3, 9):
        x = torch.randn(1, tokens, 32)
        torch.testing.assert_close(module(x), dense(x), rtol=1e-4, atol=1e-5)  # 64 float32 terms, two orders of summing


def test_an_artefact_written_before_there_were_variants_is_read(tmp_path: Path) -> None:
    skip_without_mkl("torch_csr")
    folder = written(tmp_path / "out", kernel="torch_csr")
    table = json.loads((folder / "sparsify.json").read_text())
    assert table.pop("version") == 2
    for entry in table["sites"].values():
        del entry["variants"]
    (folder / "sparsify.json").write_text(json.dumps({**table, "version": 1}))
    module = sc.load(folder, into=seeded(Mlp))
    assert {layer.variants for layer in module.modules() if isinstance(layer, SparseLinear)} == {""}


def test_variants_that_are_no_variants_are_refused_by_name(tmp_path: Path) -> None:
    skip_without_mkl("torch_csr")
    folder = written(tmp_path / "out", kernel=ROUTE, variants="what is this")
    with pytest.raises(KernelError, match="kernel variants 'what is this'"):
        sc.load(folder, into=seeded(Mlp))(torch.randn(1, 3, 32))


def test_a_report_written_before_there_were_variants_is_read(tmp_path: Path) -> None:
    table = json.loads((written(tmp_path / "out") / "report.json").read_text())
    old = json.loads(json.dumps(table))
    for site in old["sites"]:
        del site["variants"], site["kernel_bytes"]
        for timing in site["timings"]:
            del timing["variant"]
    report = report_from_json(json.dumps(old))
    assert all(site.variants == "" and not site.kernel_bytes for site in report.sites)
    assert dataclasses.fields(Timing)[-1].name == "variant"
    assert any(site["kernel_bytes"].get("dense") for site in table["sites"])


def test_a_routed_layer_moves_saves_and_compiles_like_any_other() -> None:
    skip_without_mkl("torch_csr")
    found = part("a")
    tuner = Tuner((1, 9), torch.float32, CPU)
    layer = tuner.build(found, Unstructured(), ROUTE)
    assert isinstance(layer, SparseLinear)
    dense = nn.Linear(40, 24)
    dense.weight.data.copy_(found.weight)
    nn.init.zeros_(dense.bias)
    exported = torch.export.export(layer, (torch.randn(5, 40),)).module()
    x = torch.randn(5, 40)
    for run in (layer, exported, torch.compile(layer, backend="aot_eager")):
        torch.testing.assert_close(run(x), dense(x), rtol=1e-5, atol=1e-5)  # 4 float32 terms of size 1
    torch.testing.assert_close(layer.double()(x.double()), dense.double()(x.double()))
    again = tuner.build(part("other"), Unstructured(), ROUTE).double()
    again.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(again(x.double()), dense(x.double()))
