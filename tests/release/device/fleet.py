"""A small publisher that knows no rules, and networks that do what a test needs."""

from __future__ import annotations

import copy
import datetime as datetime_module
import functools
import hashlib
import json
import time
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from filterpress.codec import encode, make_delta, quantize, snap
from filterpress.codec.graph import strip, to_onnx
from filterpress.release.golden import outputs

IMAGE = (2, 5, 5)
HARDWARE, CHANNEL = "cam-v2", "stable"
CHANNEL_FILE = f"channels/{HARDWARE}/{CHANNEL}.json"
DAYS = {"root": 365, "targets": 365, "release": 90, "rollout": 30, "snapshot": 7, "timestamp": 1}


def digest(data):
    return hashlib.sha256(data).hexdigest()


# Networks


def _loop_for_ever(given):
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    return helper.make_node("Loop", ["", "true", given], ["y"], body=body)


_TAILS = {
    "good": helper.make_node("Identity", ["z"], ["y"]),
    "not finite": helper.make_node("Div", ["z", "zero"], ["y"]),
    "does not run": helper.make_node("Reshape", ["z", "seven"], ["y"]),
    "endless": _loop_for_ever("z"),
}


@functools.cache
def encoded(seed=0, width=4, kind="good"):
    """An encoded file of about `width` kilobytes; neighbours in seed differ by little."""
    random = np.random.default_rng(width)
    hidden = 16 * width
    weights = {
        "conv.weight": random.normal(0, 1, (4, 2, 1, 1)),
        "fc.weight": random.normal(0, 1, (hidden, 4 * 5 * 5)) / 10,
        "fc.bias": np.random.default_rng(seed).normal(0, 0.5, 3),
        "head.weight": random.normal(0, 1, (3, hidden)) / np.sqrt(hidden),
    }
    tensors = {name: quantize(w.astype(np.float32), snap(1 / 64)) for name, w in weights.items()}
    constants = {
        **{name: weight.astype(np.float32) for name, weight in weights.items()},
        "flat": np.int64([0, -1]),
        "seven": np.int64([7]),
        "zero": np.float32(0),
        "true": np.bool_(True),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "flat"], ["f"]),
        helper.make_node("Gemm", ["f", "fc.weight"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "head.weight", "fc.bias"], ["z"], transB=1),
        _TAILS[kind],
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *IMAGE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items() if n in used],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return encode(tensors, strip(model, tensors), {})


V1, V2, V3 = (encoded(seed) for seed in (1, 2, 3))


@functools.cache
def _answers(data):
    return outputs(to_onnx(data), 0, 2)


def health(data, **changes):
    """What a channel says that a network answers."""
    expected = {"seed": 0, "count": 2, "outputs": _answers(data), "atol": 1e-3}
    return {**expected, "max_ms": 0, "max_mb": 0, **changes}


# Publishing


def new_keys():
    counts = dict.fromkeys(DAYS, 1) | {"root": 3}
    return {role: [CryptoSigner.generate_ed25519() for _ in range(n)] for role, n in counts.items()}


def expiry(days):
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)


def clock(days):
    """Stand in for the module ``datetime`` on a machine whose clock is wrong."""
    wrong = types.SimpleNamespace(now=lambda zone: expiry(days).astimezone(zone))
    return types.SimpleNamespace(datetime=wrong, timezone=datetime_module.timezone)


