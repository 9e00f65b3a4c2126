"""Checkpoints: what a training that was killed goes on from, bit for bit.

A checkpoint lies in scratch under a digest of all that the training depends on, so that no other
training finds it: ``DIGEST.checkpoint``, one archive of

```
state.safetensors  weights, the weights kept as best, the state of the optimizer and of every
                   generator of random numbers
state.json         the scores so far, the digest of the training and that of the checkpoint
```

Beside it ``DIGEST.progress`` tells whoever watches from outside how far it is, as JSON;
`told_of` reads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from filterpress.errors import ScratchError
from filterpress.processes import best_device, from_all, from_main, is_main, rank, tensors_from_main
from filterpress.scratch import DamagedError, Scratch, open_scratch

log = logging.getLogger(__name__)

FORMAT = 1
SHARE = 0.05  # of the time of a training, at most, is spent on writing checkpoints


@dataclass
class Course:
    """A training under way: all that changes from epoch to epoch.

    Attributes:
        model: The network.
        optimizer: What trains it.
        generator: What the order of the images and their augmentation are drawn from.
        scores: Validation score after each epoch.
        best: State of the network after the epoch of the best score.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    scores: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def told_of(training: str, scratch: Scratch) -> dict[str, Any] | None:
    """Read how far a training is, from outside.

    Args:
        training: Its name in scratch.
        scratch: The place.

    Returns:
        ``epoch``, ``epochs`` and ``scores``; None before the first epoch and after the end.

    Raises:
        ScratchError: Scratch cannot be read.
    """
    said = scratch.read(f"{training}.progress")
    return json.loads(said) if said else None


class _Saved(NamedTuple):
    tensors: dict[str, Tensor]
    strides: dict[str, list[int]]
    scores: list[float]


class Checkpoint:
    """The checkpoint of one training.

    Attributes:
        name: Name of the training in scratch.
    """

    def __init__(self, scratch: Scratch, name: str, share: float = SHARE) -> None:
        self.name = name
        self._scratch = scratch
        self._share = share
        self._due = 0.0

    def restore(self, course: Course) -> None:
        """Bring a training to where it was, if there is a checkpoint that fits it.

        Any number of processes may go on. With as many as before, the rest of the training is that
        of one that was never interrupted; of others, each takes the generator of its rank, and one
        that was not there before begins with its own.

        Args:
            course: The training, on its device, before the first epoch. All processes call this.

        Raises:
            ScratchError: Scratch cannot be read.
        """
        # Only the machine of the main process may have the folder.
        here: dict[str, Tensor] = {}

        def read() -> tuple[list[float], dict[str, list[int]]] | None:
            if (saved := self._read(course)) is None:
                return None
            here.update(saved.tensors)
            return saved.scores, saved.strides

        if (told := from_main(read)) is None:
            return
        scores, strides = told
        tensors = tensors_from_main(here)
        course.model.load_state_dict(_below("model", tensors))
        course.best = _below("best", tensors)
        _load_optimizer(course.optimizer, _below("optimizer", tensors), strides)
        course.scores = list(scores)
        _set_random(course.generator, _below("random", tensors))
        if is_main():
            log.info("going on after epoch %d, from a checkpoint", len(course.scores))

    def save(self, course: Course, epochs: int) -> None:
        """Write how far a training is, and the checkpoint too unless that would take too long.

        A checkpoint is written when the time since the last is a multiple of what that one took:
        training is slowed down by a share of five percent at most, however fast the epochs and
        however slow the place, and a killed one repeats no more than some epochs.

        Args:
            course: The training, after an epoch. All processes call this.
            epochs: Epochs of the whole training.

        Raises:
            ScratchError: Scratch cannot be written.
        """
        generators = from_all(_random_states())
        from_main(lambda: self._write(course, generators, epochs))

    def delete(self) -> None:
        """Remove what is no longer needed; that it cannot be removed is no more than a warning."""
        if not is_main():
            return
        try:
            for part in ("checkpoint", "progress"):
                self._scratch.delete(f"{self.name}.{part}")
        except ScratchError as error:
            log.warning("%s", error)

    def _write(self, course: Course, generators: list[dict[str, Tensor]], epochs: int) -> None:
        told = {"epoch": len(course.scores), "epochs": epochs, "scores": course.scores}
        self._scratch.write(f"{self.name}.progress", json.dumps(told).encode())
        begun = time.monotonic()
        if begun < self._due:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                _save(Path(folder), self.name, course, generators)
            except (OSError, SafetensorError) as error:
                raise ScratchError(f"cannot write a checkpoint in {folder}: {error}") from error
            self._scratch.put(f"{self.name}.checkpoint", Path(folder))
        ended = time.monotonic()
        self._due = ended + (ended - begun) * (1 / self._share - 1)

    def _read(self, course: Course) -> _Saved | None:
        """Read the checkpoint; one that is damaged or does not fit is as good as none."""
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            try:
                if not self._scratch.get(f"{self.name}.checkpoint", folder):
                    return None
                saved = _load(folder, self.name)
                _check_fit(saved, course)
            except (DamagedError, FileNotFoundError, ValueError) as error:
                reason = " ".join(str(error).split())
                log.warning("starting anew, the checkpoint cannot be used: %s", reason)
                return None
        return saved


