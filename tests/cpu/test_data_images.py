import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, InputSpec
from sparsify_compiler.errors import DataError
from sparsify_compiler.sources.data import load_data
from sparsify_compiler.sources.images import Preprocess, parse_preprocess
from sparsify_compiler.sources.models import Source, module_source

Image = pytest.importorskip("PIL.Image", reason="needs the extra images")


class Net(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


SOURCE = module_source(Net())
RAW = Preprocess(size=(4, 4), scale=1)


def picture(seed: int, high: int = 4, wide: int = 4) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8)


def png(seed: int, high: int = 4, wide: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, high, wide)).save(file, "png")
    return file.getvalue()


def files(count: int) -> dict[str, bytes]:
    """`count` pictures whose label is their seed, listed in labels.csv from the last to the first."""
    rows = "".join(f"sub/{seed}.png,{seed}\n" for seed in reversed(range(count)))
    return {f"sub/{seed}.png": png(seed) for seed in range(count)} | {"labels.csv": f"file,label\n{rows}".encode()}


def write_folder(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, content: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in content.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def only(batch: Batch) -> Tensor:
    assert isinstance(batch, dict)
    (tensor,) = batch.values()
    return tensor


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_come_in_the_order_of_the_labels_with_their_pixels(tmp_path: Path, kind: str) -> None:
    path = write_folder(tmp_path / "d", files(5)) if kind == "folder" else write_tar(tmp_path / "d.tar", files(5))
    before = sorted(tmp_path.rglob("*"))
    data = load_data(str(path), SOURCE, preprocess=RAW, batch_size=2)
    assert data.labels is not None
    assert [label.tolist() for label in data.labels] == [[4, 3], [2, 1], [0]]
    expected = torch.from_numpy(picture(1)).permute(2, 0, 1).float()
    assert torch.equal(only(data.batches[1])[1], expected)
    assert torch.equal(only(data.batches[1]), only(data.batches[1]))
    assert (data.kind, data.samples) == ("images", 5)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


def test_a_folder_without_labels_gives_images_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"b.png": png(1), "a.png": png(0), "notes.md": b"x"})
    data = load_data(str(tmp_path), SOURCE, preprocess=RAW)
    assert (data.samples, data.labels) == (2, None)
    assert torch.equal(only(data.batches[0])[0], torch.from_numpy(picture(0)).permute(2, 0, 1).float())


def test_drawn_images_keep_their_labels(tmp_path: Path) -> None:
    data = load_data(str(write_folder(tmp_path, files(9))), SOURCE, preprocess=RAW, windows=4, seed=2, batch_size=3)
    assert data.labels is not None
    for batch, labels in zip(data.batches, data.labels, strict=True):
        for image, label in zip(only(batch), labels, strict=True):
            assert torch.equal(image, torch.from_numpy(picture(int(label))).permute(2, 0, 1).float())


def test_preprocessing_has_a_closed_form() -> None:
    pixels = torch.from_numpy(picture(7)).double()
    mean, std = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 0.6, 0.7]).double()
    rgb = parse_preprocess("mean=0.1,0.2,0.3 std=0.5,0.6,0.7 size=4").apply(Image.fromarray(picture(7)))
    expected = ((pixels / 255 - mean) / std).permute(2, 0, 1)
    assert torch.allclose(rgb.double(), expected, atol=1e-6)  # float32 on values of order 1
    bgr = parse_preprocess("mean=104,117,123 size=4 channels=bgr scale=1 layout=nhwc").apply(
        Image.fromarray(picture(7))
    )
    assert torch.equal(bgr.double(), pixels.flip(2) - torch.tensor([104.0, 117.0, 123.0]))  # integers are exact
    gray = Preprocess(size=(4, 4), channels="gray").apply(Image.fromarray(picture(7)))
    assert gray.shape == (1, 4, 4)


def test_a_constant_image_stays_constant_through_resizing_and_the_centre_is_cropped() -> None:
    plain = Image.new("RGB", (90, 60), (10, 20, 30))
    for text in ("size=32", "size=32 fit=squash", "size=32x48 crop=0.875 resample=bicubic", "size=90 crop=0.5"):
        found = parse_preprocess(text + " scale=1").apply(plain)
        assert found.unique(dim=None).tolist() == [10, 20, 30]
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    assert Preprocess(size=(4, 4), scale=1).apply(Image.fromarray(wide)).unique().tolist() == [200]


