"""Images and labels, in memory, in three sets that share no image.

=====================================  =============================================================
``digits``                             1,797 handwritten digits of 8 x 8 pixels (scikit-learn)
``fashion-mnist``                      70,000 articles of clothing, 28 x 28, grey
``cifar10``                            60,000 photographs, 32 x 32, RGB
``image-folder:PATH``                  the user's own: ``PATH/class/image``, or
                                       ``PATH/train/class/image`` beside ``validation`` (or
                                       ``val``) and ``test``
``image-folder:gs://BUCKET/PREFIX``    the same in a bucket, downloaded once
=====================================  =============================================================

A split that the source does not bring is drawn with `SPLIT_SEED`, never with the seed of a run:
every stage must see the same sets, or a network would be tested on images that it was trained on.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from filterpress._images import Progress, download_folder, image_files, read_images
from filterpress.errors import DataError

Split = Literal["train", "validation", "test"]

SPLIT_SEED = 0
SOURCES = ("digits", "fashion-mnist", "cifar10", "image-folder:PATH", "image-folder:gs://…")
IMAGE_FOLDER_SIZE = 64

_HELD_OUT = 0.2  # share of a class for validation, and for the test, in undivided data
_HELD_OUT_OFFICIAL = 5000  # images for validation out of a public training set
_RESIZE_BATCH = 1000
_IDX_STEMS = ("train", "t10k")
_FASHION = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
_CIFAR = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class Arrays(NamedTuple):
    """One set of images.

    Attributes:
        images: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,), each in [0, number of classes).
    """

    images: Tensor
    labels: Tensor


class DataSet(NamedTuple):
    """Three sets that share no image, and the names of the classes in the order of the labels."""

    train: Arrays
    validation: Arrays
    test: Arrays
    classes: tuple[str, ...]


def load_data(
    data: str, data_dir: str = "", image_size: int = 0, progress: Progress | None = None
) -> DataSet:
    """Read a data set into memory.

    Args:
        data: One of the sources that this module's documentation lists.
        data_dir: Directory of the files; empty for the user's cache directory. Data sets that are
            not there are downloaded into it. The PATH of an image folder is relative to it.
        image_size: Height and width in pixels to resize to (bilinear with antialiasing, without
            keeping the aspect ratio); 0 keeps the size, and means 64 for an image folder.
        progress: Called with the number of files read so far and the number of all files.

    Returns:
        The three sets.

    Raises:
        ValueError: There is no such source, or the image size is negative.
        DataError: The data set is missing, empty, damaged or inconsistent.

    Example:
        >>> digits = load_data("digits")
        >>> [len(labels) for _, labels in digits[:3]]
        [1079, 359, 359]
    """
    check_source(data, image_size)
    name, _, location = data.partition(":")
    root = Path(data_dir).expanduser() if data_dir else _cache()
    if name == "image-folder" and location:
        size = image_size or IMAGE_FOLDER_SIZE
        folder = (
            download_folder(location, root)
            if location.startswith("gs://")
            else Path(data_dir, location).expanduser()
        )
        return _checked(data, _read_folder(folder, size, progress))
    readers = {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10}
    found = _checked(data, readers[data](root))
    if not image_size:
        return found
    train, validation, test = (_resize(arrays, image_size) for arrays in found[:3])
    return DataSet(train, validation, test, found.classes)


def check_source(data: str, image_size: int) -> None:
    """Refuse a source that there is not, before anything is read.

    Args:
        data: Source of the images.
        image_size: Height and width in pixels; 0 for the source's own.

    Raises:
        ValueError: There is no such source, or the image size is negative.
    """
    if image_size < 0:
        raise ValueError(f"image_size must be 0 or positive, got {image_size}")
    kind, _, location = data.partition(":")
    if data not in SOURCES[:3] and not (kind == "image-folder" and location):
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {data!r}")


def split_indices(
    labels: Tensor, *, validation: float, test: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw validation and test sets from each class alike, always in the same way.

    Args:
        labels: int64 of shape (N,).
        validation: Share of each class for validation, in [0, 1).
        test: Share of each class for the test, in [0, 1).

    Returns:
        Increasing indices of the training, validation and test set. The shares are rounded to the
        nearest image, halves to even.

    Example:
        >>> parts = split_indices(torch.tensor([0, 1] * 10), validation=0.2, test=0.3)
        >>> [len(part) for part in parts]
        [10, 4, 6]
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: list[list[Tensor]] = [[], [], []]
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        counts = [round(len(members) * share) for share in (validation, test)]
        sizes = [len(members) - sum(counts), *counts]
        for part, drawn in zip(parts, torch.split(members, sizes), strict=True):
            part.append(drawn)
    kept, for_validation, for_test = (torch.cat(part).sort().values for part in parts)
    return kept, for_validation, for_test


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "filterpress"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _take(arrays: Arrays, index: Tensor) -> Arrays:
    return Arrays(arrays.images[index], arrays.labels[index])


def _resize(arrays: Arrays, size: int) -> Arrays:
    parts = [
        F.interpolate(part, (size, size), mode="bilinear", antialias=True)
        for part in torch.split(arrays.images, _RESIZE_BATCH)
    ]
    return Arrays(torch.cat(parts), arrays.labels)


def _checked(data: str, found: DataSet) -> DataSet:
    n_classes = len(found.classes)
    if n_classes < 2:
        raise DataError(f"{data} has {n_classes} class; a classifier needs at least two")
    for split, arrays in zip(("train", "validation", "test"), found[:3], strict=True):
        if not len(arrays.labels):
            raise DataError(f"the {split} set of {data} is empty; add images to every class")
        if len(arrays.labels) != len(arrays.images):
            raise DataError(
                f"the {split} set of {data} has {len(arrays.images)} images"
                f" and {len(arrays.labels)} labels"
            )
        low, high = int(arrays.labels.min()), int(arrays.labels.max())
        if low < 0 or high >= n_classes:
            raise DataError(
                f"labels of {data} must be 0 to {n_classes - 1}, got {low} to {high} in {split}"
            )
    present = set(found.train.labels.tolist())
    if absent := [name for label, name in enumerate(found.classes) if label not in present]:
        raise DataError(f"the train set of {data} has no image of {', '.join(absent[:5])}")
    return found


def _digits(_root: Path) -> DataSet:
    from sklearn.datasets import load_digits  # a second that others need not pay

    images, labels = load_digits(return_X_y=True)
    # 17 grey levels, 0 to 16, become 0 to 240.
    every = Arrays(
        torch.from_numpy((images * 15).astype(np.uint8)).reshape(-1, 1, 8, 8),
        torch.from_numpy(labels.astype(np.int64)),
    )
    return _divide(every, [str(digit) for digit in range(10)])


def _divide(every: Arrays, classes: Sequence[str]) -> DataSet:
    parts = split_indices(every.labels, validation=_HELD_OUT, test=_HELD_OUT)
    train, validation, test = (_take(every, part) for part in parts)
    return DataSet(train, validation, test, tuple(classes))


def _hold_out(train: Arrays, test: Arrays, n: float, classes: Sequence[str]) -> DataSet:
    """Hold out n training images for validation, but no more than the usual share."""
    share = min(_HELD_OUT, n / max(1, len(train.labels)))
    kept, held, _ = split_indices(train.labels, validation=share)
    return DataSet(_take(train, kept), _take(train, held), test, tuple(classes))


def _fashion_mnist(root: Path) -> DataSet:
    folder = _find_idx(root)
    if folder is None:
        from filterpress._torchvision import torchvision  # only to download

        try:
            torchvision.datasets.FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"fashion-mnist is not in {root} and cannot be downloaded ({_line(error)}); "
                "give data_dir, a folder with its four -ubyte.gz files"
            ) from error
        folder = root / "FashionMNIST" / "raw"
    train, test = (_read_idx_pair(folder, stem) for stem in _IDX_STEMS)
    return _hold_out(train, test, _HELD_OUT_OFFICIAL, _FASHION)


def _find_idx(root: Path) -> Path | None:
    """Find the folder with MNIST's four files: the root itself, or where torchvision puts them."""
    for folder in (root, root / "FashionMNIST" / "raw"):
        pairs = [files for stem in _IDX_STEMS for files in _idx(folder, stem)]
        if all(plain.is_file() or packed.is_file() for plain, packed in pairs):
            return folder
    return None