class Publisher:
    """Writes a store by the contract, or against it where a test says so."""

    def __init__(self, path, keys=None):
        self.path, self.keys, self.counter = Path(path), keys or new_keys(), 0
        root = Root(expires=expiry(DAYS["root"]), consistent_snapshot=True)
        for role in ("root", "targets", "snapshot", "timestamp"):
            for signer in self.keys[role]:
                root.add_key(signer.public_key, role)
        root.roles["root"].threshold = 2
        patterns = {"release": "models/*/*/*", "rollout": "channels/*/*.json"}
        delegations = Delegations(
            {},
            {
                role: DelegatedRole(role, [], 1, terminating=True, paths=[pattern])
                for role, pattern in patterns.items()
            },
        )
        targets = Targets(delegations=delegations)
        for role in patterns:
            targets.add_key(self.keys[role][0].public_key, role)
        self.signed = {
            "root": root,
            "targets": targets,
            "release": Targets(),
            "rollout": Targets(),
            "snapshot": Snapshot(),
            "timestamp": Timestamp(),
        }
        for role in ("targets", "release", "rollout", "snapshot", "timestamp"):
            self.signed[role].version = 0
        root.version = 0
        self.issue("root")
        self.issue("targets")

    def copy(self, path):
        """The same publisher with a store of its own, which the caller copies."""
        other = copy.copy(self)
        other.path, other.signed = Path(path), copy.deepcopy(self.signed)
        return other

    @property
    def root(self):
        return self.read("metadata/1.root.json")

    def read(self, name):
        return (self.path / name).read_bytes()

    def write(self, name, data):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def sign(self, role, signed, signers=None):
        metadata = Metadata(signed)
        for signer in signers or self.keys[role]:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def issue(self, role, *, days=None, signers=None, version=None, name=None):
        """Sign the next version of a role, and list it where it belongs."""
        signed = self.signed[role]
        signed.version = version or signed.version + 1
        signed.expires = expiry(DAYS[role] if days is None else days)
        if role == "timestamp":
            signed.unrecognized_fields.setdefault("x-issued", 0)
            signed.unrecognized_fields["x-issued"] = min(
                int(time.time()), int(signed.expires.timestamp())
            )
        data = self.sign(role, signed, signers)
        self.write(name or self.name(role), data)
        listed = MetaFile.from_data(signed.version, data, ["sha256"])
        if role == "snapshot":
            self.signed["timestamp"].snapshot_meta = listed
        elif role not in {"root", "timestamp"}:
            self.signed["snapshot"].meta[f"{role}.json"] = listed
        return data

    def name(self, role):
        version = "" if role == "timestamp" else f"{self.signed[role].version}."
        return f"metadata/{version}{role}.json"

    def commit(self, *roles, **options):
        for role in (*roles, "snapshot", "timestamp"):
            self.issue(role, **options.get(role, {}))

    def add(self, role, path, data, custom=None):
        """Sign a file and upload it."""
        info = TargetFile.from_data(path, data, ["sha256"])
        if custom is not None:
            info.unrecognized_fields["custom"] = custom
        self.signed[role].targets[path] = info
        self.write(f"targets/{info.get_prefixed_paths()[0]}", data)
        return info

    def payload(self, data):
        """Where in the store a released file lies."""
        path = self.target(data)
        return f"targets/{path.replace('model.fpk', f'{digest(data)}.model.fpk')}"

    def target(self, data):
        return f"models/demo/{digest(data)[:16]}/model.fpk"

    def publish(self, data, *, base=None, delta=None, custom=None, commit=None, **changes):
        """Release a file and point the channel at it; `changes` are made to the channel."""
        self.counter += 1
        target = changes.get("target", self.target(data))
        signed = {"release_counter": self.counter, "hardware_ids": [HARDWARE], **(custom or {})}
        self.add("release", target, data, signed)
        deltas = []
        if base is not None:
            path = f"models/demo/{digest(data)[:16]}/from-{digest(base)[:16]}.fpd"
            self.add("release", path, make_delta(base, data) if delta is None else delta)
            deltas = [{"from_sha256": digest(base), "target": path}]
        rollout = {"salt": "9f", "percent_bp": 10000, "cohorts": [], "not_before": ""}
        self.point(
            {
                "schema": 1,
                "name": "demo",
                "hardware": HARDWARE,
                "channel": CHANNEL,
                "release_counter": self.counter,
                "target": target,
                "sha256": digest(data),
                "n_bytes": len(data),
                "deltas": deltas,
                "rollout": {**rollout, "halted": False, **changes.pop("rollout", {})},
                "health": changes.pop("health", None) or health(data),
                "run": "",
                **changes,
            }
        )
        self.commit("release", "rollout", **(commit or {}))

    def point(self, said):
        self.add("rollout", CHANNEL_FILE, json.dumps(said).encode())
