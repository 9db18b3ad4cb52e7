"""What loading and inspecting say of themselves: sites that run dense after all, inputs that were generated."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from models.small import Mlp, mlp_batches, seeded
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.api import Options, inspect
from sparsify_compiler.errors import DataError
from sparsify_compiler.runtime.layers.modules import SparseLinear

RECIPE = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.9),))


class Attending(nn.Module):
    """The projection's weight is read past its module, so that no kernel can stand in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def written(folder: Path, module: nn.Module, **changes: str) -> Path:
    """Compile and write `module`, every site as if a CPU kernel had won; `changes` go into the description."""
    sc.compile(module, mlp_batches(1), recipe=RECIPE, options=Options(output=folder, tokens=(1,), onnx=False))
    table = json.loads((folder / "sparsify.json").read_text()) | changes
    for site in table["sites"].values():
        site["kernel"] = "torch_csr"
    (folder / "sparsify.json").write_text(json.dumps(table))
    return folder


def test_sites_that_run_dense_on_another_device_are_counted_in_a_warning(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", seeded(Mlp), device="NVIDIA H200")
    with pytest.warns(UserWarning, match=r"all 8 sites .* measured on NVIDIA H200 .* compile again there"):
        module = sc.load(folder, into=seeded(Mlp))
    assert not any(isinstance(sub, SparseLinear) for sub in module.modules())


def test_a_site_that_cannot_be_swapped_is_named_in_a_warning(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", seeded(Attending))
    with pytest.warns(UserWarning, match=r"1 of 1 sites .* attention.in_proj_weight: the product is not a Linear"):
        sc.load(folder, into=seeded(Attending))


def test_kernels_that_all_run_are_loaded_without_a_warning(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", seeded(Mlp))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module = sc.load(folder, into=seeded(Mlp))
    assert sum(isinstance(sub, SparseLinear) for sub in module.modules()) == 8


def test_an_inspection_says_that_its_inputs_were_generated() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    assert any("no data was given" in note for note in inspect(module).notes)
    given = inspect(module, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
    assert not any("no data was given" in note for note in given.notes)


def test_an_inspection_asks_kernels_about_every_pattern_in_the_compiled_dtype() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    found = {
        dtype: inspect(module, [torch.randn(4, 64)], dtype=dtype, device="cpu").rows[0].kernels
        for dtype in ("float32", "float16")
    }
    assert found["float32"]["block_gather"] is None  # it runs blocks alone, and blocks fit
    assert found["float16"]["block_gather"] == (
        "runs float32 and float64, whose products a CPU multiplies as they are; found float16"
    )
    assert found["float16"]["nm_mma"] == found["float16"]["block_decode"] == "runs on cuda; found cpu"
    with pytest.raises(DataError, match="choose one of float32"):
        inspect(module, dtype="int8")


def test_memory_is_estimated_before_anything_is_pruned() -> None:
    stages: list[str] = []
    _, report = sc.compile(
        seeded(Mlp),
        mlp_batches(2),
        recipe=sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.SparseGPT()),)),
        progress=lambda stage, done, total: stages.append(stage),
    )
    first = next(stage for stage in stages if stage.startswith("prune"))
    assert first == "prune (about 65.0 KiB of statistics and activations)"
    assert any("estimated before pruning" in note and "of 2 batches" in note for note in report.notes)
