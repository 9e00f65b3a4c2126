"""Fuzz the decoder and deltas, guided by coverage. A script; `test_fuzz.py` runs it for a minute.

    python tests/codec/fuzz_decode.py FOLDER [-max_total_time=60 and other options of libFuzzer]

``FOLDER`` gets small honest files as seeds, and keeps what else is found to lead to new code. The
first byte of an input says what the rest is: a file or a delta as it is, or one whose digest, or
whose digest and LZMA stream, are put right, so that mutations reach what lies behind them. Anything
but a result or `BitstreamError` is a crash, and so is a file that is read but would be written
otherwise.

Coverage is that of the Python code. The modules that numba compiles are left as they are: inputs
reach them, but they do not guide them.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import sys
import warnings
from pathlib import Path

import atheris
import numpy as np

COMPILED = [
    f"filterpress.codec.{name}" for name in ("arithmetic", "binarisation", "contexts", "integers")
]
with atheris.instrument_imports(include=["filterpress"], exclude=COMPILED):
    from filterpress.codec import apply_delta, decode, encode, make_delta, quantize, snap
    from filterpress.codec.bitstream import read_bytes, read_number
    from filterpress.errors import BitstreamError

MAX_BYTES = 2**16
LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 2**22, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273}]


def number(value: int) -> bytes:
    """Return a number as in a file."""
    low, rest = value % 128, value // 128
    return bytes([low + 128]) + number(rest) if rest else bytes([low])


def signed(body: bytes) -> bytes:
    """Return bytes with their digest."""
    return body + hashlib.sha256(body).digest()[:16]


def packed(metadata: bytes) -> bytes:
    """Return metadata as in a file, with its two lengths."""
    stream = lzma.compress(metadata, lzma.FORMAT_RAW, filters=LZMA)
    return number(len(metadata)) + number(len(stream)) + stream


def unpacked(data: bytes) -> tuple[bytes, bytes]:
    """Return the metadata that comes after its length of two bytes, and what follows it."""
    end = 2 + int.from_bytes(data[:2], "big")
    return data[2:end], data[end:]


def opened(data: bytes, start: int) -> bytes:
    """Return what `unpacked` reads, of a file or delta whose metadata begins at ``start``."""
    _, at = read_number(data, start)
    stream, end = read_bytes(data, at)
    metadata = lzma.decompress(stream, lzma.FORMAT_RAW, filters=LZMA)
    return len(metadata).to_bytes(2, "big") + metadata + data[end:-16]


def samples() -> tuple[bytes, bytes]:
    """Return two small files with most of what a file can have."""
    random = np.random.default_rng(0)
    conv = quantize(random.normal(0, 1, (3, 2, 3, 3)), snap([0.2, 0.3, 0.4]))
    wide, empty = quantize(random.normal(0, 900, 5), snap(1)), quantize(np.zeros((0, 2)), snap(1))
    other = conv._replace(integers=conv.integers + (random.random(conv.integers.shape) < 0.1))
    old = encode({"conv": conv, "empty": empty, "wide": wide}, b"graph", {"a": [1, None, "ö"]})
    new = encode({"conv": other, "new": wide, "wide": wide}, b"graph", {})
    return old, new


OLD, NEW = samples()
DELTA = make_delta(OLD, NEW)
SEEDS = OLD, OLD[:-16], opened(OLD, 4), DELTA, DELTA[:-16], opened(DELTA, 36)


def file(data: bytes) -> None:
    """Decode a file as it is."""
    decode(data, MAX_BYTES)


def body(data: bytes) -> None:
    """Decode a file without its digest."""
    decode(signed(data), MAX_BYTES)


def content(data: bytes) -> None:
    """Decode a file of metadata and payloads; what is read is what `encode` writes."""
    metadata, payloads = unpacked(data)
    whole = signed(b"FPK\x03" + packed(metadata) + payloads)
    if encode(*decode(whole, MAX_BYTES)) != whole:
        raise AssertionError("a file was read that encode would have written otherwise")


def delta(data: bytes) -> None:
    """Apply a delta as it is."""
    apply_delta(OLD, data, MAX_BYTES)


def delta_body(data: bytes) -> None:
    """Apply a delta without its digest."""
    apply_delta(OLD, signed(data), MAX_BYTES)


def change(data: bytes) -> None:
    """Apply a delta of metadata and changes, which promises the file `NEW`."""
    metadata, changes = unpacked(data)
    head = b"FPD\x02" + OLD[-16:] + NEW[-16:]
    made = apply_delta(OLD, signed(head + packed(metadata) + changes), MAX_BYTES)
    if made != NEW:
        raise AssertionError("a delta made another file than it promised")


TARGETS = (file, body, content, delta, delta_body, change)


def one_input(data: bytes) -> None:
    """Give an input to the target that its first byte names."""
    with contextlib.suppress(BitstreamError):
        TARGETS[data[0] % len(TARGETS) if data else 0](data[1:])


def main() -> None:
    """Write the seeds and fuzz until the options say so."""
    folder = Path(sys.argv[1])
    for number_of_target, seed in enumerate(SEEDS):
        (folder / f"seed-{number_of_target}").write_bytes(bytes([number_of_target]) + seed)
        one_input(bytes([number_of_target]) + seed)
    warnings.simplefilter("error")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
