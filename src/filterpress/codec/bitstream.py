"""The file: tensors as integers and steps, the graph that uses them, and a header.

``docs/bitstream.md`` describes the format to the byte. The digest is checked first, every declared
size before memory is taken for it, and a file that is not what `encode` writes for its content is
refused. Only the bytes of the LZMA stream may differ from one version of liblzma to the next.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from filterpress.codec.binarisation import decode_tensor, encode_tensor
from filterpress.codec.quantizer import (
    MAX_MAGNITUDE,
    QuantizedTensor,
    from_exponents,
    to_exponents,
)
from filterpress.errors import BitstreamError

MAGIC = b"FPK\x03"
DIGEST_BYTES = 16
MAX_METADATA = 2**26
MAX_DIMS = 5
_MAX_NUMBER_BYTES = 5
_LZMA: list[dict[str, int]] = [
    {"id": lzma.FILTER_LZMA1, "dict_size": 2**22, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273}
]


class Decoded(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: By name, in the order of the names.
        graph: The bytes that were given to `encode`.
        header: JSON values by name.
    """

    tensors: dict[str, QuantizedTensor]
    graph: bytes
    header: dict[str, Any]


class Stream(NamedTuple):
    """What a file holds, its tensors still to be decoded.

    Attributes:
        tensors: Names and tensors, in the order of the names; decoded one by one as they are taken.
        graph: The bytes that were given to `encode`.
        header: JSON values by name.
    """

    tensors: Iterator[tuple[str, QuantizedTensor]]
    graph: bytes
    header: dict[str, Any]


class Entry(NamedTuple):
    """A line of the tensor table.

    Attributes:
        name: Of the tensor.
        shape: Of its integers.
        per_row: Whether each index of axis 0 has its own step.
        n_bytes: Of its payload.
    """

    name: str
    shape: tuple[int, ...]
    per_row: bool
    n_bytes: int


class Metadata(NamedTuple):
    """What a file says before its payloads.

    Attributes:
        packed: As it is in the file, with its two lengths.
        header: JSON values by name.
        entries: The tensor table.
        graph: The bytes that were given to `encode`.
    """

    packed: bytes
    header: dict[str, Any]
    entries: list[Entry]
    graph: bytes


def encode(
    tensors: Mapping[str, QuantizedTensor], graph: bytes, header: Mapping[str, Any]
) -> bytes:
    """Write tensors, a graph and a header as one file.

    Args:
        tensors: By name. Integers within ±2**20, up to five dimensions, steps on the grid of
            `snap`; any size, also none.
        graph: Any bytes; an ONNX graph without weights.
        header: JSON values by name: None, booleans, finite numbers, text, lists, dictionaries.

    Returns:
        The file, the same bytes for equal arguments in any order.

    Raises:
        ValueError: An argument is outside these bounds.

    Example:
        >>> import numpy as np
        >>> from filterpress.codec import decode, encode, quantize, snap
        >>> weight = quantize(np.ones((2, 3), np.float32), snap(0.5))
        >>> decode(encode({"w": weight}, b"", {"epoch": 3})).header
        {'epoch': 3}
    """
    entries, payloads = [], []
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].encode()):
        exponents = _checked_exponents(name, tensor)
        payloads.append(encode_tensor(tensor.integers, exponents))
        shape = tensor.integers.shape
        entries.append(Entry(name, shape, exponents.ndim > 0, len(payloads[-1])))
    text = _json(header).encode()
    if json.loads(text) != dict(header):
        raise ValueError(f"header must be JSON with text as keys, got {header!r}")
    metadata = write_number(len(text)) + text + _write_table(entries) + graph
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"graph must be at most {MAX_METADATA} bytes with the header")
    packed = lzma.compress(metadata, lzma.FORMAT_RAW, filters=_LZMA)
    return with_digest(
        b"".join((MAGIC, write_number(len(metadata)), write_number(len(packed)), packed, *payloads))
    )


def decode(data: bytes, max_bytes: int = 2**30) -> Decoded:
    """Read a file that `encode` wrote.

    Args:
        data: The whole file.
        max_bytes: Of the decoded tensors as float32. Working memory is at most about four times
            as much.

    Returns:
        What was given to `encode`, the tensors in the order of their names.

    Raises:
        BitstreamError: The file is truncated, damaged, hostile, of another version, larger than
            allowed, or not what `encode` writes for its content.
    """
    tensors, graph, header = stream(data, max_bytes)
    return Decoded(dict(tensors), graph, header)


