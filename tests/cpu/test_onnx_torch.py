import onnx
import pytest
import torch
from models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded
from torch import nn

from sparsify_compiler.batches import call
from sparsify_compiler.errors import ExportError
from sparsify_compiler.export.onnx_cache import (
    empty_past,
    export_with_cache,
    is_decoder_without_cache,
    verify_with_cache,
)
from sparsify_compiler.export.onnx_model import OnnxSite, write_torch_onnx
from sparsify_compiler.export.onnx_sites import SiteMask, match_sites
from sparsify_compiler.export.onnx_torch import export_torch
from sparsify_compiler.export.onnx_verify import TOLERANCES, verify, write_onnx
from sparsify_compiler.frontends.layout import from_problem, to_problem
from sparsify_compiler.frontends.torch import trace_module, trace_program
from sparsify_compiler.pattern import NM, Unstructured

# Float32 sums in another order through a dozen layers; the largest seen is 1e-6.
TOLERANCE = 1e-5

# transformers' own calls into torch.export warn about torch's internals; the exporter under test keeps quiet by itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


def prune(module: nn.Module, batch, pattern, sparsity: float = 0.5) -> dict[str, OnnxSite]:
    """Put magnitude zeros into every site that takes the pattern; the module's weights are changed."""
    sites = {}
    named = dict(module.named_parameters())
    for site in trace_module(module, batch).sites:
        if site.refusal or site.dense_by_default or pattern.misfit(site.out, site.in_, site.run):
            continue
        weight = to_problem(named[site.parameter].detach(), site.layout)
        keep = torch.stack([pattern.select(rows.abs().float(), sparsity, site.run) for rows in weight])
        named[site.parameter].data = from_problem(weight * keep, site.layout, site.shape)
        sites[site.name] = OnnxSite(keep, pattern)
    assert sites
    return sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pruned_module_is_written_packed_and_gives_the_same_outputs(dtype, tmp_path):
    module, batch = seeded(Mlp).to(dtype), mlp_batches(1)[0].to(dtype)
    sites = prune(module, batch, NM(2, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    written = write_torch_onnx(module, batch, tmp_path / "model.onnx", sites)
    assert written.verification.ran
    assert written.verification.difference <= (TOLERANCE if dtype == torch.float32 else TOLERANCES[dtype])
    assert written.forms == dict.fromkeys(sites, "NMLinear")
    assert written.notes == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    proto = onnx.load(tmp_path / "model.onnx")
    assert [function.name for function in proto.functions] == ["NMLinear"]
    assert [value.name for value in proto.graph.input] == ["x"]


def test_a_written_file_takes_other_batch_sizes(tmp_path):
    module, batch = seeded(Cnn), image_batches(1)[0]
    sites = prune(module, batch, Unstructured(), 0.6)
    write_torch_onnx(module, batch[:1], tmp_path / "model.onnx", sites)
    with torch.no_grad():
        result = verify(tmp_path / "model.onnx", batch[:5], call(module, batch[:5]), TOLERANCE)
    assert result.ran


def test_convolutions_are_found_after_their_batchnorm_was_folded_into_them(tmp_path):
    module, batch = seeded(Cnn), image_batches(1)[0]
    sites = prune(module, batch, NM(2, 4))
    assert {"grouped", "point"} <= set(sites)
    written = write_torch_onnx(module, batch, tmp_path / "model.onnx", sites)
    assert set(written.forms) == set(sites)
    assert written.notes == ()
    assert written.verification.difference <= TOLERANCE
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "model.onnx").graph.node)


