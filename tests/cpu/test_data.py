import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, InputSpec
from sparsify_compiler.errors import DataError, TrustError
from sparsify_compiler.sources.data import demo_text, generate_data, load_data
from sparsify_compiler.sources.huggingface import TokenizerFiles
from sparsify_compiler.sources.models import Source, module_source


class Net(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x


class Words(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids


def language_model(tokenizer: TokenizerFiles | None = None, positions: int | None = None) -> Source:
    return Source("m", "hf", Words(), inputs=module_source(Words()).inputs, tokenizer=tokenizer, vocabulary=9,
                  max_positions=positions)  # fmt: skip


def onnx_source(*inputs: InputSpec) -> Source:
    return Source("m.onnx", "onnx", inputs=inputs)


def named(batch: Batch) -> dict[str, Tensor]:
    assert isinstance(batch, dict)
    return batch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    """A tokenizer whose words "w0" to "w6" are the ids 0 to 6, with </s> = 7 and [CLS], [SEP] = 8, 7 on demand."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{i}": i for i in range(7)} | {"</s>": 7, "[CLS]": 8}
    words_only = Tokenizer(models.WordLevel(words, unk_token="w0"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_only.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return TokenizerFiles(folder)


def text_file(tmp_path: Path, count: int) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % 7}" for i in range(count)))
    return str(path)


def npz(tmp_path: Path, **arrays: object) -> str:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


# Text


def test_text_is_cut_into_consecutive_windows(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    data = load_data(
        text_file(tmp_path, 33), language_model(tokenizer), sequence_length=5, choose="first", batch_size=4
    )
    ids = torch.cat([named(batch)["input_ids"] for batch in data.batches])
    assert torch.equal(ids, torch.arange(30).reshape(6, 5) % 7)
    assert [len(named(batch)["input_ids"]) for batch in data.batches] == [4, 2]
    assert (data.kind, data.samples) == ("text", 6)


def test_calibration_windows_are_drawn_by_the_seed_without_repeats(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    def draw(seed: int) -> list[Tensor]:
        data = load_data(reference, source, windows=8, sequence_length=5, seed=seed, batch_size=8)
        return [named(batch)["input_ids"] for batch in data.batches]

    reference, source = text_file(tmp_path, 35 * 5), language_model(tokenizer)
    assert torch.equal(draw(1)[0], draw(1)[0])
    assert not torch.equal(draw(1)[0], draw(2)[0])
    windows = torch.arange(35 * 5).reshape(35, 5) % 7
    assert all(any(torch.equal(row, window) for window in windows) for row in draw(1)[0])


def test_documents_of_a_jsonl_file_end_with_the_end_token(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "w1 w2"}\n\n{"text": "w3", "other": 1}\n{"text": "w4"}\n')
    data = load_data(str(path), language_model(tokenizer), sequence_length=7, choose="first")
    assert named(data.batches[0])["input_ids"].tolist() == [[1, 2, 7, 3, 7, 4, 7]]


def test_a_length_that_the_model_lacks_is_an_error_and_the_default_is_clipped(
    tmp_path: Path, tokenizer: TokenizerFiles
) -> None:
    source = language_model(tokenizer, positions=6)
    assert named(load_data(text_file(tmp_path, 20), source).batches[0])["input_ids"].shape == (3, 6)
    with pytest.raises(DataError, match="sequence length 7 was asked, the model takes 2 to 6"):
        load_data(text_file(tmp_path, 20), source, sequence_length=7)


def test_text_that_cannot_be_used_says_why(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    source = language_model(tokenizer)
    with pytest.raises(DataError, match=r"one window of 50 tokens was asked, the text has 20"):
        load_data(text_file(tmp_path, 20), source, sequence_length=50)
    with pytest.raises(DataError, match=r"without tokenizer files; .* \.npz with input_ids"):
        load_data(text_file(tmp_path, 20), language_model())
    with pytest.raises(DataError, match="model's vocabulary is 0 to 3"):
        load_data(
            text_file(tmp_path, 20), Source("m", "hf", Words(), tokenizer=tokenizer, vocabulary=4), sequence_length=5
        )
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w1"}\n{"body": "w1"}\n')
    with pytest.raises(DataError, match=r"line 2: every line must be a JSON table"):
        load_data(str(bad), source)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        load_data(str(tmp_path / "latin.txt"), source)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        load_data(str(tmp_path / "empty.txt"), source)


def test_an_encoder_gets_its_first_and_last_token_around_every_window(
    tmp_path: Path, tokenizer: TokenizerFiles
) -> None:
    settings = json.loads((tokenizer.folder / "tokenizer_config.json").read_text())
    for name in ("tokenizer.json",):
        (tmp_path / name).write_bytes((tokenizer.folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "cls_token": "[CLS]", "sep_token": "</s>"}))
    data = load_data(text_file(tmp_path, 9), language_model(TokenizerFiles(tmp_path)), sequence_length=5)
    assert named(data.batches[0])["input_ids"].tolist() == [[8, 0, 1, 2, 7], [8, 3, 4, 5, 7], [8, 6, 0, 1, 7]]


# Arrays


def test_arrays_are_batched_by_name_and_cast_to_what_a_module_is_fed(tmp_path: Path) -> None:
    x, y = np.arange(10.0).reshape(5, 2), np.arange(5, dtype=np.int16)
    data = load_data(npz(tmp_path, y=y, x=x, labels=np.arange(5)), module_source(Net()), batch_size=2)
    assert [len(named(batch)["x"]) for batch in data.batches] == [2, 2, 1]
    first = named(data.batches[0])
    assert list(first) == ["x", "y"]
    assert (first["x"].dtype, first["y"].dtype) == (torch.float32, torch.int64)
    assert data.labels is not None
    assert [label.tolist() for label in data.labels] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([named(batch)["x"] for batch in data.batches]), torch.tensor(x).float())


def test_drawn_samples_keep_their_labels(tmp_path: Path) -> None:
    x = np.arange(20.0)[:, None]
    data = load_data(npz(tmp_path, x=x, labels=np.arange(20)), module_source(Net()), windows=6, batch_size=4, seed=3)
    assert data.labels is not None
    rows = [(float(v), int(w)) for b, lab in zip(data.batches, data.labels, strict=True) for v, w in zip(named(b)["x"], lab, strict=True)]  # fmt: skip  # noqa: E501
    assert len(rows) == 6
    assert all(value == label for value, label in rows)


def test_safetensors_and_one_selected_array_are_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3, 2)}, tmp_path / "data.safetensors")
    assert load_data(str(tmp_path / "data.safetensors"), module_source(Net())).samples == 3
    reference = npz(tmp_path, train=np.zeros((4, 6), np.int32), test=np.ones((2, 6), np.int32))
    data = load_data(f"{reference}:test", language_model())
    assert named(data.batches[0])["input_ids"].tolist() == [[1] * 6] * 2
    with pytest.raises(DataError, match="no array 'absent'; it holds train, test"):
        load_data(f"{reference}:absent", language_model())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.zeros((2, 2))}, "no input is called 'inputs'; the model takes input_ids"),
        ({"attention_mask": np.ones((2, 2), np.int64)}, "the input 'input_ids' is missing"),
        ({"input_ids": np.zeros((2, 2))}, "'input_ids' is float64, the model takes integer token ids"),
        ({"input_ids": np.full((2, 2), 9)}, "token id 9, the model's vocabulary is 0 to 8"),
        ({"input_ids": np.full((2, 2), -1)}, "token id -1"),
        ({"input_ids": np.zeros((2, 99), np.int64)}, "windows of 99 tokens, the model has 64"),
        ({"input_ids": np.zeros((0, 4), np.int64)}, "has 0 samples"),
        ({"input_ids": np.array([["a"]])}, "not of numbers"),
        ({"input_ids": np.array([[None]], dtype=object)}, "plain arrays"),
        ({"input_ids": np.zeros((2, 2), np.int64), "attention_mask": np.zeros((3, 2), np.int64)}, "different numbers"),
        ({"input_ids": np.zeros((2, 2), np.int64), "labels": np.zeros(3, np.int64)}, "3 labels for 2 samples"),
        ({"input_ids": np.zeros((2, 2), np.int64), "labels": np.zeros((2, 2))}, "labels must be integers"),
        ({"labels": np.zeros(2, np.int64)}, "labels alone"),
    ],
)
def test_arrays_that_do_not_fit_a_module_are_named(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(npz(tmp_path, **arrays), language_model(positions=64))


def test_not_a_number_is_counted_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="array 'x' has 2 NaN or infinite of 4 values"):
        load_data(npz(tmp_path, x=np.array([[1.0, np.nan], [np.inf, 0.0]])), module_source(Net()))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3, 9, 8), np.float32), r"shape \(4, 3, 9, 8\), the model takes \(n, 3, 8, 8\)"),
        (np.zeros((4, 8, 8), np.float32), r"shape \(4, 8, 8\)"),
        (np.zeros((4, 3, 8, 8), np.uint8), "is uint8, the model takes float32"),
    ],
)
def test_arrays_that_do_not_fit_a_declared_input_are_named(
    tmp_path: Path, array: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]", message: str
) -> None:
    source = onnx_source(InputSpec("image", torch.float32, ("n", 3, 8, 8)))
    with pytest.raises(DataError, match=message):
        load_data(npz(tmp_path, image=array), source)


def test_a_fixed_first_axis_decides_the_batch_and_scalars_repeat(tmp_path: Path) -> None:
    source = onnx_source(
        InputSpec("x", torch.float32, ("n", 4)),
        InputSpec("state", torch.float32, (2, "n", 3)),
        InputSpec("rate", torch.int64, ()),
    )
    arrays = {"x": np.zeros((3, 4)), "state": np.zeros((6, 1, 3)), "rate": np.array(16000)}
    data = load_data(npz(tmp_path, **arrays), source, batch_size=1)
    assert len(data.batches) == 3
    shapes = {name: tuple(tensor.shape) for name, tensor in named(data.batches[2]).items()}
    assert shapes == {"x": (1, 4), "state": (2, 1, 3), "rate": ()}


def test_a_program_is_fed_by_position_in_its_own_order(tmp_path: Path) -> None:
    inputs = (InputSpec("b", torch.float32, ("n", 1)), InputSpec("a", torch.float32, ("n", 2)))
    data = load_data(npz(tmp_path, a=np.zeros((2, 2)), b=np.zeros((2, 1))), Source("m", "pt2", inputs=inputs))
    assert isinstance(data.batches[0], tuple)
    assert [tensor.shape[1] for tensor in data.batches[0]] == [1, 2]


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data{ending}"
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(DataError, match=f"not a whole {ending} file"):
        load_data(str(path), module_source(Net()))


def test_a_reference_that_is_nothing_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_data(str(tmp_path / "absent.npz"), module_source(Net()))
    (tmp_path / "data.parquet").write_text("1")
    with pytest.raises(DataError, match="cannot tell what it is"):
        load_data(str(tmp_path / "data.parquet"), module_source(Net()))
    with pytest.raises(DataError, match="windows 0 was asked"):
        load_data(str(tmp_path), module_source(Net()), windows=0)


# Factories and generated inputs


def test_a_data_factory_needs_trust_and_may_give_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_batches.py").write_text(
        "import torch\n"
        "def plain():\n    yield torch.zeros(2, 3)\n    yield torch.ones(1, 3)\n"
        "def labelled():\n    return [({'x': torch.zeros(2, 3)}, torch.tensor([1, 0]))]\n"
        "def wrong():\n    return [1]\n"
        "def nothing():\n    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    source = module_source(Net())
    with pytest.raises(TrustError, match="--trust"):
        load_data("my_batches:plain", source)
    plain = load_data("my_batches:plain", source, trust=True)
    assert [len(batch) for batch in plain.batches] == [2, 1]
    assert len(list(plain.batches)) == len(list(plain.batches)) == 2
    assert (plain.samples, plain.labels) == (3, None)
    labelled = load_data("my_batches:labelled", source, trust=True)
    assert labelled.labels is not None
    assert labelled.labels[0].tolist() == [1, 0]
    for name, message in (("wrong", "batch 0 is int"), ("nothing", "no batch")):
        with pytest.raises(DataError, match=message):
            load_data(f"my_batches:{name}", source, trust=True)


def test_generated_inputs_fit_what_an_onnx_file_declares() -> None:
    source = onnx_source(
        InputSpec("ids", torch.int64, ("batch", "seq"), below=5),
        InputSpec("attention_mask", torch.int64, ("batch", "seq")),
        InputSpec("image", torch.float16, (None, 3, None, 40)),
        InputSpec("state", torch.float32, (2, "batch", 7)),
    )
    data = generate_data(source, seed=1)
    batch = named(data.batches[0])
    assert batch["ids"].shape == batch["attention_mask"].shape
    assert 0 <= int(batch["ids"].min()) <= int(batch["ids"].max()) < 5
    assert batch["attention_mask"].unique().tolist() == [1]
    assert (batch["image"].dtype, batch["image"].shape[1], batch["image"].shape[3]) == (torch.float16, 3, 40)
    assert batch["state"].shape == (2, len(batch["ids"]), 7)
    assert data.kind == "generated"
    assert "generated inputs" in data.description
    assert torch.equal(batch["image"], named(generate_data(source, seed=1).batches[0])["image"])
    assert not torch.equal(batch["image"], named(data.batches[1])["image"])


def test_lengths_of_free_axes_are_tried_until_the_model_takes_one() -> None:
    source = onnx_source(InputSpec("image", torch.float32, ("n", 3, "h", "w")))

    def refuses(batch: Batch) -> str | None:
        return None if named(batch)["image"].shape[2] == 48 else "height must be 48"

    assert named(generate_data(source, refuses=refuses).batches[0])["image"].shape[2] == 48
    with pytest.raises(DataError, match="refused them"):
        generate_data(source, refuses=lambda batch: "no")


def test_the_state_of_a_recurrent_network_has_as_many_samples_as_its_input() -> None:
    source = onnx_source(InputSpec("x", torch.float32, (None, None)), InputSpec("h", torch.float32, (2, None, 8)))
    batch = named(generate_data(source).batches[0])
    assert batch["h"].shape == (2, len(batch["x"]), 8)


def test_inputs_of_a_hugging_face_model_come_from_its_config() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                    image_size=32, patch_size=16)  # fmt: skip
    pixels = named(generate_data(module_source(transformers.ViTModel(config))).batches[0])["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)


def test_nothing_is_generated_for_a_module_that_does_not_say_what_it_takes() -> None:
    with pytest.raises(DataError, match="let its factory return"):
        generate_data(module_source(Net()))


def test_batches_of_the_model_factory_are_taken_as_they_are() -> None:
    x = torch.zeros(2, 3)
    assert generate_data(module_source(Net(), batches=[x])).batches[0] is x


# The text that is shipped


@pytest.mark.parametrize(("part", "words"), [("calibration", 16 * 1024), ("heldout", 16 * 1024)])
def test_the_shipped_text_fills_sixteen_windows_of_1024_tokens(part: str, words: int) -> None:
    path = demo_text(part)  # type: ignore[arg-type]
    assert len(path.read_text(encoding="utf-8").split()) > words  # a word is at least one token
    assert "CC BY-SA 3.0" in (path.parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
