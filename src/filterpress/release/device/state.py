"""What a vehicle remembers, in a file whose replacement is the one commit point."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filterpress import files

_MAX_BAD = 64


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A release that has yet to show that it works.

    Attributes:
        slot: Where it is.
        sha256: Digest of its encoded file.
        tries: How often it may still be tried.
    """

    slot: str
    sha256: str
    tries: int


@dataclass(frozen=True, kw_only=True)
class State:
    """What a vehicle remembers.

    Attributes:
        good: Slot that runs; None before the first release passed its trial.
        release_counter: Of the newest release that passed its trial; lower ones are refused.
        trial: What is to be tried at the next boot.
        bad: Digests of releases that cannot be decoded or failed their trial, the newest last.
        software: With which versions of the software they did.
        error: Why the last update or trial failed; empty if it did not.
        attack: Whether that was something that does not happen without malice or damage.
    """

    good: str | None = None
    release_counter: int = 0
    trial: Trial | None = None
    bad: tuple[str, ...] = ()
    software: str = ""
    error: str = ""
    attack: bool = False

    def with_bad(self, sha256: str) -> tuple[str, ...]:
        """Return the bad releases with one more; the oldest are forgotten in the end."""
        return (*(known for known in self.bad if known != sha256), sha256)[-_MAX_BAD:]


def versions() -> str:
    """Name the software that decodes and runs a release."""
    return ", ".join(_version(name) for name in ("filterpress", "onnxruntime"))


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"another {name}"  # a build for some hardware has another name: no reason to stop


def read(path: Path) -> State | None:
    """Read the state.

    Args:
        path: The file.

    Returns:
        The state, or None if it is lost or damaged. What was bad with other software is not known
        to be so with this.
    """
    try:
        found = json.loads(path.read_bytes())
        trial = found.pop("trial")
        state = State(
            **{**found, "bad": tuple(found["bad"])}, trial=Trial(**trial) if trial else None
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    now = versions()
    return state if state.software == now else replace(state, software=now, bad=())


def write(path: Path, state: State) -> None:
    """Replace the state, and wait until the disk has it.

    Args:
        path: The file.
        state: What to remember.

    Raises:
        OSError: It cannot be written; the old state stands.
    """
    files.write(path, json.dumps(asdict(state)).encode())
