"""What can go wrong in the world, as one tree.

```
FilterpressError
├── PackageError      a package directory that is missing, damaged or of another format
├── BitstreamError    an encoded file that is truncated, damaged or hostile
├── BudgetError       thresholds that no network can meet, or that this one did not
├── DataError         a data set that is missing, empty or inconsistent
├── ModelError        a network that cannot be built, loaded or compressed
├── ReleaseError      a store, key or signature that publication cannot trust
├── ScratchError      a place for checkpoints that cannot be used
├── WorkerError       another process of the same training that is gone
└── ClusterError      a Kubernetes cluster that does not answer, or refuses
```

The caller's own mistakes (a wrong type, a value out of range) are ``TypeError`` and
``ValueError``. Both families reach a user of the command line as one line and exit code 2;
``BudgetError`` from a run that simply did not get there is exit code 1.
"""

from __future__ import annotations


class FilterpressError(Exception):
    """Root of every error that filterpress raises about the world."""


class PackageError(FilterpressError):
    """A package directory is missing, damaged or of another format."""


class BitstreamError(FilterpressError):
    """An encoded file is truncated, damaged or hostile."""


class BudgetError(FilterpressError):
    """The thresholds were not met; the message carries the numbers."""


class DataError(FilterpressError):
    """A data set is missing, empty or inconsistent."""


class ModelError(FilterpressError):
    """A network cannot be built, loaded or compressed."""


class ReleaseError(FilterpressError):
    """A store, a key or a signature cannot be trusted or used."""


class ScratchError(FilterpressError):
    """A place for checkpoints, or what lies there, cannot be used."""


class WorkerError(FilterpressError):
    """Another process of the same training died or does not answer."""


class ClusterError(FilterpressError):
    """A Kubernetes cluster does not answer, or refuses.

    Args:
        message: What and why.
        status: Status of its answer; 0 if there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
