"""Image files of any size, to one uint8 tensor; and folders of them in a bucket.

Files are decoded once, in a pool of threads (Pillow releases the interpreter's lock), and resized
with Pillow's antialiased bilinear filter.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from filterpress import buckets, files
from filterpress.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

Progress = Callable[[int, int], None]

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"CMYK", "P", "RGB", "RGBA", "YCbCr"})
_DOWNLOADS = 8


def image_files(folder: Path) -> list[Path]:
    """List the image files directly in a folder, by suffix and in the order of their names."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file()
    )


def read_images(
    paths: Sequence[Path], size: int, progress: Progress | None = None
) -> tuple[Tensor, list[str]]:
    """Decode image files into one tensor.

    Args:
        paths: The files; at least one.
        size: Height and width in pixels to resize to; the aspect ratio is not kept.
        progress: Called with the number of files read so far and the number of all files.

    Returns:
        uint8 images of shape (N, C, size, size), C = 1 if every file is grey and 3 otherwise, and
        the SHA-256 of each file.

    Raises:
        DataError: A file is not an image of 8 bits a channel, or is damaged; it is named.
    """
    decoded: list[npt.NDArray[np.uint8]] = []
    digests: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for pixels, digest in pool.map(lambda path: _decode(path, size), paths):
                decoded.append(pixels)
                digests.append(digest)
                if progress:
                    progress(len(decoded), len(paths))
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    channels = max(len(pixels) for pixels in decoded)
    images = np.empty((len(decoded), channels, size, size), np.uint8)
    for image, pixels in zip(images, decoded, strict=True):
        image[:] = pixels  # a grey image among coloured ones gets three equal channels
    return torch.from_numpy(images), digests


def _decode(path: Path, size: int) -> tuple[npt.NDArray[np.uint8], str]:
    # Pillow comes with torchvision, and the demo needs neither.
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.mode not in _GREY | _COLOUR:
                raise DataError(f"{path} has pixels of mode {image.mode}; convert it to 8 bits")
            image.draft(image.mode, (size, size))  # JPEG decodes to a fraction of its size faster
            picture = image.convert("L" if image.mode in _GREY else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image ({error}); repair or remove it") from error
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    digest = hashlib.sha256(content).hexdigest()
    return pixels.reshape(size, size, -1).transpose(2, 0, 1), digest


def download_folder(url: str, cache: Path) -> Path:
    """Download a folder of a bucket, unless exactly this state of it is there already.

    The local name is a digest of the names and generations of the objects, so a bucket that has
    changed is downloaded again, and a download that was cut off goes on with the missing files.

    Args:
        url: ``gs://bucket/prefix``. ``STORAGE_EMULATOR_HOST`` is honoured.
        cache: Directory that keeps downloads.

    Returns:
        The local folder, with the paths below the prefix.

    Raises:
        DataError: The bucket cannot be read, the folder is empty, or an object's name would leave
            the local folder.
    """
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
    except ModuleNotFoundError as error:
        raise DataError(f"{url} needs google-cloud-storage: pip install it") from error
    try:
        return _download(url, cache)
    except (GoogleAPIError, GoogleAuthError, OSError) as error:
        raise DataError(
            f"cannot download {url}: {error}; check the bucket and its credentials"
        ) from error


def _download(url: str, cache: Path) -> Path:
    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    with buckets.client() as client:
        blobs = {
            blob.name.removeprefix(prefix): blob
            for blob in client.list_blobs(bucket, prefix=prefix)
            if not blob.name.endswith("/")  # a console's placeholder for a folder
        }
        if not blobs:
            raise DataError(f"{url} is empty or does not exist")
        state = "\n".join(f"{name} {blob.generation}" for name, blob in sorted(blobs.items()))
        folder = cache / "gcs" / hashlib.sha256(f"{url}\n{state}".encode()).hexdigest()[:16]
        if folder.is_dir():
            return folder
        partial = files.draft(folder)
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            list(pool.map(lambda name: _fetch(blobs[name], partial, name), blobs))
    partial.replace(folder)
    files.sync(folder.parent)
    return folder


def _fetch(blob: Any, folder: Path, name: str) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"the object {blob.name!r} would be written outside its folder; rename it")
    path = folder / relative
    if not path.exists():
        files.write(path, blob.download_as_bytes())
