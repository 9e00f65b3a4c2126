"""What is in a package or an encoded file, layer by layer; read without torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from filterpress import codec
from filterpress.errors import PackageError

Row = dict[str, Any]

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1}


def describe(path: Path) -> Row:
    """Describe a package or an encoded file.

    Args:
        path: Package directory, or file made by ``evaluate``.

    Returns:
        ``kind``, ``n_bytes``, ``header`` with what it says, and ``tensors``, one row each.

    Raises:
        PackageError: The directory is no package.
        BitstreamError: The file is damaged or of another format.
    """
    return _describe_package(path) if path.is_dir() else _describe_file(path)


def _describe_package(path: Path) -> Row:
    weights = path / "weights.safetensors"
    try:
        header = json.loads((path / "model.json").read_bytes())
        with weights.open("rb") as file:
            (n_header_bytes,) = struct.unpack("<Q", file.read(8))
            tensors = json.loads(file.read(min(n_header_bytes, weights.stat().st_size)))
        stages = [entry["stage"] for entry in header["history"]]
        rows = [_tensor_row(name, t) for name, t in tensors.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise PackageError(f"{path} is not a package that can be read: {error}") from error
    known = {key: header.get(key) for key in ("model", "input_shape", "n_classes", "baseline")}
    return {
        "kind": "package",
        "n_bytes": weights.stat().st_size,
        "header": {**known, "stages": stages},
        "tensors": rows,
    }


def _tensor_row(name: str, tensor: Row) -> Row:
    shape = tensor["shape"]
    n_bytes = math.prod(shape) * _BYTES.get(tensor["dtype"], 1)
    return {"name": name, "shape": shape, "type": tensor["dtype"], "n_bytes": n_bytes}


def _describe_file(path: Path) -> Row:
    data = path.read_bytes()
    decoded = codec.decode(data)
    rows = []
    for name, tensor in decoded.tensors.items():
        n_bits = float(codec.estimate_bits(tensor.integers))
        rows.append(
            {
                "name": name,
                "shape": list(tensor.integers.shape),
                "zeros": float((tensor.integers == 0).mean()) if tensor.integers.size else 0.0,
                "bits_a_weight": n_bits / max(1, tensor.integers.size),
                "n_bytes": math.ceil(n_bits / 8),
            }
        )
    return {
        "kind": "encoded file",
        "n_bytes": len(data),
        "header": dict(decoded.header),
        "tensors": rows,
    }
