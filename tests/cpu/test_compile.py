"""The whole job on small models: what comes back, what is written, what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.errors import DataError, ExportError, KernelError, ModelError, PatternError, RecipeError
from sparsify_compiler.pipeline.options import Options
from tests.models.small import Cnn, Mlp, Tied, image_batches, mlp_batches, seeded

HALF = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5),))
TWO_FOUR = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.SparseGPT()),))
MAGNITUDE = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.Magnitude()),))


def fingerprint(module: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        state.update(name.encode() + tensor.detach().numpy().tobytes())
    return state.hexdigest()


def run_onnx(path: Path, *arrays: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (array.numpy() for array in arrays), strict=True)))


def test_a_copy_of_the_users_own_module_comes_back_and_the_input_is_unchanged(tmp_path: Path) -> None:
    module, batches = seeded(Mlp), mlp_batches()
    before = fingerprint(module)
    compiled, report = sc.compile(
        module, batches, recipe=TWO_FOUR, options=Options(output=tmp_path / "out", tokens=(1, 8))
    )
    assert type(compiled) is Mlp
    assert fingerprint(module) == before
    assert sum(site.status == "pruned" for site in report.sites) == 8
    with torch.no_grad():
        expected = compiled(batches[0])
        assert not torch.equal(expected, module(batches[0]))
        reloaded = sc.load(tmp_path / "out", into=seeded(Mlp, seed=5))
        assert torch.equal(reloaded(batches[0]), expected)
    found = run_onnx(tmp_path / "out" / "model.onnx", batches[0])[0]
    assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.onnx", "model.safetensors", "sparsify.json", "report.json", "report.html",
    }  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    assert sc.report_from_json((tmp_path / "out" / "report.json").read_text()) == report


def test_every_chosen_weight_obeys_its_pattern_and_the_head_stays_dense(tmp_path: Path) -> None:
    compiled, report = sc.compile(seeded(Mlp), mlp_batches(), recipe=TWO_FOUR)
    assert isinstance(compiled, Mlp)
    for block in compiled.blocks:
        for layer in (block.up, block.down):  # type: ignore[union-attr]
            kept = (layer.weight.reshape(-1, 4) != 0).sum(1)  # type: ignore[union-attr, operator]
            assert (kept <= 2).all()
    head = report.sites[-1]
    assert (head.name, head.status) == ("head", "dense")
    assert "output head" in head.reason


def test_a_rule_that_names_the_head_prunes_it() -> None:
    recipe = sc.Recipe((sc.make_rule("head", sc.Unstructured(), sc.Wanda(), 0.5),))
    compiled, report = sc.compile(seeded(Mlp), mlp_batches(), recipe=recipe)
    assert isinstance(compiled, Mlp)
    assert [site.name for site in report.sites if site.status == "pruned"] == ["head"]
    assert int((compiled.head.weight == 0).sum()) == 160


@pytest.mark.parametrize("pattern", [sc.Unstructured(), sc.NM(2, 4), sc.Block(4, 4)], ids=str)
def test_a_network_of_convolutions_is_pruned_exported_and_reloaded(tmp_path: Path, pattern: sc.Unstructured) -> None:
    batches = image_batches()
    recipe = sc.Recipe((sc.make_rule("*", pattern, sc.SparseGPT(), 0.5),))
    compiled, report = sc.compile(seeded(Cnn), batches, recipe=recipe, options=Options(output=tmp_path / "out"))
    assert isinstance(compiled, Cnn)
    status = {site.name: site.status for site in report.sites}
    assert status["grouped"] == "pruned"
    assert status["depthwise"] == status["up"] == "refused"
    assert status["stem"] == ("dense" if pattern in (sc.NM(2, 4), sc.Block(4, 4)) else "pruned")
    assert any("2 BatchNorm layers were re-estimated" in note for note in report.notes)
    with torch.no_grad():
        expected = compiled(batches[0])
        reloaded = sc.load(tmp_path / "out", into=seeded(Cnn, seed=3))
        assert torch.equal(reloaded(batches[0]), expected)
    assert report.verification is not None
    assert report.verification.ran
    found = run_onnx(tmp_path / "out" / "model.onnx", batches[0])[0]
    assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max()


def test_tied_weights_stay_tied_in_the_compiled_module() -> None:
    ids = [torch.randint(0, 50, (4, 6))]
    recipe = sc.Recipe((sc.make_rule("head", sc.Unstructured(), sc.SparseGPT(), 0.5),))
    compiled, _ = sc.compile(seeded(Tied), ids, recipe=recipe)
    assert isinstance(compiled, Tied)
    assert compiled.head.weight is compiled.embed.weight


def test_without_data_only_methods_without_statistics_run_and_the_report_says_so() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    module = transformers.GPT2LMHeadModel(config)
    _, report = sc.compile(module, recipe=MAGNITUDE)
    assert any("generated inputs" in note for note in report.notes)
    assert all(site.loss is None for site in report.sites)
    with pytest.raises(DataError, match=r"sparsegpt.*needs calibration data"):
        sc.compile(module, recipe=TWO_FOUR)


def test_sparse_kernels_replace_layers_only_where_they_won_and_are_reloaded(tmp_path: Path) -> None:
    module, batches = seeded(Mlp, width=32, inner=1024, depth=1), mlp_batches()
    recipe = sc.Recipe((sc.make_rule("*", sc.Unstructured(), sc.Magnitude(), 0.99),))
    compiled, report = sc.compile(module, batches, recipe=recipe, options=Options(output=tmp_path / "o", tokens=(64,)))
    reloaded = sc.load(tmp_path / "o", into=seeded(Mlp, width=32, inner=1024, depth=1))
    for site in report.sites:
        sparse = type(compiled.get_submodule(site.name)).__name__ == "SparseLinear"  # type: ignore[union-attr]
        assert sparse == (site.kernel != "dense")
        assert (type(reloaded.get_submodule(site.name)).__name__ == "SparseLinear") == sparse
    pruned = [site for site in report.sites if site.status == "pruned"]
    assert all(site.timings and site.reason for site in pruned)
    with torch.no_grad():
        assert torch.equal(reloaded(batches[0]), compiled(batches[0]))  # type: ignore[operator, misc]


def test_require_sparse_turns_a_dense_verdict_into_an_error(tmp_path: Path) -> None:
    options = Options(output=tmp_path / "out", require_sparse=True)
    with pytest.raises(KernelError, match=r"--require-sparse.*would run dense"):
        sc.compile(seeded(Cnn), image_batches(), recipe=HALF, options=options)
    assert not (tmp_path / "out").exists()


def test_require_sparse_is_refused_for_an_onnx_file_before_it_is_pruned(tmp_path: Path) -> None:
    mlp = Options(output=tmp_path / "mlp", tokens=(1,))
    sc.compile(seeded(Mlp, depth=1), mlp_batches(1), recipe=MAGNITUDE, options=mlp)
    stages: list[str] = []
    with pytest.raises(KernelError, match=r"--require-sparse: \S+ would run dense: an ONNX file"):
        sc.compile(
            tmp_path / "mlp" / "model.onnx",
            mlp_batches(1),
            recipe=MAGNITUDE,
            options=Options(require_sparse=True),
            progress=lambda stage, *_: stages.append(stage),
        )
    assert set(stages) == {"read"}


def test_a_half_precision_model_is_written_in_half_precision(tmp_path: Path) -> None:
    options = Options(output=tmp_path / "out", dtype="float16", tokens=(4,))
    compiled, report = sc.compile(seeded(Mlp), mlp_batches(), recipe=TWO_FOUR, options=options)
    assert isinstance(compiled, Mlp)
    assert compiled.head.weight.dtype == torch.float16
    assert report.verification is not None
    assert report.verification.ran
    table = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert table["version"] == 2


def test_a_model_without_a_prunable_site_writes_nothing(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())
    with pytest.raises(ModelError, match="no prunable site"):
        sc.compile(module, [torch.randn(2, 4, 8, 8)], recipe=HALF, options=Options(output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        (sc.Recipe((sc.make_rule("nothing.*", sc.NM(2, 4), sc.Magnitude()),)), RecipeError, "matches no site"),
        (sc.Recipe((sc.make_rule("blocks.0.up", sc.Block(7, 7), sc.Magnitude(), 0.5),)), PatternError, "tile"),
        (sc.Recipe(TWO_FOUR.rules, keep_dense=("nothing",)), RecipeError, "keep_dense 'nothing' matches no site"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, recipe: sc.Recipe, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        sc.compile(seeded(Mlp), mlp_batches(), recipe=recipe, options=Options(output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    options = Options(output=tmp_path / "out", onnx=False, tokens=(1,))
    sc.compile(seeded(Mlp), mlp_batches(), recipe=TWO_FOUR, options=options)
    with pytest.raises(ExportError, match="--overwrite"):
        sc.compile(seeded(Mlp), mlp_batches(), recipe=TWO_FOUR, options=options)


def test_the_artefact_of_a_hugging_face_model_is_rebuilt_with_its_class_and_generate(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config)
    batches = [{"input_ids": torch.randint(0, 40, (4, 12))} for _ in range(3)]
    compiled, report = sc.compile(
        module, batches, recipe=TWO_FOUR, options=Options(output=tmp_path / "out", tokens=(1,))
    )
    reloaded = sc.load(tmp_path / "out")
    assert type(reloaded) is type(compiled) is transformers.LlamaForCausalLM
    ids = batches[0]["input_ids"][:1]
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(reloaded.generate(ids, **greedy), compiled.generate(ids, **greedy))  # type: ignore[operator]
    assert any("no key-value cache" in note for note in report.notes)
    again = sc.export(tmp_path / "out", tmp_path / "again.onnx", batch=batches[0])
    assert again.verification.ran
    assert dict(again.forms) == {site.name: site.onnx for site in report.sites if site.status == "pruned"}


def test_a_module_in_training_mode_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    module = seeded(Cnn).train()
    before = fingerprint(module)
    sc.compile(module, image_batches(), recipe=HALF)
    assert module.training
    assert fingerprint(module) == before


def test_a_program_keeps_its_dtype_when_a_copy_in_float16_is_asked() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    program = torch.export.export(module, (x,))
    before = fingerprint(module)
    compiled, _ = sc.compile(program, [x], recipe=MAGNITUDE, options=Options(dtype="float16"))
    assert {tensor.dtype for tensor in program.state_dict.values()} == {torch.float32}
    assert fingerprint(module) == before
    assert compiled is not None
    assert {p.dtype for p in compiled.parameters()} == {torch.float16}


class Constants(nn.Module):
    """Multiplies by a parameter, by a buffer and by a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.randn(32, 32))
        self.plain = torch.randn(32, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.relu(x @ self.kept) @ self.plain))