def test_one_layer_used_three_times_is_stored_once(tmp_path):
    module, ids = seeded(Tied), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    sites = prune(module, ids, NM(2, 4))
    written = write_torch_onnx(module, ids, tmp_path / "model.onnx", sites)
    assert written.verification.difference <= TOLERANCE
    proto = onnx.load(tmp_path / "model.onnx")
    assert sum(node.op_type == "NMLinear" for node in proto.graph.node) == 5
    assert sum(tensor.name.endswith(".values") for tensor in proto.graph.initializer) == 3
    dims = [[axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in proto.graph.input]
    assert dims == [["batch", "sequence"]]


def test_the_file_holds_no_line_of_the_users_source(tmp_path):
    module, batch = seeded(Mlp), mlp_batches(1)[0]
    write_onnx(export_torch(module, batch).model, tmp_path / "model.onnx")
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


def test_inputs_are_called_as_in_the_forward_and_outputs_as_in_the_returned_mapping(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, left, right, scale=None):
            total = self.fc(left + right)
            return {"total": total, "pair": (left, right * 2)}

    batch = {"right": torch.randn(3, 8), "left": torch.randn(3, 8)}
    module = TwoInputs()
    model = export_torch(module, batch).model
    assert {value.name for value in model.graph.inputs} == {"left", "right"}
    assert [value.name for value in model.graph.outputs] == ["total", "pair.0", "pair.1"]
    write_onnx(model, tmp_path / "model.onnx")
    assert verify(tmp_path / "model.onnx", batch, call(module, batch), TOLERANCE).ran


def test_unnamed_inputs_are_numbered_and_their_batch_is_free():
    class Sum(nn.Module):
        def forward(self, *terms):
            return terms[0] + terms[1]

    exported = export_torch(Sum(), (torch.ones(3, 8), torch.ones(3, 8)))
    assert exported.dynamic
    assert [value.name for value in exported.model.graph.inputs] == ["input_0", "input_1"]
    assert [str(value.shape) for value in exported.model.graph.inputs] == ["[batch,8]", "[batch,8]"]


class FixedRows(nn.Module):
    """A forward written for the one batch size `rows`."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.fc = rows, nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(x.reshape(self.rows, 8))


class Baked(nn.Module):
    """A forward that runs at every batch size, and fixes the one it is traced at."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(x.reshape(int(x.shape[0]), 8) * len(range(x.shape[0])))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("baked", [False, True])
def test_a_batch_size_that_the_forward_fixes_is_kept_and_said(rows, baked, tmp_path):
    module, batch = (Baked(rows) if baked else FixedRows(rows)).eval(), torch.randn(rows, 8)
    written = write_torch_onnx(module, batch, tmp_path / "model.onnx", {})
    assert written.verification.ran
    assert any("has the example batch's sizes" in note for note in written.notes)


def test_a_text_whose_length_the_forward_fixes_is_checked_whole(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.places = nn.Embedding(10, 8), nn.Parameter(torch.randn(200, 8))

        def forward(self, ids):
            return self.embed(ids) + self.places

    ids = torch.randint(0, 10, (2, 200), generator=torch.Generator().manual_seed(0))
    assert write_torch_onnx(Positions(), ids, tmp_path / "model.onnx", {}).verification.ran
    (value,) = onnx.load(tmp_path / "model.onnx").graph.input
    assert [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] == ["batch", 200]


def test_a_saved_program_exports_like_the_module_it_was_made_from(tmp_path):
    module, batch = seeded(Mlp), mlp_batches(1)[0]
    sites = prune(module, batch, NM(2, 4))
    program = torch.export.export(module, (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    written = write_torch_onnx(trace_program(program).module, batch, tmp_path / "model.onnx", sites)
    assert written.forms == dict.fromkeys(sites, "NMLinear")
    assert written.verification.difference <= TOLERANCE


def test_a_module_that_branches_on_its_data_is_refused_with_the_reason():
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"torch\.export cannot follow Branching: .*data-dependent"):
        export_torch(Branching(), torch.randn(2, 3))


def test_a_site_is_matched_by_its_zeros_where_its_name_is_gone():
    module, batch = seeded(Mlp), mlp_batches(1)[0]
    sites = prune(module, batch, NM(2, 4))
    masks = {f"renamed.{name}": SiteMask(site.keep, site.pattern) for name, site in sites.items()}
    model = export_torch(module, batch).model
    found = match_sites(model, masks)
    assert set(found) == set(masks)
    for name, products in found.items():
        scopes = products[0].node.metadata_props["pkg.torch.onnx.name_scopes"]
        assert f"'{name.removeprefix('renamed.')}'" in scopes
    foreign = {"other": SiteMask(~next(iter(masks.values())).keep, NM(2, 4))}
    assert match_sites(model, foreign) == {}


@pytest.fixture(scope="module")
def decoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_decoder_with_its_cache_equals_the_run_over_the_whole_sequence(decoder, tmp_path):
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # padding at the end of the shorter sequence
    batch = {"input_ids": ids, "attention_mask": mask}
    exported = export_with_cache(decoder, batch)
    path = tmp_path / "model.onnx"
    write_onnx(exported.model, path)
    cache = [f"{index}.{part}" for index in range(2) for part in ("key", "value")]
    assert [value.name for value in exported.model.graph.inputs] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{entry}" for entry in cache),
    ]
    assert [value.name for value in exported.model.graph.outputs] == ["logits", *(f"present.{e}" for e in cache)]
    (expected,) = call(decoder, batch)
    assert empty_past(exported.model, 2)["past_key_values.1.key"].shape == (2, 2, 0, 8)
    assert verify_with_cache(path, exported.model, batch, expected.detach(), TOLERANCE).ran
    alone = {name: tensor[:1, :1] for name, tensor in batch.items()}  # one token of one sequence: all axes are free
    assert verify_with_cache(path, exported.model, alone, expected[:1, :1].detach(), TOLERANCE).ran
    assert "model.layers.0.mlp.up_proj" in match_sites(exported.model, _all_kept(decoder))


def _all_kept(decoder: nn.Module) -> dict[str, SiteMask]:
    name = "model.layers.0.mlp.up_proj"
    weight = decoder.get_submodule(name).weight
    return {name: SiteMask(torch.ones(1, *weight.shape, dtype=torch.bool), Unstructured())}


def test_a_decoder_without_its_cache_is_known_as_one(decoder):
    assert is_decoder_without_cache(decoder)
    assert not is_decoder_without_cache(seeded(Mlp))


def test_a_module_without_a_cache_cannot_be_exported_with_one(decoder):
    with pytest.raises(ExportError, match="needs a batch with input_ids"):
        export_with_cache(decoder, {"attention_mask": torch.ones(1, 4, dtype=torch.long)})
    with pytest.raises(ExportError, match="found 'labels'"):
        export_with_cache(decoder, {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4)})
    with pytest.raises(ExportError, match="Mlp does not keep its keys and values in transformers' DynamicCache"):
        export_with_cache(seeded(Mlp), torch.ones(1, 4, dtype=torch.long))
