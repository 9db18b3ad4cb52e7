"""Files of sentences and of scored pairs, as batches of an encoder."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, InputSpec
from sparsify_compiler.errors import DataError
from sparsify_compiler.sources.data import load_data
from sparsify_compiler.sources.huggingface import TokenizerFiles
from sparsify_compiler.sources.models import Source, module_source
from sparsify_compiler.sources.sentences import read_pairs


class Encoder(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids


class Generator(Encoder):
    def can_generate(self) -> bool:
        return True


def named(batch: Batch) -> dict[str, Tensor]:
    assert isinstance(batch, dict)
    return batch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    """Words "w0" to "w6" are the ids 0 to 6; [CLS] = 8 and [SEP] = 7 stand around every sentence; [PAD] = 9."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{i}": i for i in range(7)} | {"[SEP]": 7, "[CLS]": 8, "[PAD]": 9}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", 7), ("[CLS]", 8))
    made.save(str(folder / "tokenizer.json"))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return TokenizerFiles(folder)


def model(tokenizer: TokenizerFiles | None, module: nn.Module | None = None, positions: int | None = None) -> Source:
    module = module or Encoder()
    inputs = module_source(module).inputs
    return Source("m", "hf", module, inputs=inputs, tokenizer=tokenizer, vocabulary=10, max_positions=positions)


def file(tmp_path: Path, name: str, *lines: str) -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shown(batches: object) -> list[list[int]]:
    """Return the token ids of every row that the mask shows, checking that the rest is padding."""
    rows = []
    for batch in batches:  # type: ignore[attr-defined]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert (ids[mask == 0] == 9).all()
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            rows.append(ids[mask == 1].tolist())
    return rows


PAIRS = ("4.5\tw1 w2\tw3", "0\tw4\tw5 w6 w1", "2\tw2\tw1")


