"""ONNX graphs whose weights travel apart: take them out, put them back.

The file carries the graph once, without the weights, and the weights as integers, with their names
and shapes. `strip` also drops what no runtime reads (documentation, node names, inferred shapes)
and shortens the names of intermediate values, which are most of a small network's graph.

Nothing here touches the file system: graphs that refer to data outside themselves are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import count

import onnx
from google.protobuf.message import (  # type: ignore[import-untyped]
    DecodeError,
    EncodeError,
    Message,
)
from onnx import numpy_helper

from filterpress.codec.bitstream import decode
from filterpress.codec.quantizer import QuantizedTensor
from filterpress.errors import BitstreamError


def strip(model: onnx.ModelProto, names: Collection[str]) -> bytes:
    """Return a graph without some of its initializers.

    IR version, operator sets, inputs, outputs, nodes and every other initializer stay.

    Args:
        model: A model that keeps its data in itself. It is not changed.
        names: Of the initializers to take out; float32 each.

    Returns:
        The serialised graph, the same bytes for the same model.

    Raises:
        ValueError: A name is no float32 initializer, or the model refers to external data.
    """
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    if _refers_outside(stripped):
        raise ValueError("model must keep its data in itself, got a reference to external data")
    weights = {weight.name: weight for weight in stripped.graph.initializer}
    for name in sorted(names):
        if name not in weights or weights[name].data_type != onnx.TensorProto.FLOAT:
            raise ValueError(f"names must be float32 initializers of the model, got {name!r}")
    _drop_comments(stripped)
    _shorten_names(stripped.graph)
    for name in names:
        stripped.graph.initializer.remove(weights[name])
    return bytes(stripped.SerializeToString(deterministic=True))


def fill(graph: bytes, tensors: Mapping[str, QuantizedTensor]) -> onnx.ModelProto:
    """Return the model of a stripped graph with its weights put back as float32.

    Args:
        graph: What `strip` returned.
        tensors: The weights that were taken out, by name.

    Returns:
        A model that `onnx.checker` accepts.

    Raises:
        BitstreamError: The graph is damaged, refers to external data, lacks a tensor, has no use
            for one, or is refused by the checker.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(graph)
    except DecodeError as error:
        raise BitstreamError("the graph is not an ONNX model") from error
    if _refers_outside(model):
        raise BitstreamError("the graph refers to external data, which is never read")
    kept = [weight.name for weight in model.graph.initializer]
    if len({*kept, *tensors}) != len(kept) + len(tensors) or not tensors.keys() <= _read(model):
        raise BitstreamError("the tensors of the file are not those of its graph")
    model.graph.initializer.extend(
        numpy_helper.from_array(tensor.dequantize(), name) for name, tensor in tensors.items()
    )
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, EncodeError) as error:
        raise BitstreamError(f"the graph is not a valid ONNX model: {error}") from error
    return model


def to_onnx(data: bytes) -> bytes:
    """Turn an encoded file into an ONNX model, the same bytes for the same file.

    Args:
        data: A file written by `encode`, with a graph from `strip`.

    Returns:
        The serialised model, its weights float32.

    Raises:
        BitstreamError: The file or its graph is damaged.
    """
    decoded = decode(data)
    return bytes(fill(decoded.graph, decoded.tensors).SerializeToString(deterministic=True))


def _messages(message: Message) -> Iterator[Message]:
    """Yield a message and every message inside it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _messages(inner)


def _read(model: onnx.ModelProto) -> set[str]:
    """Return the names of the values that nodes read."""
    return {
        name
        for message in _messages(model)
        if isinstance(message, onnx.NodeProto)
        for name in message.input
    }


def _refers_outside(model: onnx.ModelProto) -> bool:
    return any(
        isinstance(message, onnx.TensorProto)
        and (message.data_location != onnx.TensorProto.DEFAULT or message.external_data)
        for message in _messages(model)
    )


def _drop_comments(model: onnx.ModelProto) -> None:
    """Remove what people read and runtimes do not."""
    for field in ("producer_name", "producer_version", "model_version", "domain"):
        model.ClearField(field)
    model.graph.ClearField("value_info")
    for message in _messages(model):
        for field in ("doc_string", "metadata_props"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
        if isinstance(message, onnx.NodeProto):
            message.ClearField("name")


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Number the values that nodes hand to nodes, unless something else could name them."""
    subgraphs = sum(isinstance(message, onnx.GraphProto) for message in _messages(graph)) - 1
    if subgraphs or graph.quantization_annotation:
        return
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    produced = {name for node in graph.node for name in node.output if name} - kept
    numbers = (str(n) for n in count() if str(n) not in kept)
    short: dict[str, str] = {}
    for node in graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                if name in produced:
                    short[name] = short.get(name) or next(numbers)
                    values[i] = short[name]