@pytest.mark.parametrize(
    "text",
    [
        "mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=224 channels=rgb",
        "size=224x320 channels=bgr scale=1 mean=104,117,123 layout=nhwc fit=squash",
        "channels=gray size=28 resample=bicubic crop=0.875",
    ],
)
def test_preprocess_text_round_trips(text: str) -> None:
    preprocess = parse_preprocess(text)
    assert parse_preprocess(str(preprocess)) == preprocess


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean=0.5", "size is missing"),
        ("size=224 men=1", "write key=value once each, with a key of size, mean"),
        ("size=224 size=3", "once each"),
        ("size=big", "write size=224"),
        ("size=224 channels=brg", "rgb, bgr or gray"),
        ("size=224 mean=1,2", "2 values for 3 channels"),
        ("size=224 std=0", "std other than 0"),
        ("size=0", "size >= 1"),
    ],
)
def test_a_preprocess_text_that_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_preprocess(text)


def test_an_array_of_images_is_preprocessed_too(tmp_path: Path) -> None:
    images = np.stack([picture(seed) for seed in range(3)])
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(3, dtype=np.uint8))
    data = load_data(str(tmp_path / "d.npz"), SOURCE, preprocess=RAW)
    assert torch.equal(only(data.batches[0]), torch.from_numpy(images).permute(0, 3, 1, 2).float())
    assert data.labels is not None
    assert data.labels[0].dtype == torch.int64
    np.savez(tmp_path / "f.npz", images=images.astype(np.float32))
    with pytest.raises(DataError, match="reads images as uint8"):
        load_data(str(tmp_path / "f.npz"), SOURCE, preprocess=RAW)


def test_images_are_checked_against_what_an_onnx_file_declares(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path, files(5)))
    source = Source("m.onnx", "onnx", inputs=(InputSpec("image", torch.float32, (2, 3, 4, 4)),))
    data = load_data(folder, source, preprocess=RAW)
    assert [len(only(batch)) for batch in data.batches] == [2, 2]
    with pytest.raises(DataError, match=r"shape \(1, 3, 8, 8\), the model takes \(2, 3, 4, 4\)"):
        load_data(folder, source, preprocess=Preprocess(size=(8, 8)))


def test_images_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    good = files(2)
    with pytest.raises(DataError, match="say how pixels become inputs"):
        load_data(str(write_folder(tmp_path / "a", good)), SOURCE)
    absent = write_folder(tmp_path / "b", good | {"labels.csv": b"file,label\nx.png,0\n"})
    with pytest.raises(DataError, match=r"1 files that are not there, such as 'x\.png'"):
        load_data(str(absent), SOURCE, preprocess=RAW)
    wrong = write_folder(tmp_path / "c", good | {"labels.csv": b"name,class\nx.png,0\n"})
    with pytest.raises(DataError, match="its first line is file,label"):
        load_data(str(wrong), SOURCE, preprocess=RAW)
    broken = load_data(
        str(write_folder(tmp_path / "d", {"a.png": png(0), "b.png": png(1)[:40]})), SOURCE, preprocess=RAW, batch_size=1
    )
    with pytest.raises(DataError, match=r"'b\.png': not an image that can be decoded"):
        _ = broken.batches[1]
    with pytest.raises(DataError, match="no image"):
        load_data(str(write_folder(tmp_path / "e", {"notes.md": b"x"})), SOURCE, preprocess=RAW)


def test_a_damaged_or_compressed_tar_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "d.tar", {"a.png": bytes(4000), "b.png": bytes(4000)})
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(DataError, match=r"cut short|not a whole"):
        load_data(str(path), SOURCE, preprocess=RAW)
    with pytest.raises(DataError, match=r"unpack \.gz"):
        load_data(str(write_tar(tmp_path / "z.tar", files(1), "w:gz")), SOURCE, preprocess=RAW)


def test_a_path_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    write_folder(tmp_path, {"secret.png": png(0)})
    inside = write_folder(tmp_path / "d", {"a.png": png(1), "labels.csv": b"file,label\n../secret.png,0\n"})
    with pytest.raises(DataError, match="not there"):
        load_data(str(inside), SOURCE, preprocess=RAW)
