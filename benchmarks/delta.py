"""Measure deltas between encoded networks, beside what general tools make of the same two files.

    python benchmarks/delta.py

Networks have random weights, Gaussian in each row, rounded to 4 bits. The new file differs from the
old one in a share of the weights, moved one step up or down by chance, or is of the same weights
rounded otherwise. ``bsdiff4`` and ``zstandard`` (``--patch-from`` at level 19) from the ``bench``
extra see the two files and, because coded files share hardly any bytes, also the integers as one
byte each, without steps and graph. Results go to ``benchmarks/results/delta.json``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import bsdiff4
import numpy as np
import zstandard
from numpy.typing import NDArray

from filterpress import export, models
from filterpress.codec import QuantizedTensor, apply_delta, encode, make_delta, quantize, snap
from filterpress.codec.graph import strip

RESULTS = Path(__file__).parent / "results" / "delta.json"
NETWORKS = {"ResNet-20": ("resnet20", 32), "ResNet-18": ("torchvision:resnet18", 224)}
SHARES = (0.01, 0.05, 0.20)
BITS = 4
VARIANTS = {"steps 3 % wider": (BITS, 1.03), "of 3 bits": (3, 1.0)}
SPREAD = 3.0  # of a row, in standard deviations, from 0 to the largest integer

Tensors = dict[str, QuantizedTensor]


def gaussian(tensors: Tensors) -> dict[str, NDArray[np.float64]]:
    """Return Gaussian weights, rows of unequal strength, for all that is no bias."""
    random = np.random.default_rng(0)
    shapes = {name: t.integers.shape for name, t in tensors.items() if t.integers.ndim > 1}
    return {
        name: random.normal(0, 1, shape)
        * np.exp(random.normal(-3, 0.3, (shape[0], *[1] * (len(shape) - 1))))
        for name, shape in shapes.items()
    }


def rounded(
    tensors: Tensors, weights: dict[str, NDArray[np.float64]], bits: int, wider: float
) -> Tensors:
    """Return the tensors of a network with these weights, with one step a row."""
    largest = 2 ** (bits - 1) - 1
    found = dict(tensors)
    for name, weight in weights.items():
        step = snap(wider * SPREAD / largest * weight.reshape(len(weight), -1).std(axis=1))
        integers = np.clip(quantize(weight, step).integers, -largest, largest)
        found[name] = QuantizedTensor(integers, step)
    return found


def moved(tensors: Tensors, share: float) -> Tensors:
    """Return the tensors with a share of the weights moved by one."""
    random = np.random.default_rng(1)

    def change(integers: NDArray[np.int32]) -> NDArray[np.int32]:
        sign = random.choice(np.int32([-1, 1]), integers.shape)
        return np.asarray(integers + sign * (random.random(integers.shape) < share))

    return {
        name: tensor._replace(integers=change(tensor.integers))
        if tensor.integers.ndim > 1
        else tensor
        for name, tensor in tensors.items()
    }


def entropy(tensors: Tensors, share: float) -> int:
    """Return the bytes that say which weights moved and in which direction."""
    n = sum(tensor.integers.size for tensor in tensors.values() if tensor.integers.ndim > 1)
    bits = -share * np.log2(share) - (1 - share) * np.log2(1 - share) + share
    return round(n * bits / 8)


def patched(old: bytes, new: bytes) -> int:
    """Return the bytes of ``zstd -19 --patch-from``."""
    settings = zstandard.ZstdCompressionParameters.from_level(
        19, window_log=27, enable_ldm=True, source_size=len(new), dict_size=len(old)
    )
    known = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return len(zstandard.ZstdCompressor(dict_data=known, compression_params=settings).compress(new))


def as_bytes(tensors: Tensors) -> bytes:
    """Return the integers, one byte each."""
    return b"".join(t.integers.astype(np.int8).tobytes() for t in tensors.values())


def measure(before: Tensors, after: Tensors, graph: bytes) -> dict[str, float]:
    """Make a file and what changes of it, and see whether the delta gives the file."""
    old, new = (encode(tensors, graph, {"model": "benchmark"}) for tensors in (before, after))
    started = time.process_time()
    delta = make_delta(old, new)
    made = time.process_time()
    if apply_delta(old, delta) != new:
        raise SystemExit("a delta did not give the file")
    applied = time.process_time()
    return {
        "file": len(new),
        "delta": len(delta),
        "bsdiff4": len(bsdiff4.diff(old, new)),
        "zstd": patched(old, new),
        "bsdiff4_of_integers": len(bsdiff4.diff(as_bytes(before), as_bytes(after))),
        "zstd_of_integers": patched(as_bytes(before), as_bytes(after)),
        "seconds_to_make": round(made - started, 2),
        "seconds_to_apply": round(applied - made, 2),
    }


def row(network: str, change: str, r: dict[str, float | None]) -> str:
    """Lay one result out as the row of a table."""
    least = r["entropy"]
    over = f"{r['delta'] / least:.4f}" if r["delta"] and least else "-"
    names = (
        "file",
        "delta",
        "entropy",
        "bsdiff4",
        "zstd",
        "bsdiff4_of_integers",
        "zstd_of_integers",
    )
    sizes = " | ".join(f"{r[name]:,}" if r[name] else "-" for name in names)
    return f"| {network} | {change} | {sizes} | {over} |"


def main() -> None:
    """Measure every change of every network and print a table."""
    results: dict[str, dict[str, dict[str, float | None]]] = {}
    print(
        "| network | change | file | delta | entropy | bsdiff4 | zstd | both of integers | | over |"
    )
    for network, (model, size) in NETWORKS.items():
        shape = (3, size, size)
        exported, drawn = export.to_graph(models.build(model, shape, 10).eval(), shape)
        graph, weights = strip(exported, drawn), gaussian(drawn)
        before = rounded(drawn, weights, BITS, 1.0)
        changes = {f"{share:.0%} moved": (moved(before, share), share) for share in SHARES}
        for name, (bits, wider) in VARIANTS.items():
            changes[name] = rounded(drawn, weights, bits, wider), None
        results[network] = {}
        for change, (after, share) in changes.items():
            least = entropy(before, share) if share else None
            results[network][change] = {**measure(before, after, graph), "entropy": least}
            print(row(network, change, results[network][change]), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
