"""What a network is for: data, loss and score.

Image classification is built in. Anything else that has these five members is a task too, and is
named on the command line as ``--task package.module:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from filterpress._images import Progress
from filterpress._user_code import load_function
from filterpress.data import Arrays, DataSet, Split, load_data

Predict = Callable[[Tensor], Tensor]

_SCORE_BATCH = 250
_PIXELS, _MIN_IMAGES = 2**22, 128  # of calibration images: pixels at most, but so many images
_MEMBERS = ("input_shape", "n_classes", "batches", "size", "loss", "score")
_LOADED: dict[tuple[str, str, int, str], Task] = {}


class Task(Protocol):
    """What the stages ask of a task."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        ...

    @property
    def n_classes(self) -> int:
        """Number of outputs of the network."""
        ...

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets): shuffled and augmented given a generator, else in order."""
        ...

    def size(self, split: Split) -> int:
        """Count the images of a split."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar to minimise, the mean over the batch."""
        ...

    def score(self, predict: Predict, split: Split) -> float:
        """Return how good the predictions on a split are, in [0, 1], 1 the best."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageClassification:
    """Image classification: cross entropy, and top-1 accuracy.

    Attributes:
        data: The three sets.
        mean: Mean of each channel over the training images, in [0, 255], of shape (C, 1, 1).
        std: Standard deviation likewise.
        shift: Pixels, at most, by which training images are shifted each way; black comes in.
        flip: Whether training images are mirrored, each with probability one half.
    """

    data: DataSet = field(repr=False)
    mean: Tensor
    std: Tensor
    shift: int
    flip: bool

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift must not be negative, got {self.shift}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        channels, height, width = self.data.train.images.shape[1:]
        return channels, height, width

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.data.classes)

    def size(self, split: Split) -> int:
        """Count the images of a split."""
        return len(self._arrays(split).labels)

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of a split, normalised, and their labels.

        Args:
            split: ``train``, ``validation`` or ``test``.
            batch_size: Number of images in a batch; the last one may be smaller.
            generator: Source of the order and the augmentation; a CPU generator. Without one,
                the images come in order and as they are.
            device: Where the batches go.

        Yields:
            float32 of shape (N, C, H, W) with mean 0 and deviation 1 over the training images, and
            int64 of shape (N,).
        """
        images, labels = self._arrays(split)
        order = None if generator is None else torch.randperm(len(labels), generator=generator)
        mean, std = self.mean.to(device), self.std.to(device)
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            index = part if order is None else order[part]
            batch = images[index].to(device)
            if generator is not None:
                batch = augment(batch, shift=self.shift, flip=self.flip, generator=generator)
            yield (batch.float() - mean) / std, labels[index].to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy in nats."""
        return F.cross_entropy(outputs, targets)

    def score(self, predict: Predict, split: Split) -> float:
        """Return the top-1 accuracy, the exact fraction."""
        return share_right(self.confusion(predict, split))

    def confusion(self, predict: Predict, split: Split) -> Tensor:
        """Count the images of each class that were taken for each class.

        Args:
            predict: Takes normalised float32 of shape (N, C, H, W), returns (N, n_classes).
            split: ``train``, ``validation`` or ``test``.

        Returns:
            int64 of shape (n_classes, n_classes); rows are the labels, columns the predictions.
        """
        n = self.n_classes
        counts = torch.zeros(n * n, dtype=torch.int64)
        for images, labels in self.batches(split, _SCORE_BATCH):
            counts += torch.bincount(labels * n + predict(images).argmax(1).cpu(), minlength=n * n)
        return counts.reshape(n, n)

    def _arrays(self, split: Split) -> Arrays:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split must be train, validation or test, got {split!r}")
        found: Arrays = getattr(self.data, split)
        return found


def share_right(confusion: Tensor) -> float:
    """Return the top-1 accuracy of counts that `ImageClassification.confusion` made.

    Example:
        >>> share_right(torch.tensor([[3, 1], [0, 4]]))
        0.875
    """
    return int(confusion.diagonal().sum()) / int(confusion.sum())


def augment(images: Tensor, *, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift and mirror each image of a batch at random.

    Args:
        images: Any dtype, of shape (N, C, H, W), on any device.
        shift: Largest shift in pixels each way; zeros come in.
        flip: Whether to mirror each image left to right with probability one half.
        generator: A CPU generator.

    Returns:
        A new tensor of the same shape.
    """
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows = down + torch.arange(height)
    columns = right + torch.arange(width)
    if flip:
        mirrored = torch.rand((n, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (shift, shift, shift, shift))
    rows, columns = rows.to(images.device), columns.to(images.device)
    # One gather: row and column of the padded image for each pixel of the result, (N, H, W).
    index = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)[:, None]
    return padded.flatten(2).gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)


