"""The Kubernetes objects that a publisher writes: a ConfigMap, Events and a Lease.

Importing this needs the ``kubernetes`` package; see `filterpress.release.cluster`, which does so
inside a cluster only.
"""

from __future__ import annotations

import hashlib
import re
import socket
import time
import uuid
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

from filterpress.errors import ClusterError
from filterpress.kubernetes_api import Api
from filterpress.release.channel import Channel, Json

MANAGER = "filterpress"  # of the fields that are applied
_LEASE_S = 60
_PATIENCE_S = 30
_PAUSE_S = 0.5
_MAX_NOTE = 1024
_LABELS = {"app.kubernetes.io/managed-by": MANAGER}


class Kube:
    """The namespace that this process runs in.

    Args:
        account: Folder of the service account: ``token``, ``ca.crt`` and ``namespace``.

    Raises:
        ClusterError: The folder is not complete, or this is no pod.
    """

    def __init__(self, account: Path) -> None:
        self._api = Api(account)
        self._namespace = self._api.namespace
        self._me = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"

    def show(self, action: str, channel: Channel, store: str) -> None:
        """Write what a channel says into its ConfigMap, and an Event if it has changed.

        Args:
            action: What was done, such as ``Ramp``.
            channel: The channel.
            store: Where it is.

        Raises:
            ClusterError: The cluster cannot be reached or does not allow it.
        """
        name = _name(store, channel.path)
        applied = self._api.request(
            "PATCH",
            f"/api/v1/namespaces/{self._namespace}/configmaps/{name}",
            self._described("v1", "ConfigMap", name, data=state_of(channel, store)),
            content_type="application/apply-patch+yaml",
            query=[("fieldManager", MANAGER), ("force", "true")],
        )
        if channel.changed:
            path = f"/apis/events.k8s.io/v1/namespaces/{self._namespace}/events"
            self._api.request("POST", path, self._event(action, channel, applied))

    def _event(self, action: str, channel: Channel, about: Json) -> Json:
        known = ("name", "namespace", "uid", "resourceVersion")
        return self._described(
            "events.k8s.io/v1",
            "Event",
            # Not generateName: should the answer be lost, the same name is refused a second time.
            f"{MANAGER}-{uuid.uuid4().hex}",
            eventTime=_micro_time(datetime.now(UTC)),
            reportingController=MANAGER,
            reportingInstance=self._me,
            action=action,
            reason=action,
            type="Warning" if channel.content["rollout"]["halted"] else "Normal",
            note=note_of(channel),
            regarding={"apiVersion": "v1", "kind": "ConfigMap"}
            | {key: about["metadata"][key] for key in known},
        )

    def acquire(self, store: str) -> None:
        """Wait for one's turn to write to a store.

        Args:
            store: The store.

        Raises:
            ClusterError: As for `show`, or others have had their turn for very long.
        """
        end = time.monotonic() + _PATIENCE_S
        while not self._try_to_acquire(store):
            if time.monotonic() > end:
                raise ClusterError(f"not waiting any longer for the lease {_name(store)}")
            time.sleep(_PAUSE_S)

    def release(self, store: str) -> None:
        """Give one's turn back, unless it has gone to somebody else.

        Args:
            store: As for `acquire`.

        Raises:
            ClusterError: As for `show`.
        """
        held = self._lease(store)
        if held and held["spec"].get("holderIdentity") == self._me:
            held["spec"] |= {"holderIdentity": "", "renewTime": _micro_time(datetime.now(UTC))}
            self._replace_lease(held)

    def _try_to_acquire(self, store: str) -> bool:
        now = datetime.now(UTC)
        held = self._lease(store)
        if not held:
            body = self._described("coordination.k8s.io/v1", "Lease", _name(store))
            body["spec"] = self._turn(now, 0)
            return bool(self._api.request("POST", self._leases, body, none_if=HTTPStatus.CONFLICT))
        if _is_held(held["spec"], now):
            return False
        held["spec"] = self._turn(now, held["spec"].get("leaseTransitions", 0) + 1)
        return self._replace_lease(held)

    def _turn(self, now: datetime, transitions: int) -> Json:
        return {
            "holderIdentity": self._me,
            "leaseDurationSeconds": _LEASE_S,
            "acquireTime": _micro_time(now),
            "renewTime": _micro_time(now),
            "leaseTransitions": transitions,
        }

    @property
    def _leases(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self._namespace}/leases"

    def _lease(self, store: str) -> Json:
        """Return a lease; nothing if there is none."""
        return self._api.request(
            "GET", f"{self._leases}/{_name(store)}", none_if=HTTPStatus.NOT_FOUND
        )

    def _replace_lease(self, lease: Json) -> bool:
        """Write a lease, unless somebody has since it was read: its resourceVersion tells."""
        path = f"{self._leases}/{lease['metadata']['name']}"
        return bool(self._api.request("PUT", path, lease, none_if=HTTPStatus.CONFLICT))

    def _described(self, version: str, kind: str, name: str, **fields: Any) -> Json:
        metadata = {"name": name, "namespace": self._namespace, "labels": _LABELS}
        return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


def state_of(channel: Channel, store: str) -> dict[str, str]:
    """Return what a ConfigMap says of a channel; its values are text.

    Args:
        channel: The channel.
        store: Where it is.
    """
    content, rollout = channel.content, channel.content["rollout"]
    return {
        "store": store,
        "channel": channel.path,
        **{
            name: str(content[name])
            for name in ("release_counter", "target", "sha256", "n_bytes", "run")
        },
        "percent": f"{rollout['percent_bp'] / 100:g}",
        "cohorts": ",".join(rollout["cohorts"]),
        "not_before": rollout["not_before"],
        "halted": str(rollout["halted"]).lower(),
    }


def note_of(channel: Channel) -> str:
    """Say in one line what a channel says, as long as an Event takes."""
    content, rollout = channel.content, channel.content["rollout"]
    who = "halted" if rollout["halted"] else f"{rollout['percent_bp'] / 100:g} % of the vehicles"
    where = f"{content['hardware']}/{content['channel']}"
    note = f"release {content['release_counter']} on {where}, {who}: {content['target']}"
    return note[:_MAX_NOTE]


def _name(store: str, path: str = "") -> str:
    """Name an object so that people know it, and so that no two stores or channels share it."""
    digest = hashlib.sha256(f"{store} {path}".encode()).hexdigest()[:10]
    words = re.sub("[^a-z0-9]+", "-", path.removesuffix(".json").lower())
    return "-".join(filter(None, [MANAGER, words[:200].strip("-"), digest]))


def _micro_time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _is_held(spec: Json, now: datetime) -> bool:
    if not (spec.get("holderIdentity") and spec.get("renewTime")):
        return False
    seconds = timedelta(seconds=spec.get("leaseDurationSeconds", 0))
    return now < datetime.fromisoformat(spec["renewTime"]) + seconds