def _idx(folder: Path, stem: str) -> list[tuple[Path, Path]]:
    """Name the files of images and of labels, each as it is and compressed."""
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    return [(folder / name, folder / f"{name}.gz") for name in names]


def _read_idx_pair(folder: Path, stem: str) -> Arrays:
    images, labels = (
        _read_idx(plain if plain.is_file() else packed) for plain, packed in _idx(folder, stem)
    )
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(f"the {stem} files in {folder} are not images and labels")
    return Arrays(images[:, None], labels.long())


def _read_idx(path: Path) -> Tensor:
    """Read bytes in MNIST's format: two zeros, type 8, the rank, big-endian sizes, the data."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from error
    start = 4 + 4 * content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = [int(n) for n in np.frombuffer(content[4:start], ">u4")] if start else []
    if not start or len(content) - start != math.prod(shape):
        raise DataError(f"{path} is not an idx file of bytes, or is cut off; download it again")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def _cifar10(root: Path) -> DataSet:
    from filterpress._torchvision import torchvision  # slow to import

    source = torchvision.datasets.CIFAR10

    def read(*, train: bool) -> Arrays:
        try:
            found = source(root, train=train)
        except RuntimeError:  # not there, or not as its checksums say
            found = source(root, train=train, download=True)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return Arrays(images, torch.tensor(found.targets))

    try:
        train, test = read(train=True), read(train=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cifar10 is not in {root} and cannot be downloaded ({_line(error)}); "
            "give data_dir, the folder that holds cifar-10-batches-py"
        ) from error
    return _hold_out(train, test, _HELD_OUT_OFFICIAL, _CIFAR)


class _File(NamedTuple):
    split: str
    class_name: str
    path: Path


def _read_folder(folder: Path, size: int, progress: Progress | None) -> DataSet:
    files = [file for split, place in _places(folder).items() for file in _list(split, place)]
    if not files:
        raise DataError(f"{folder} has no class folders with images (PNG, JPEG, …) in them")
    classes = sorted({file.class_name for file in files if file.split in ("train", "")})
    if unknown := sorted({file.class_name for file in files} - set(classes)):
        raise DataError(f"the train folder in {folder} lacks the classes {', '.join(unknown[:5])}")
    images, digests = read_images([file.path for file in files], size, progress)
    labels = torch.tensor([classes.index(file.class_name) for file in files])
    every = Arrays(images, labels)
    if not files[0].split:
        # A copy of a file must not get into another set than the file.
        first = {digest: index for index, digest in reversed([*enumerate(digests)])}
        return _divide(_take(every, torch.tensor(sorted(first.values()))), classes)
    _refuse_overlap(files, digests)
    train, validation, test = (
        _take(every, torch.tensor([file.split == split for file in files])) for split in _FOLDERS
    )
    if len(validation.labels):
        return DataSet(train, validation, test, tuple(classes))
    return _hold_out(train, test, math.inf, classes)


def _places(folder: Path) -> dict[str, Path]:
    """Find the folder of each split; of the split without a name, if the data is undivided."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if not (folder / "train").is_dir():
        return {"": folder}
    if not (folder / "test").is_dir():
        raise DataError(f"{folder} has train but no test; add it, or put the classes side by side")
    return {
        split: folder / name
        for split, names in _FOLDERS.items()
        for name in names
        if (folder / name).is_dir()
    }


def _list(split: str, folder: Path) -> list[_File]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [_File(split, place.name, path) for place in classes for path in image_files(place)]


def _refuse_overlap(files: Sequence[_File], digests: Sequence[str]) -> None:
    seen: dict[str, _File] = {}
    for file, digest in zip(files, digests, strict=True):
        other = seen.setdefault(digest, file)
        if other.split != file.split:
            raise DataError(f"{other.path} and {file.path} are the same image; keep one of them")
