"""The file: tensors as integers and steps, the graph that uses them, and a header.

``docs/bitstream.md`` describes the format to the byte. The digest is checked first, every declared
size before memory is taken for it, and a file that is not what `encode` writes for its content is
refused. Only the bytes of the LZMA stream may differ from one version of liblzma to the next.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from filterpress.codec.binarisation import decode_tensor, encode_tensor
from filterpress.codec.quantizer import (
    MAX_MAGNITUDE,
    QuantizedTensor,
    from_exponents,
    to_exponents,
)
from filterpress.errors import BitstreamError

MAGIC = b"FPK\x02"
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


class _Entry(NamedTuple):
    """A line of the tensor table."""

    name: str
    shape: tuple[int, ...]
    per_row: bool
    n_bytes: int


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
        entries.append(_Entry(name, shape, exponents.ndim > 0, len(payloads[-1])))
    text = _json(header).encode()
    if json.loads(text) != dict(header):
        raise ValueError(f"header must be JSON with text as keys, got {header!r}")
    metadata = _number(len(text)) + text + _write_table(entries) + graph
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"graph must be at most {MAX_METADATA} bytes with the header")
    packed = lzma.compress(metadata, lzma.FORMAT_RAW, filters=_LZMA)
    body = b"".join((MAGIC, _number(len(metadata)), _number(len(packed)), packed, *payloads))
    return body + _digest(body)


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
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if not data.startswith(MAGIC):
        raise BitstreamError("this is no filterpress file of version 2: it starts differently")
    if _digest(body) != digest:
        raise BitstreamError("the file is truncated or damaged: its digest does not match")
    metadata, start = _unpack_metadata(body)
    header, at = _read_header(metadata)
    entries, at = _read_table(metadata, at)
    _check_sizes(entries, len(body) - start, max_bytes)
    tensors = {}
    for entry in entries:
        tensors[entry.name] = _read_tensor(entry, body[start : start + entry.n_bytes])
        start += entry.n_bytes
    return Decoded(tensors, metadata[at:], header)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:DIGEST_BYTES]


def _checked_exponents(name: str, tensor: QuantizedTensor) -> np.ndarray[Any, np.dtype[np.int32]]:
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


def _number(value: int) -> bytes:
    """Write a number, seven bits a byte, lowest first, the top bit set on all but the last."""
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _number(rest) if rest else bytes([low])


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of up to five bytes and the position after it."""
    value = 0
    for i, byte in enumerate(data[at : at + _MAX_NUMBER_BYTES]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if i and not byte:
                raise BitstreamError("a number is written with more bytes than it needs")
            return value, at + i + 1
    raise BitstreamError("a number is cut off or too large")


def _read_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    """Return bytes that come after their length, and the position after them."""
    length, at = _read_number(data, at)
    if length > len(data) - at:
        raise BitstreamError(f"{length} bytes are declared where {len(data) - at} are left")
    return data[at : at + length], at + length


def _unpack_metadata(body: bytes) -> tuple[bytes, int]:
    """Return header, table and graph, and the position after them."""
    length, at = _read_number(body, len(MAGIC))
    packed, at = _read_bytes(body, at)
    if length > MAX_METADATA:
        raise BitstreamError(f"{length} bytes of metadata are declared, {MAX_METADATA} are allowed")
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    try:
        metadata = unpacker.decompress(packed, max_length=length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise BitstreamError("the metadata is damaged") from error
    if len(metadata) != length or not unpacker.eof or unpacker.unused_data:
        raise BitstreamError("the metadata is not of the size declared")
    return metadata, at


def _read_header(metadata: bytes) -> tuple[dict[str, Any], int]:
    text, at = _read_bytes(metadata, 0)
    try:
        header = json.loads(text.decode())
        canonical = isinstance(header, dict) and _json(header).encode() == text
    except (ValueError, RecursionError) as error:
        raise BitstreamError("the header is not JSON") from error
    if not canonical:
        raise BitstreamError("the header is not JSON as encode writes it")
    return header, at


def _write_table(entries: list[_Entry]) -> bytes:
    table = [_number(len(entries))]
    for entry in entries:
        name = entry.name.encode()
        dims = b"".join(map(_number, entry.shape))
        kind = bytes([2 * len(entry.shape) + entry.per_row])
        table += [_number(len(name)), name, kind, dims, _number(entry.n_bytes)]
    return b"".join(table)


def _read_table(metadata: bytes, at: int) -> tuple[list[_Entry], int]:
    count, at = _read_number(metadata, at)
    entries: list[_Entry] = []
    last = None
    for _ in range(count):
        name, at = _read_bytes(metadata, at)
        kind, at = _read_number(metadata, at)
        if kind > 2 * MAX_DIMS + 1 or kind == 1:
            raise BitstreamError(f"a tensor is of unknown kind {kind}")
        if last is not None and name <= last:
            raise BitstreamError("the names of the tensors are not in order")
        last, shape = name, []
        for _ in range(kind // 2):
            dim, at = _read_number(metadata, at)
            shape.append(dim)
        n_bytes, at = _read_number(metadata, at)
        try:
            entries.append(_Entry(name.decode(), tuple(shape), bool(kind % 2), n_bytes))
        except UnicodeDecodeError as error:
            raise BitstreamError("the name of a tensor is not UTF-8") from error
    return entries, at


def _check_sizes(entries: list[_Entry], n_left: int, max_bytes: int) -> None:
    """Compare what the table declares with what is there and what is allowed."""
    declared = sum(entry.n_bytes for entry in entries)
    if declared != n_left:
        raise BitstreamError(f"the tensors should take {declared} bytes, but {n_left} are there")
    decoded = 4 * sum(prod(max(dim, 1) for dim in entry.shape) for entry in entries)
    if decoded > max_bytes:
        raise BitstreamError(f"the tensors take {decoded} bytes, at most {max_bytes} are allowed")


def _read_tensor(entry: _Entry, data: bytes) -> QuantizedTensor:
    n_steps = entry.shape[0] if entry.per_row else 1
    try:
        integers, exponents = decode_tensor(data, entry.shape, n_steps)
    except BitstreamError as error:
        raise BitstreamError(f"tensor {entry.name!r}: {error}") from error
    return QuantizedTensor(integers, from_exponents(exponents if entry.per_row else exponents[0]))