def stream(data: bytes, max_bytes: int = 2**30) -> Stream:
    """Check a file that `encode` wrote, and read its tensors one by one, as they are asked for.

    Args:
        data: The whole file.
        max_bytes: As for `decode`. Working memory is about four times the largest tensor, and what
            the caller keeps.

    Returns:
        Header and graph, and an iterator over the tensors, which raises `BitstreamError` where one
        of them is not what `encode` writes.

    Raises:
        BitstreamError: As for `decode`; what is wrong with a tensor is not seen yet.

    Example:
        >>> import numpy as np
        >>> from filterpress.codec import encode, quantize, snap, stream
        >>> file = encode({"w": quantize(np.ones((2, 3), np.float32), snap(0.5))}, b"", {})
        >>> [(name, tensor.integers.sum()) for name, tensor in stream(file).tensors]
        [('w', np.int64(12))]
    """
    metadata, payloads = take_apart(data, max_bytes)
    tensors = (
        (entry.name, _read_tensor(entry, payload))
        for entry, payload in zip(metadata.entries, payloads, strict=True)
    )
    return Stream(tensors, metadata.graph, metadata.header)


def take_apart(data: bytes, max_bytes: int) -> tuple[Metadata, list[bytes]]:
    """Return the metadata of a file and the payloads of its tensors, still coded.

    Args:
        data: The whole file.
        max_bytes: Of the decoded tensors as float32.

    Raises:
        BitstreamError: As for `decode`; what is wrong with a payload is not seen yet.
    """
    body = without_digest(data, MAGIC, "file")
    metadata, at = read_metadata(body, len(MAGIC), max_bytes)
    ends = list(accumulate((entry.n_bytes for entry in metadata.entries), initial=at))
    if ends[-1] != len(body):
        raise BitstreamError(
            f"the tensors should take {ends[-1] - at} bytes, but {len(body) - at} are there"
        )
    return metadata, [body[start:end] for start, end in pairwise(ends)]


def with_digest(body: bytes) -> bytes:
    """Return bytes with the digest that tells damage after them."""
    return body + _digest(body)


def without_digest(data: bytes, magic: bytes, kind: str) -> bytes:
    """Return what `with_digest` was given, if it starts with ``magic`` and is not damaged.

    Args:
        data: What `with_digest` returned.
        magic: First bytes, the version last.
        kind: What this is, for the error.

    Raises:
        BitstreamError: It starts differently or is damaged.
    """
    if not data.startswith(magic):
        raise BitstreamError(
            f"this is no filterpress {kind} of version {magic[-1]}: it starts differently"
        )
    body = data[:-DIGEST_BYTES]
    if _digest(body) != data[-DIGEST_BYTES:]:
        raise BitstreamError(f"the {kind} is truncated or damaged: its digest does not match")
    return body


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:DIGEST_BYTES]