def load_task(
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    *,
    progress: Progress | None = None,
) -> Task:
    """Make the task of a run. The same arguments return the same object in a process.

    Args:
        data: Source of the images; `filterpress.data` lists them.
        data_dir: Directory of the data set.
        image_size: Height and width to resize to; 0 for the source's own.
        task: ``package.module:function`` of the user's own, called with ``data``, ``data_dir`` and
            ``image_size`` by name; it returns a `Task`. Empty for image classification.
        progress: Called with the number of files read so far and the number of all files.

    Returns:
        The task.

    Raises:
        ValueError: An argument names nothing that exists.
        TypeError: The user's function returned something that is no task.
        DataError: The data set is missing, empty, damaged or inconsistent.

    Example:
        >>> digits = load_task("digits")
        >>> digits.input_shape, digits.n_classes, digits.size("train")
        ((1, 8, 8), 10, 1079)
    """
    key = (data, str(Path(data_dir).resolve()) if data_dir else "", image_size, task)
    if key not in _LOADED:
        if task:
            _LOADED[key] = _user_task(task, data=data, data_dir=data_dir, image_size=image_size)
        else:
            _LOADED[key] = _classification(load_data(data, data_dir, image_size, progress), data)
    return _LOADED[key]


def calibration(task: Task, n: int, seed: int = 0) -> Tensor:
    """Choose clean training images, for statistics of activations.

    Args:
        task: Where they come from.
        n: How many; all of them if there are fewer, and fewer of large ones, each of which shows
            a filter more patches.
        seed: Decides which.

    Returns:
        Normalised float32 of shape (n, C, H, W), in the order of the training set.
    """
    _, height, width = task.input_shape
    n = min(n, max(_MIN_IMAGES, _PIXELS // (height * width)))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(task.size("train"), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=generator)[:n]] = True
    parts, start = [], 0
    for images, _ in task.batches("train", _SCORE_BATCH):
        parts.append(images[chosen[start : start + len(images)]])
        start += len(images)
    return torch.cat(parts)


def _classification(data: DataSet, name: str) -> ImageClassification:
    images = data.train.images
    # Sums of integers are exact, so the order of the additions does not matter.
    pixels = images.transpose(0, 1).flatten(1)
    levels = torch.arange(256, dtype=torch.float64)
    shares = torch.stack([torch.bincount(p, minlength=256) for p in pixels]) / pixels.shape[1]
    mean = shares.double() @ levels
    std = (shares.double() @ levels.square() - mean.square()).clamp(min=1).sqrt()
    return ImageClassification(
        data=data,
        mean=mean.float()[:, None, None],
        std=std.float()[:, None, None],
        # The usual four pixels at 32 pixels, one at eight. A mirrored digit is no digit.
        shift=max(1, images.shape[-1] // 8),
        flip=name != "digits",
    )


def _user_task(reference: str, **arguments: str | int) -> Task:
    made = load_function("task", reference)(**arguments)
    if missing := [name for name in _MEMBERS if not hasattr(made, name)]:
        raise TypeError(
            f"task must return an object with {', '.join(_MEMBERS)}; "
            f"{reference} returned {type(made).__name__} without {', '.join(missing)}"
        )
    return made  # type: ignore[no-any-return]