def test_both_sentences_of_a_pair_are_found_among_the_rows(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    data = load_data(str(file(tmp_path, "pairs.tsv", *PAIRS)), model(tokenizer), batch_size=4)
    assert (data.kind, data.samples, data.description) == ("sentences", 6, "pairs.tsv: all 3 pairs of sentences")
    assert [len(named(batch)["input_ids"]) for batch in data.batches] == [4, 2]
    rows = shown(data.batches)
    assert data.pairs is not None
    assert data.pairs.scores.tolist() == [4.5, 0, 2]
    both = [[rows[row] for row in pair] for pair in data.pairs.rows.tolist()]
    assert both == [[[8, 1, 2, 7], [8, 3, 7]], [[8, 4, 7], [8, 5, 6, 1, 7]], [[8, 2, 7], [8, 1, 7]]]


def test_pairs_are_drawn_with_their_scores(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    lines = [f"{k}\tw{k % 7}\tw{k % 7} w{k % 7}" for k in range(20)]
    data = load_data(str(file(tmp_path, "pairs.tsv", *lines)), model(tokenizer), windows=6, seed=1)
    rows = shown(data.batches)
    assert data.pairs is not None
    assert len(set(data.pairs.scores.tolist())) == 6
    for score, (first, second) in zip(data.pairs.scores.tolist(), data.pairs.rows.tolist(), strict=True):
        word = int(score) % 7
        assert (rows[first], rows[second]) == ([8, word, 7], [8, word, word, 7])


def test_sentences_of_like_length_share_a_batch(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    path = file(tmp_path, "lines.txt", *(" ".join(["w1"] * (1 + k * 7 % 30)) for k in range(3000)))
    data = load_data(str(path), model(tokenizer))
    assert (data.kind, data.samples) == ("sentences", 3000)
    sizes = [named(batch)["input_ids"].shape for batch in data.batches]
    assert [length for _, length in sizes] == sorted((length for _, length in sizes), reverse=True)
    assert max(rows * length for rows, length in sizes) <= 2048
    assert sum(rows * length for rows, length in sizes) < 1.2 * sum(map(len, shown(data.batches)))


def test_an_encoder_reads_lines_unless_windows_are_asked_for(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    path = str(file(tmp_path, "lines.txt", "w1 w2", "", "  w3  "))
    assert shown(load_data(path, model(tokenizer)).batches) == [[8, 1, 2, 7], [8, 3, 7]]
    windows = load_data(path, model(tokenizer), sequence_length=5)
    assert (windows.kind, named(windows.batches[0])["input_ids"].tolist()) == ("text", [[8, 1, 2, 3, 7]])
    documents = str(file(tmp_path, "documents.jsonl", '{"text": "w5"}', '{"text": "w6 w6"}'))
    assert shown(load_data(documents, model(tokenizer)).batches) == [[8, 6, 6, 7], [8, 5, 7]]


def test_long_sentences_are_cut_and_that_is_said(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    path = str(file(tmp_path, "lines.txt", "w1 w2 w3 w4", "w5"))
    data = load_data(path, model(tokenizer, positions=4))
    assert shown(data.batches) == [[8, 1, 2, 7], [8, 5, 7]]
    assert data.description == "lines.txt: all 2 sentences, 1 cut to 4 tokens"


def onnx_encoder(tokenizer: TokenizerFiles, rows: int, length: int | None) -> Source:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    inputs = tuple(InputSpec(name, torch.int32, (rows, length)) for name in names)
    return Source("m.onnx", "onnx", inputs=inputs, tokenizer=tokenizer, vocabulary=10)


def test_fixed_sizes_of_an_onnx_file_are_filled(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    path = str(file(tmp_path, "pairs.csv", *(line.replace("\t", ",") for line in PAIRS)))
    data = load_data(path, onnx_encoder(tokenizer, 2, 4))
    assert [named(batch)["input_ids"].shape for batch in data.batches] == [(2, 4)] * 3
    assert shown(data.batches)[:2] == [[8, 1, 2, 7], [8, 5, 6, 7]]
    assert data.description.endswith("1 cut to 4 tokens")
    batch = named(data.batches[2])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int32}
    assert not batch["token_type_ids"].any()
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    filled = load_data(path, onnx_encoder(tokenizer, 4, None))
    assert filled.description.endswith("2 copies of the last to fill a batch")
    rows = shown(filled.batches)
    assert len(rows) == 8
    assert rows[5] == rows[6] == rows[7]


STS = "main\tMSRvid\t2012\t0024\t2.5\tA \"girl.\tA girl\t'"


@pytest.mark.parametrize(
    ("name", "lines", "scores", "sentences"),
    [
        ("a.tsv", (STS, STS.replace("2.5", "3") + "\tsource"), [2.5, 3], ('A "girl.', "A girl") * 2),
        ("a.tsv", ("a\tb\t1", "c\td\t2e-1"), [1, 0.2], ("a", "b", "c", "d")),
        ("a.csv", ("1,a,b", "", '2,"c, d",e'), [1, 2], ("a", "b", "c, d", "e")),
        ("a.csv", ("split,Sentence1,sentence2,score", "x,a,b,1"), [1], ("a", "b")),
        ("a.tsv", ("\ufeffsimilarity_score\tsentence2\tsentence1", "0\tb\ta\r"), [0], ("a", "b")),
    ],
)
def test_columns_are_found(
    tmp_path: Path, name: str, lines: tuple[str, ...], scores: list[float], sentences: tuple[str, ...]
) -> None:
    found = read_pairs(file(tmp_path, name, *lines))
    assert list(found.scores) == scores
    assert found.sentences == sentences


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.tsv", ("1\ta\tb", "good\ta\tb"), "line 2: the score 'good' is no number"),
        ("a.tsv", ("1\ta\tb", "nan\ta\tb"), "line 2: the score 'nan' is no number"),
        ("a.tsv", ("one sentence",), "1 column, a score and two sentences are needed; .* a .txt, one a line"),
        ("a.csv", ("a,b",), "2 columns, a score and two"),
        ("a.tsv", ("1\ta\tb", "", "2\ta"), "line 3: 2 columns, line 1 has 3"),
        ("a.tsv", ("1\ta\t ",), "line 1: a sentence is empty"),
        ("a.tsv", ("",), "holds no line"),
        ("a.tsv", ("score\tsentence1\tsentence2",), "a header and no line"),
        ("a.csv", ('1,"a,b',), "cannot be read"),
    ],
)
def test_files_that_are_no_scored_pairs_say_why(
    tmp_path: Path, name: str, lines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(file(tmp_path, name, *lines))


def test_models_that_cannot_take_sentences_say_why(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    path = str(file(tmp_path, "pairs.tsv", *PAIRS))
    with pytest.raises(DataError, match="the model generates text"):
        load_data(path, model(tokenizer, Generator()))
    with pytest.raises(DataError, match="takes no attention_mask"):
        load_data(path, Source("m", "onnx", inputs=(InputSpec("input_ids"),), tokenizer=tokenizer))
    with pytest.raises(DataError, match="without tokenizer files"):
        load_data(path, model(None))