def _checked_exponents(name: str, tensor: QuantizedTensor) -> NDArray[np.int32]:
    """Return the exponents of a tensor's steps, or say what is wrong with the tensor."""
    integers, scale = tensor
    if (
        integers.dtype != np.int32
        or integers.ndim > MAX_DIMS
        or max(integers.shape, default=0) >= 2**31
    ):
        raise ValueError(
            f"integers of {name!r} must be int32 of up to {MAX_DIMS} dimensions below 2**31, "
            f"got {integers.dtype} of shape {integers.shape}"
        )
    if integers.size and max(-int(integers.min()), int(integers.max())) > MAX_MAGNITUDE:
        raise ValueError(f"integers of {name!r} must lie within ±{MAX_MAGNITUDE}")
    if scale.shape not in ((), integers.shape[:1]):
        raise ValueError(
            f"scale of {name!r} must have shape () or {integers.shape[:1]}, got {scale.shape}"
        )
    return to_exponents(scale)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(
        dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def write_number(value: int) -> bytes:
    """Return a number, seven bits a byte, lowest first, the top bit set on all but the last."""
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + write_number(rest) if rest else bytes([low])


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of up to five bytes and the position after it."""
    value = 0
    for i, byte in enumerate(data[at : at + _MAX_NUMBER_BYTES]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if i and not byte:
                raise BitstreamError("a number is written with more bytes than it needs")
            return value, at + i + 1
    raise BitstreamError("a number is cut off or too large")


def read_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    """Return bytes that come after their length, and the position after them."""
    length, at = read_number(data, at)
    if length > len(data) - at:
        raise BitstreamError(f"{length} bytes are declared where {len(data) - at} are left")
    return data[at : at + length], at + length


def read_metadata(data: bytes, start: int, max_bytes: int) -> tuple[Metadata, int]:
    """Return the metadata that begins at a position, and the position after it.

    Args:
        data: It is in there, with its two lengths.
        start: Where.
        max_bytes: Of the tensors that its table declares, as float32.

    Raises:
        BitstreamError: It is damaged or hostile, or declares more than is allowed.
    """
    length, at = read_number(data, start)
    packed, end = read_bytes(data, at)
    unpacked = _unpack(packed, length)
    header, at = _read_header(unpacked)
    entries, at = _read_table(unpacked, at)
    decoded = 4 * sum(prod(max(dim, 1) for dim in entry.shape) for entry in entries)
    if decoded > max_bytes:
        raise BitstreamError(f"the tensors take {decoded} bytes, at most {max_bytes} are allowed")
    return Metadata(data[start:end], header, entries, unpacked[at:]), end


def _unpack(packed: bytes, length: int) -> bytes:
    """Return metadata as it was before compression, if it then was of this length."""
    if length > MAX_METADATA:
        raise BitstreamError(f"{length} bytes of metadata are declared, {MAX_METADATA} are allowed")
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    try:
        metadata = unpacker.decompress(packed, max_length=length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise BitstreamError("the metadata is damaged") from error
    if len(metadata) != length or not unpacker.eof or unpacker.unused_data:
        raise BitstreamError("the metadata is not of the size declared")
    return metadata


def _read_header(metadata: bytes) -> tuple[dict[str, Any], int]:
    text, at = read_bytes(metadata, 0)
    try:
        header = json.loads(text.decode())
        canonical = isinstance(header, dict) and _json(header).encode() == text
    except (ValueError, RecursionError) as error:
        raise BitstreamError("the header is not JSON") from error
    if not canonical:
        raise BitstreamError("the header is not JSON as encode writes it")
    return header, at


def _write_table(entries: list[Entry]) -> bytes:
    table = [write_number(len(entries))]
    for entry in entries:
        name = entry.name.encode()
        dims = b"".join(map(write_number, entry.shape))
        kind = bytes([2 * len(entry.shape) + entry.per_row])
        table += [write_number(len(name)), name, kind, dims, write_number(entry.n_bytes)]
    return b"".join(table)


def _read_table(metadata: bytes, at: int) -> tuple[list[Entry], int]:
    count, at = read_number(metadata, at)
    entries: list[Entry] = []
    last = None
    for _ in range(count):
        name, at = read_bytes(metadata, at)
        kind, at = read_number(metadata, at)
        if kind > 2 * MAX_DIMS + 1 or kind == 1:
            raise BitstreamError(f"a tensor is of unknown kind {kind}")
        if last is not None and name <= last:
            raise BitstreamError("the names of the tensors are not in order")
        last, shape = name, []
        for _ in range(kind // 2):
            dim, at = read_number(metadata, at)
            shape.append(dim)
        n_bytes, at = read_number(metadata, at)
        try:
            entries.append(Entry(name.decode(), tuple(shape), bool(kind % 2), n_bytes))
        except UnicodeDecodeError as error:
            raise BitstreamError("the name of a tensor is not UTF-8") from error
    return entries, at


def read_integers(entry: Entry, data: bytes) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the integers of a tensor and the exponents of its steps, of shape () or (rows,).

    Raises:
        BitstreamError: The data is not what `encode_tensor` gives for any such tensor.
    """
    of_steps = entry.shape[:1] if entry.per_row else ()
    try:
        integers, exponents = decode_tensor(data, entry.shape, prod(of_steps))
    except BitstreamError as error:
        raise BitstreamError(f"tensor {entry.name!r}: {error}") from error
    return integers, exponents.reshape(of_steps)


def _read_tensor(entry: Entry, data: bytes) -> QuantizedTensor:
    integers, exponents = read_integers(entry, data)
    return QuantizedTensor(integers, from_exponents(exponents))