def test_a_buffer_is_pruned_and_a_constant_outside_the_state_dict_refused(tmp_path: Path) -> None:
    x = torch.randn(6, 32)
    module = seeded(Constants)
    compiled, report = sc.compile(module, [x], recipe=HALF, options=Options(output=tmp_path / "out"))
    status = {site.name: site.status for site in report.sites}
    assert status == {"kept": "pruned", "plain": "refused", "last": "dense"}
    assert compiled is not None
    assert int((compiled.get_buffer("kept") == 0).sum()) == 512
    assert isinstance(module.kept, Tensor)
    assert module.kept.all()


def test_heldout_data_without_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match="no batch was given"):
        sc.compile(seeded(Mlp), mlp_batches(), recipe=MAGNITUDE, heldout=[])


def test_tied_weights_are_one_parameter_again_after_loading(tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (4, 6))
    sc.compile(seeded(Tied), [ids], recipe=HALF, options=Options(output=tmp_path / "out", tokens=(1,)))
    loaded, original = sc.load(tmp_path / "out", into=seeded(Tied)), seeded(Tied)
    assert len(list(loaded.parameters())) == len(list(original.parameters()))


def test_an_existing_file_survives_an_export_that_fails(tmp_path: Path) -> None:
    sc.compile(seeded(Mlp), mlp_batches(), recipe=MAGNITUDE, options=Options(output=tmp_path / "out", onnx=False))
    target = tmp_path / "mine.onnx"
    target.write_text("mine")
    with pytest.raises(DataError):
        sc.export(tmp_path / "out", target, batch={"no such": mlp_batches(1)[0]}, into=seeded(Mlp))
    assert target.read_text() == "mine"
    sc.export(tmp_path / "out", target, batch=mlp_batches(1)[0], into=seeded(Mlp))
    assert run_onnx(target, mlp_batches(1)[0])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine.onnx"}


def test_the_current_folder_is_an_output_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="exists; choose another folder"):
        sc.compile(seeded(Mlp), mlp_batches(), recipe=MAGNITUDE, options=Options(output=Path()))


class WritesItsInput(nn.Module):
    """Scales its input in place before anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.mul_(2))


def test_a_forward_that_writes_into_its_input_leaves_the_users_data_alone(tmp_path: Path) -> None:
    batches = mlp_batches()
    before = [batch.clone() for batch in batches]
    _, report = sc.compile(seeded(WritesItsInput), batches, recipe=HALF, options=Options(output=tmp_path / "out"))
    assert all(map(torch.equal, batches, before))
    assert report.verification is not None
    assert report.verification.ran