class Checkpoints:
    """Those of the trainings that a stage does one after the other.

    A stage that was stopped begins with its first training again. Each goes on from its own
    checkpoint, so those that had ended take no time.

    Args:
        scratch: The place; None for no checkpoints.
        name: Name of the first training, see `name_of`; those after it are numbered.
    """

    def __init__(self, scratch: Scratch | None = None, name: str = "") -> None:
        self._scratch, self._name = scratch, name
        self._taken: list[Checkpoint] = []

    def take(self) -> Checkpoint | None:
        """Return that of the next training."""
        if self._scratch is None:
            return None
        number = f"-{len(self._taken) + 1}" if self._taken else ""
        self._taken.append(Checkpoint(self._scratch, f"{self._name}{number}"))
        return self._taken[-1]

    def delete(self) -> None:
        """Remove all that were taken."""
        for checkpoint in self._taken:
            checkpoint.delete()


NO_CHECKPOINTS = Checkpoints()


def open_checkpoints(
    scratch: str,
    stage: str,
    settings: Mapping[str, Any],
    packages: Iterable[Path],
    weights: str = "",
) -> Checkpoints:
    """Open the checkpoints of a stage's trainings.

    Args:
        scratch: Folder or ``gs://bucket/prefix``; empty for no checkpoints.
        stage: As for `name_of`.
        settings: As for `name_of`.
        packages: As for `name_of`.
        weights: As for `name_of`.

    Raises:
        ValueError: The address of scratch is neither.
        ScratchError: There is no way to reach buckets from here.
        OSError: A package or the file cannot be read.
    """
    if not scratch:
        return NO_CHECKPOINTS
    return Checkpoints(open_scratch(scratch), name_of(stage, settings, packages, weights))


def name_of(
    stage: str, settings: Mapping[str, Any], packages: Iterable[Path], weights: str = ""
) -> str:
    """Name a training by all that it depends on.

    Args:
        stage: Name of the stage.
        settings: Its settings, all but those that say where something is written.
        packages: Packages it reads; what counts is what is in them.
        weights: File it reads, empty for none; likewise.

    Returns:
        Hexadecimal digest.

    Raises:
        OSError: A package or the file cannot be read.
    """
    depends = {
        "filterpress": version("filterpress"),
        "torch": torch.__version__,
        "format": FORMAT,
        "stage": stage,
        "settings": dict(settings),
        "packages": [_digest(package / "model.json") for package in packages],
        "weights": _digest(Path(weights)) if weights else "",
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def _save(folder: Path, training: str, course: Course, generators: list[dict[str, Tensor]]) -> None:
    tensors = _tensors(course, generators)
    weights = folder / "state.safetensors"
    save_file({name: _plain(tensor) for name, tensor in tensors.items()}, weights)
    state = {
        "format": FORMAT,
        "training": training,
        "scores": course.scores,
        "strides": {n: t.stride() for n, t in tensors.items() if not t.is_contiguous()},
    }
    state["sha256"] = _seal(weights, state)
    (folder / "state.json").write_text(json.dumps(state))


def _load(folder: Path, training: str) -> _Saved:
    state = json.loads((folder / "state.json").read_bytes())
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"state.json must be of format {FORMAT}")
    if state.get("training") != training:
        raise ValueError("it is that of another training")
    weights = folder / "state.safetensors"
    if state.pop("sha256", None) != _seal(weights, state):
        raise ValueError("it is damaged: its digest is another one")
    return _Saved(load_file(weights), state["strides"], state["scores"])


def _check_fit(saved: _Saved, course: Course) -> None:
    own = _shapes(course.model.state_dict())
    for part in ("model", "best"):
        if _shapes(_below(part, saved.tensors)) != own:
            raise ValueError(f"its weights ({part}) are those of another network")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def _tensors(course: Course, generators: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name every tensor of a training."""
    optimizer = {
        f"{number}.{key}": value
        for number, state in course.optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    random = {f"{r}.{kind}": t for r, states in enumerate(generators) for kind, t in states.items()}
    random["images"] = course.generator.get_state()
    parts = {
        "model": course.model.state_dict(),
        "best": course.best,
        "optimizer": optimizer,
        "random": random,
    }
    return {
        f"{part}/{name}": t.detach() for part, all_ in parts.items() for name, t in all_.items()
    }


def _below(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{part}/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _plain(tensor: Tensor) -> Tensor:
    """Copy a tensor as safetensors wants it: contiguous, and sharing no memory."""
    return tensor.to("cpu", copy=True).contiguous()


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], strides: dict[str, list[int]]
) -> None:
    """Give an optimizer its state; what it was made with is not part of it.

    Momentum keeps the layout of the gradients, because arithmetic on another one may round
    otherwise.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        stride = strides.get(f"optimizer/{name}", tensor.stride())
        laid_out = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[key] = laid_out
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_states() -> dict[str, Tensor]:
    """Return the states of this process's global generators."""
    states = {"cpu": torch.get_rng_state()}
    if (device := best_device()).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random(images: torch.Generator, states: Mapping[str, Tensor]) -> None:
    images.set_state(states["images"])
    if (state := states.get(f"{rank()}.cpu")) is not None:
        torch.set_rng_state(state)
    device = best_device()
    if device.type == "cuda" and (state := states.get(f"{rank()}.cuda")) is not None:
        torch.cuda.set_rng_state(state, device)


def _seal(weights: Path, state: Mapping[str, Any]) -> str:
    return hashlib.sha256((_digest(weights) + json.dumps(state)).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
