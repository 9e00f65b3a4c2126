"""What changes from one file to another, for a device that has the one and needs the other.

Encoding gives the same bytes everywhere, so a delta need not speak of bytes. Tensors whose payloads
are equal are copied. Of the others, the integers of the old file are written as multiples of the
new steps, and what is left to the new integers goes through the same coder as a tensor; it is
mostly zeros. The device adds, encodes again, and has the new file byte for byte. A tensor for which
that is no shorter travels whole.

Only the compressed metadata is not made again but carried as it is: its LZMA stream depends on the
version of liblzma. ``docs/bitstream.md`` describes the format to the byte.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filterpress.codec import bitstream
from filterpress.codec.binarisation import encode_tensor
from filterpress.codec.bitstream import (
    DIGEST_BYTES,
    Entry,
    read_bytes,
    read_integers,
    read_metadata,
    read_number,
    take_apart,
    with_digest,
    without_digest,
    write_number,
)
from filterpress.codec.quantizer import (
    MAX_EXPONENT,
    MAX_MAGNITUDE,
    MIN_EXPONENT,
    restep,
)
from filterpress.errors import BitstreamError

MAGIC = b"FPD\x02"
_OLD = slice(len(MAGIC), len(MAGIC) + DIGEST_BYTES)
_NEW = slice(_OLD.stop, _OLD.stop + DIGEST_BYTES)
_COPY, _DIFFERENCE, _WHOLE = range(3)

_N_EXPONENTS = MAX_EXPONENT - MIN_EXPONENT + 1


class _Tensor(NamedTuple):
    """A tensor of a file, its payload still coded."""

    entry: Entry
    payload: bytes


def make_delta(old: bytes, new: bytes, max_bytes: int = 2**30) -> bytes:
    """Write what `apply_delta` needs to make one file from another.

    Args:
        old: The whole file that the receiver has.
        new: The whole file that the receiver shall have.
        max_bytes: As for `decode`.

    Returns:
        The delta, the same bytes for the same two files; hardly ever longer than the new file.

    Raises:
        BitstreamError: One of the files is damaged or larger than allowed.

    Example:
        >>> import numpy as np
        >>> from filterpress.codec import apply_delta, encode, make_delta, quantize, snap
        >>> weight = np.random.default_rng(0).normal(size=(64, 64))
        >>> old = encode({"w": quantize(weight, snap(0.25))}, b"", {})
        >>> new = encode({"w": quantize(weight + 0.01, snap(0.25))}, b"", {})
        >>> delta = make_delta(old, new)
        >>> apply_delta(old, delta) == new, len(delta) < len(new) / 5
        (True, True)
    """
    old_metadata, known = _tensors_of(old, max_bytes)
    metadata, tensors = _tensors_of(new, max_bytes)
    same = metadata.packed == old_metadata.packed
    changes = [_describe(known.get(name), tensor) for name, tensor in tensors.items()]
    digests = old[-DIGEST_BYTES:], new[-DIGEST_BYTES:]
    packed = write_number(0) if same else metadata.packed
    return with_digest(b"".join((MAGIC, *digests, packed, *changes)))


def apply_delta(old: bytes, delta: bytes, max_bytes: int = 2**30) -> bytes:
    """Make the new file from the old one and a delta.

    Args:
        old: The whole file that the delta was made for.
        delta: What `make_delta` returned.
        max_bytes: Of the decoded tensors of each file as float32. Working memory is at most about
            eight times as much.

    Returns:
        The new file, byte for byte.

    Raises:
        BitstreamError: The delta is truncated, damaged, hostile, of another version or for another
            file, the old file is damaged, or one of the files is larger than allowed.
    """
    body = without_digest(delta, MAGIC, "delta")
    metadata, known = _tensors_of(old, max_bytes)
    if body[_OLD] != old[-DIGEST_BYTES:]:
        raise BitstreamError(
            "the delta is for another file: it changes the one whose last bytes are "
            f"{body[_OLD].hex()}, not {old[-DIGEST_BYTES:].hex()}"
        )
    length, at = read_number(body, _NEW.stop)
    if length:
        metadata, at = read_metadata(body, _NEW.stop, max_bytes)
    payloads = []
    for entry in metadata.entries:
        payload, at = _read_payload(body, at, entry, known.get(entry.name))
        payloads.append(payload)
    if at != len(body):
        raise BitstreamError(f"the delta goes on for {len(body) - at} bytes after its last tensor")
    new = with_digest(b"".join((bitstream.MAGIC, metadata.packed, *payloads)))
    if body[_NEW] != new[-DIGEST_BYTES:]:
        raise BitstreamError("the delta does not make the file that it promises")
    return new


def _tensors_of(data: bytes, max_bytes: int) -> tuple[bitstream.Metadata, dict[str, _Tensor]]:
    metadata, payloads = take_apart(data, max_bytes)
    tensors = map(_Tensor, metadata.entries, payloads)
    return metadata, {tensor.entry.name: tensor for tensor in tensors}


def _describe(old: _Tensor | None, new: _Tensor) -> bytes:
    """Return a tensor in the shortest of the three ways."""
    whole = bytes([_WHOLE]) + new.payload
    if old is None or not _alike(old.entry, new.entry):
        return whole
    if old.payload == new.payload:
        return bytes([_COPY])
    integers, exponents = read_integers(new.entry, new.payload)
    known, known_exponents = read_integers(old.entry, old.payload)
    change = integers - restep(known, known_exponents, exponents)
    if np.abs(change).max(initial=0) > MAX_MAGNITUDE:
        return whole
    coded = encode_tensor(change, _wrapped(exponents - known_exponents))
    difference = bytes([_DIFFERENCE]) + write_number(len(coded)) + coded
    return min(whole, difference, key=len)


def _read_payload(body: bytes, at: int, new: Entry, old: _Tensor | None) -> tuple[bytes, int]:
    """Return the payload of a tensor of the new file, and the position after what makes it."""
    kind, at = body[at : at + 1], at + 1
    if kind == bytes([_WHOLE]):
        payload, at = body[at : at + new.n_bytes], at + new.n_bytes
    elif kind not in (bytes([_COPY]), bytes([_DIFFERENCE])):
        raise BitstreamError(f"tensor {new.name!r}: the delta ends or is of an unknown kind here")
    elif old is None or not _alike(old.entry, new):
        raise BitstreamError(f"tensor {new.name!r}: the old file has none of this name and shape")
    elif kind == bytes([_COPY]):
        payload = old.payload
    else:
        coded, at = read_bytes(body, at)
        payload = _changed(old, coded)
    if len(payload) != new.n_bytes:
        raise BitstreamError(
            f"tensor {new.name!r}: {new.n_bytes} bytes are declared, {len(payload)} are made"
        )
    return payload, at


def _changed(old: _Tensor, coded: bytes) -> bytes:
    """Return the payload of a tensor after a coded change."""
    change, exponents = read_integers(old.entry, coded)  # first: hostile ones end early
    known, known_exponents = read_integers(old.entry, old.payload)
    exponents = _wrapped(known_exponents + exponents)
    integers = restep(known, known_exponents, exponents) + change
    if np.abs(integers).max(initial=0) > MAX_MAGNITUDE:
        raise BitstreamError(f"tensor {old.entry.name!r}: the change leads out of ±{MAX_MAGNITUDE}")
    return encode_tensor(integers, exponents)


def _alike(old: Entry, new: Entry) -> bool:
    """Say whether tensors have as many integers and steps, in the same order."""
    return (old.shape, old.per_row) == (new.shape, new.per_row)


def _wrapped(exponents: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return exponents, or differences of them, modulo the size of the grid."""
    return np.asarray((exponents - MIN_EXPONENT) % _N_EXPONENTS + MIN_EXPONENT, np.int32)
