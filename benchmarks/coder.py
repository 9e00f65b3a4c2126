"""Code the same integers with filterpress and with nncodec's DeepCABAC, side by side.

    python benchmarks/coder.py --data-dir DIR [--nncodec FOLDER] [--out runs/coder]

Three networks are trained (once; they stay in ``--out``), and every weight tensor is rounded per
output channel to symmetric integers of 2, 3, 4, 5 and 8 bits. nncodec is a folder made by

    pip install --no-deps --target FOLDER nncodec==2.1.3

Its parameter optimisation and row skipping are on, and its size is the least over the lengths of
its unary part in ``UNARY``; its speed is that of its default. Dependent quantisation is off: it
would give other integers. The step of a tensor, which nncodec's bits lack, is not counted in ours.
Speeds are the best of three in processor time, on one core. Results go to
``benchmarks/results/coder.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from filterpress.codec.binarisation import decode_tensor, encode_tensor

RESULTS = Path(__file__).parent / "results" / "coder.json"
BITS = (2, 3, 4, 5, 8)
UNARY, DEFAULT_UNARY = (1, 5, 11, 16), 11
REPEATS = 3
STEP_BITS = 13
NETWORKS = {
    "small": ["--model", "small", "--data", "digits"],
    "ResNet-20": [
        *("--model", "resnet20", "--data", "fashion-mnist"),
        *("--config", '{"epochs": 3}'),
    ],
    "ResNet-18": [
        *("--model", "torchvision:resnet18", "--data", "fashion-mnist"),
        *("--config", '{"epochs": 2, "lr": 0.05}'),
    ],
}

Integers = NDArray[np.int32]


class Coder(NamedTuple):
    """A coder of one tensor: to bytes, and from bytes and a shape."""

    encode: Callable[[Integers], Any]
    decode: Callable[[Any, tuple[int, ...]], Integers]


def ours() -> Coder:
    """Return our coder, with the one step that a tensor has at least."""
    step = np.zeros((), np.int32)
    return Coder(
        lambda q: encode_tensor(q, step), lambda data, shape: decode_tensor(data, shape, 1)[0]
    )


def nncodec(folder: Path, unary: int) -> Coder:
    """Return nncodec's coder; the extension alone, which needs none of nncodec's requirements."""
    (path,) = folder.glob("nncodec/extensions/deepCABAC.*")
    loader = ExtensionFileLoader("deepCABAC", str(path))
    cabac: Any = module_from_spec(spec_from_loader("deepCABAC", loader))  # type: ignore[arg-type]
    loader.exec_module(cabac)
    no_history = cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8)

    def encode(integers: Integers) -> Any:
        coder = cabac.Encoder()
        coder.initCtxModels(unary, 1)
        rows = (~integers.reshape(len(integers), -1).any(axis=1)).astype(np.int32)
        coder.encodeLayer(integers, 0, 0, 1, 0, int(rows.any()), rows, *no_history, 0, 0)
        return coder.finish()

    def decode(data: Any, shape: tuple[int, ...]) -> Integers:
        coder, integers = cabac.Decoder(), np.zeros(shape, np.int32)
        coder.setStream(data)
        coder.initCtxModels(unary)
        coder.decodeLayer(integers, 0, 0, 1, 0, *no_history, 0, 0)
        return integers

    return Coder(encode, decode)


def trained(name: str, data_dir: str, out: Path) -> dict[str, NDArray[np.float32]]:
    """Return the weights of a network by name, trained if it is not in ``out`` yet."""
    folder = out / name.lower()
    if not folder.exists():
        command = [sys.executable, "-m", "filterpress", "train", *NETWORKS[name]]
        where = [] if "digits" in NETWORKS[name] else ["--data-dir", data_dir]
        subprocess.run([*command, *where, "--out", str(folder), "--seed", "0"], check=True)
    state = load_file(folder / "weights.safetensors")
    return {key: value for key, value in state.items() if value.ndim > 1}


def rounded(weight: NDArray[np.float32], bits: int) -> Integers:
    """Round each row to the integers of so many bits, its largest magnitude to the largest."""
    rows = weight.reshape(len(weight), -1)
    largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30)
    integers = np.rint(rows / largest * (2 ** (bits - 1) - 1))
    return np.asarray(integers.astype(np.int32).reshape(weight.shape))


def order_0(integers: Integers) -> float:
    """Return the entropy of a tensor's histogram in bits, which costs nothing to know."""
    counts = np.unique(integers, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def sizes(coder: Coder, tensors: list[Integers]) -> NDArray[np.int64]:
    """Return the bits of each tensor, after a look at whether it comes back."""
    coded = [coder.encode(q) for q in tensors]
    for q, data in zip(tensors, coded, strict=True):
        if not np.array_equal(coder.decode(data, q.shape), q):
            raise SystemExit("a tensor did not come back as it was")
    return np.array([8 * len(data) for data in coded])


def speeds(coder: Coder, tensors: list[Integers]) -> dict[str, float]:
    """Return million weights a second, in both directions."""
    coded = [coder.encode(q) for q in tensors]
    pairs = list(zip(coded, tensors, strict=True))
    encode = _seconds(lambda: [coder.encode(q) for q in tensors])
    decode = _seconds(lambda: [coder.decode(data, q.shape) for data, q in pairs])
    n_million = sum(q.size for q in tensors) / 1e6
    return {"encode": round(n_million / encode, 2), "decode": round(n_million / decode, 2)}


def _seconds(job: Callable[[], object]) -> float:
    def once() -> float:
        started = time.process_time()
        job()
        return time.process_time() - started

    return min(once() for _ in range(REPEATS))


def measure(
    weights: dict[str, NDArray[np.float32]], bits: int, folder: Path | None
) -> dict[str, Any]:
    """Code one network at one width with both coders."""
    tensors = [rounded(weight, bits) for weight in weights.values()]
    entropies = np.array([order_0(q) for q in tensors])
    mine = sizes(ours(), tensors) - STEP_BITS
    above = [n for n, a, b in zip(weights, mine, entropies, strict=True) if a > b]
    result = {
        "weights": sum(q.size for q in tensors),
        "bits": int(mine.sum()),
        "order_0_bits": round(entropies.sum()),
        "nncodec_bits": None,
        "above_order_0": above,
        "million_weights_a_second": speeds(ours(), tensors),
        "nncodec_million_weights_a_second": None,
    }
    if folder:
        theirs = np.min([sizes(nncodec(folder, n), tensors) for n in UNARY], axis=0)
        result["nncodec_bits"] = int(theirs.sum())
        fast = nncodec(folder, DEFAULT_UNARY)
        result["nncodec_million_weights_a_second"] = speeds(fast, tensors)
    return result


def row(name: str, bits: str, r: dict[str, Any]) -> str:
    """Lay one result out as the row of a table."""
    size, theirs = r["bits"], r["nncodec_bits"]
    mine, other = r["million_weights_a_second"], r["nncodec_million_weights_a_second"]
    ratio = f"{size / theirs:.4f}" if theirs else "-"
    speed = f"{other['encode']:.1f} / {other['decode']:.1f}" if other else "-"
    return (
        f"| {name} | {bits} | {size / r['weights']:.4f} | {ratio} "
        f"| {size / r['order_0_bits']:.4f} | {len(r['above_order_0'])} "
        f"| {mine['encode']:.1f} / {mine['decode']:.1f} | {speed} |"
    )


def main() -> None:
    """Train what is missing, code everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--nncodec", type=Path, help="folder of an installed nncodec")
    parser.add_argument("--out", type=Path, default=Path("runs/coder"), help="folder of networks")
    given = parser.parse_args()
    if not given.nncodec:
        print("without nncodec: pip install --no-deps --target FOLDER nncodec, --nncodec FOLDER")
    sizes(ours(), [np.arange(-40, 40, dtype=np.int32).reshape(2, 40)])  # compiles the coder
    results: dict[str, dict[str, Any]] = {}
    print("| network | bits | a weight | of nncodec | of order 0 | above | M weights/s | nncodec |")
    for name in NETWORKS:
        weights = trained(name, given.data_dir, given.out)
        results[name] = {}
        for bits in BITS:
            results[name][str(bits)] = measure(weights, bits, given.nncodec)
            print(row(name, str(bits), results[name][str(bits)]), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
