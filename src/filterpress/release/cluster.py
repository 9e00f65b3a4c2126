"""What a Kubernetes cluster is told of a rollout, where a publisher runs in one.

Nothing here decides: the store does. Who looks at the cluster sees the state of a channel in a
ConfigMap and its changes as Events; and publishers take turns by a Lease, so that they seldom have
to begin again. A publisher that may not write these says so and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filterpress.errors import ClusterError
from filterpress.release.channel import Channel

if TYPE_CHECKING:
    from filterpress.release.kube import Kube

_log = logging.getLogger(__name__)

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # in every pod


@contextmanager
def turn(store: str) -> Iterator[None]:
    """Wait until no other publisher in the cluster writes to a store, though not for ever.

    Args:
        store: Directory or ``gs://bucket/prefix``.
    """
    kube = _open()
    if kube is None:
        yield
        return
    held = _told(lambda: kube.acquire(store))
    try:
        yield
    finally:
        if held:
            _told(lambda: kube.release(store))


def mirror(action: str, channel: Channel, store: str) -> None:
    """Show in the cluster what a channel says.

    Args:
        action: What was done, such as ``Ramp``.
        channel: The channel as it is now.
        store: Directory or ``gs://bucket/prefix``.
    """
    kube = _open()
    if kube is None:
        _log.info("no cluster to tell of %s", channel.path)
        return
    _told(lambda: kube.show(action, channel, store))


def _open() -> Kube | None:
    """Return the cluster that this runs in, if it does."""
    if not _ACCOUNT.is_dir():
        return None
    try:
        from filterpress.release.kube import Kube  # here: it is slow to import, and optional

        return Kube(_ACCOUNT)
    except ImportError:
        _log.warning("the cluster is not told: it takes pip install 'filterpress[publish]'")
    except ClusterError as error:
        _log.warning("cannot tell the cluster: %s", error)
    return None


def _told(tell: Callable[[], None]) -> bool:
    """Tell the cluster something; where that fails, the store is what counts."""
    try:
        tell()
    except ClusterError as error:
        _log.warning("%s", error)
        return False
    return True
