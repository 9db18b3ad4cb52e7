"""Images as model inputs: how pixels become numbers, and folders, tar files and arrays of images read lazily."""

import csv
import dataclasses
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from sparsify_compiler.errors import DataError

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})
LABELS = "labels.csv"


@dataclass(frozen=True)
class Preprocess:
    """Turn an image into float32 (channels, height, width): (pixel / scale - mean) / std.

    `size` is (height, width) in pixels. `fit` "crop" resizes until the size / `crop` window just fits, 0 < crop <= 1,
    and takes the centre; "squash" resizes both sides. `mean` and `std` have one value, or one per channel in the order
    of `channels`. `scale` 255 takes pixels to [0, 1], 1 leaves them. `layout` "nhwc" puts the channels last.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 255.0
    fit: Literal["crop", "squash"] = "crop"
    crop: float = 1.0
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __post_init__(self) -> None:
        count = 1 if self.channels == "gray" else 3
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, count}:
                raise DataError(f"preprocess {name}: {len(values)} values for {count} channels; give 1 or {count}")
        if min(self.size) < 1 or self.scale <= 0 or not 0 < self.crop <= 1 or 0 in self.std:
            raise DataError(f"preprocess {str(self)!r}: needs size >= 1, scale > 0, 0 < crop <= 1 and std other than 0")

    def __str__(self) -> str:
        height, width = self.size
        words = [f"size={height}" if height == width else f"size={height}x{width}"]
        words += [f"{name}={','.join(f'{v:g}' for v in getattr(self, name))}" for name in ("mean", "std")]
        words += [f"channels={self.channels}", f"scale={self.scale:g}", f"fit={self.fit}", f"crop={self.crop:g}"]
        return " ".join([*words, f"resample={self.resample}", f"layout={self.layout}"])

    def apply(self, image: Any) -> Tensor:
        """Turn a PIL image into a float32 tensor, channels first or last as `layout` says."""
        image = self._fitted(image.convert("L" if self.channels == "gray" else "RGB"))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels  # (height, width, channels)
        if self.channels == "bgr":
            pixels = pixels.flip(2)
        pixels = (pixels / self.scale - torch.tensor(self.mean)) / torch.tensor(self.std)
        return (pixels if self.layout == "nhwc" else pixels.permute(2, 0, 1)).contiguous()

    def _fitted(self, image: Any) -> Any:
        from PIL import Image

        height, width = self.size
        resample = Image.Resampling.BICUBIC if self.resample == "bicubic" else Image.Resampling.BILINEAR
        if image.size == (width, height) and (self.fit == "squash" or self.crop == 1):
            return image
        if self.fit == "squash":
            return image.resize((width, height), resample)
        ratio = max(width / self.crop / image.width, height / self.crop / image.height)
        wide, high = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
        image = image.resize((wide, high), resample)
        left, upper = (wide - width) // 2, (high - height) // 2
        return image.crop((left, upper, left + width, upper + height))


def parse_preprocess(text: str) -> Preprocess:
    """Read "mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=224 channels=rgb"; `str(preprocess)` is the inverse.

    Raises:
        DataError: an unknown or doubled key, a value that cannot be read, or no size.
    """
    values: dict[str, Any] = {}
    readers = {field.name: _READERS[field.name] for field in dataclasses.fields(Preprocess)}
    for word in text.split():
        key, separator, value = word.partition("=")
        if not separator or key not in readers or key in values:
            raise DataError(f"preprocess {word!r}: write key=value once each, with a key of {', '.join(readers)}")
        try:
            values[key] = readers[key](value)
        except ValueError:
            raise DataError(f"preprocess {word!r}: {_FORMS[key]}") from None
    if "size" not in values:
        raise DataError(f"preprocess {text!r}: size is missing; write size=224 or size=224x320 (height x width)")
    return Preprocess(**values)


@dataclass(frozen=True)
class ImageSet:
    """Images by index: `read(index)` decodes one as a PIL image. `labels` is int64 (count,), or None."""

    count: int
    read: Callable[[int], Any]
    labels: Tensor | None


def read_images(path: Path) -> ImageSet:
    """List the images of a folder or an uncompressed tar file, with labels.csv (file,label) where it has one.

    Only what is listed is read, when it is asked for, and nothing of a tar file is written to disk.

    Raises:
        DataError: not a tar file, no image, a labels.csv that cannot be read, or one that names an absent file.
    """
    require_pillow()
    where = f"images {str(path)!r}"
    if path.is_dir():
        found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
        read_bytes: Callable[[str], bytes] = lambda name: found[name].read_bytes()  # noqa: E731
        names = list(found)
    else:
        places = _tar_places(path, where)
        read_bytes = lambda name: _read_at(path, *places[name])  # noqa: E731
        names = sorted(places)
    labels = None
    if LABELS in names:
        files, labels = _read_labels(read_bytes(LABELS), set(names), where)
    else:
        files = [name for name in names if PurePosixPath(name).suffix.lower() in ENDINGS]
    if not files:
        raise DataError(f"{where}: no image; give files that end in {', '.join(sorted(ENDINGS))}, or a labels.csv")
    return ImageSet(len(files), lambda index: _decode(read_bytes(files[index]), f"{where}: {files[index]!r}"), labels)


def array_images(images: np.ndarray[Any, np.dtype[Any]], labels: Tensor | None, what: str) -> ImageSet:
    """Take uint8 (samples, height, width[, 1 or 3]) as images.

    Raises:
        DataError: another dtype or shape.
    """
    require_pillow()
    if images.dtype != np.uint8 or images.ndim not in {3, 4} or (images.ndim == 4 and images.shape[3] not in {1, 3}):
        raise DataError(
            f"{what}: --preprocess reads images as uint8 (samples, height, width, 3); found {images.dtype} "
            f"{images.shape}; leave --preprocess out for inputs that are ready"
        )
    from PIL import Image

    flat = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    return ImageSet(len(flat), lambda index: Image.fromarray(flat[index]), labels)


def require_pillow() -> None:
    """Say which extra brings the image reader where it is absent."""
    import importlib.util

    if importlib.util.find_spec("PIL") is None:
        raise DataError("images need pillow to be decoded; run pip install 'sparsify-compiler[images]'")


def stack(images: ImageSet, preprocess: Preprocess, indices: Sequence[int]) -> Tensor:
    """Decode and preprocess some images into one float32 batch."""
    return torch.stack([preprocess.apply(images.read(index)) for index in indices])


def _tar_places(path: Path, where: str) -> dict[str, tuple[int, int]]:
    """Map each regular file of the tar to its (offset, size) in bytes."""
    try:
        with tarfile.open(path, "r:") as tar:
            places = {str(PurePosixPath(m.name)): (m.offset_data, m.size) for m in tar if m.isfile()}
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{where}: not a whole, uncompressed tar file ({error}); unpack .gz or .xz first") from None
    if places and path.stat().st_size < max(offset + size for offset, size in places.values()):
        raise DataError(f"{where}: the tar file is cut short; copy it again")
    return places


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _read_labels(content: bytes, names: set[str], where: str) -> tuple[list[str], Tensor]:
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
        pairs = [(str(PurePosixPath(row["file"])), int(row["label"])) for row in rows]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"{where}: {LABELS} cannot be read ({error!r}); its first line is file,label and each other line a file "
            "name and a class number that counts from 0"
        ) from None
    if absent := [name for name, _ in pairs if name not in names]:
        raise DataError(f"{where}: {LABELS} lists {len(absent)} files that are not there, such as {absent[0]!r}")
    return [name for name, _ in pairs], torch.tensor([label for _, label in pairs], dtype=torch.int64)


def _decode(content: bytes, what: str) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{what}: not an image that can be decoded ({error}); copy it again or take it out") from None
    return image


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return cast(Callable[[str], str], read)


_READERS: dict[str, Callable[[str], Any]] = {
    "size": _size,
    "mean": _numbers,
    "std": _numbers,
    "channels": _one_of("rgb", "bgr", "gray"),
    "scale": float,
    "fit": _one_of("crop", "squash"),
    "crop": float,
    "resample": _one_of("bilinear", "bicubic"),
    "layout": _one_of("nchw", "nhwc"),
}
_FORMS = {
    "size": "write size=224 or size=224x320 (height x width)",
    "mean": "write numbers, as in mean=0.485,0.456,0.406",
    "std": "write numbers, as in std=0.229,0.224,0.225",
    "channels": "write channels=rgb, bgr or gray",
    "scale": "write a number, as in scale=255",
    "fit": "write fit=crop or fit=squash",
    "crop": "write a share, as in crop=0.875",
    "resample": "write resample=bilinear or bicubic",
    "layout": "write layout=nchw or nhwc",
}
