"""From a network to the graph and the integers that its file holds.

The graph is ONNX, because every runtime reads it. Batch-norm after a convolution disappears: its
factor goes into the convolution's steps, which costs nothing, and its offset into the bias. What is
left are integers and steps for every tensor of floats.

A weight with a codebook is gathered from its levels, by an index for each weight. Indices count
from the level nearest zero, below it downwards: most are small, and the coder takes them for the
integers they are. ONNX's Gather counts negative indices from the end, so the levels below are
stored there.

Kernels that are multiples of templates are gathered by an index for each kernel, multiplied and
added to; the factors and offsets are integers with the steps of their row, so batch-norm folds into
these. Layers with equal templates read one tensor. Indices count from the template that is used the
most, and a kernel without a factor has index 0, since any would do.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from filterpress.activations import Activated
from filterpress.codec import QuantizedTensor, quantize, snap
from filterpress.errors import ModelError
from filterpress.forms import LinearKernels
from filterpress.representations import (
    form_of,
    has_codebook,
    has_linear_kernels,
    indices_of,
    integers_of,
    is_quantized,
    latent_weight,
    levels_of,
    roundings,
    step_of,
    without_quantization,
)
from filterpress.surgery import layers

OPSET = 17
DEFAULT_LEVELS = 127  # of a weight that no stage has quantised: 8 bits a row
BIAS_LEVELS = 64  # steps in a typical bias; its error is then far below that of the weights
CONSTANT_LEVELS = 2**15 - 1  # of other constants
TEMPLATE_STEP = 2.0**-6  # of templates of unit norm; its error is far below what they leave
INT8 = 127  # largest integer of a weight behind rounded inputs


class Weight(NamedTuple):
    """A weight on the way into the file."""

    integers: NDArray[np.int32]
    step: NDArray[np.float64]  # (O,)


class Shared(NamedTuple):
    """A weight with a codebook, on the way into the file."""

    indices: NDArray[np.int32]  # from the level nearest zero on
    levels: NDArray[np.float32]  # from the one nearest zero up, then those below it


class Multiples(NamedTuple):
    """A weight of multiples of templates, on the way into the file."""

    indices: NDArray[np.int32]  # (O, I)
    templates: NDArray[np.float32]  # (K, kh, kw)
    factors: Weight  # (O, I, 1, 1)
    offsets: Weight  # (O, I, 1, 1)


def to_graph(
    model: nn.Module, input_shape: tuple[int, int, int]
) -> tuple[onnx.ModelProto, dict[str, QuantizedTensor]]:
    """Turn a network into an ONNX graph and the integers of its tensors.

    Args:
        model: Network, possibly with quantised layers; a layer that is not is rounded to 8 bits.
        input_shape: ``(C, H, W)``.

    Returns:
        The graph, whose input ``images`` is ``(n, C, H, W)`` and whose output is ``outputs``, and
        the tensors of its floating-point initialisers by name.

    Raises:
        ModelError: A weight is not finite, or the network cannot be exported.
    """
    weights, shared, multiples = {}, {}, {}
    for name, layer in layers(model).items():
        _check_finite(f"weights of {name}", latent_weight(layer))
        if has_codebook(layer):
            shared[f"{name}.weight"] = _indices(layer)
        elif has_linear_kernels(layer):
            multiples[f"{name}.weight"] = _multiples(layer)
        else:
            weights[f"{name}.weight"] = _integers(layer)
    graph = _export(model, input_shape)
    values = _resolve(graph)
    tensors = _gather(graph, shared, values)
    made, templates = _multiply(graph, multiples, weights, values)
    tensors |= templates
    parts: dict[str, tuple[str, ...]] = {name: (name,) for name in weights}
    tensors |= _fold_norms(graph, weights, parts | made, values)
    behind = {f"{n}.layer.weight" for n, m in model.named_modules() if isinstance(m, Activated)}
    tensors |= _dequantize(graph, {n: w for n, w in weights.items() if n in behind}, values)
    used = _read(graph)
    for name in [name for name in values if name in used and name not in tensors]:
        if name in weights:
            tensors[name] = QuantizedTensor(weights[name].integers, snap(weights[name].step))
        elif values[name].dtype == np.float32:
            tensors[name] = _constant(name, values[name])
    _rename(graph, values, used)
    return graph, tensors


def _integers(layer: nn.Module) -> Weight:
    if is_quantized(layer):
        integers, step = integers_of(layer), step_of(layer)
    else:
        weight = latent_weight(layer)
        largest = weight.flatten(1).abs().amax(dim=1)
        step = torch.where(largest > 0, largest / DEFAULT_LEVELS, 1.0)
        integers = torch.round(weight / step.view(-1, *[1] * (weight.ndim - 1)))
    return Weight(integers.int().cpu().numpy(), step.double().cpu().numpy())


def _indices(layer: nn.Module) -> Shared:
    """Count the levels of a codebook, in order of size, from the one nearest zero."""
    levels, order = levels_of(layer).detach().cpu().sort()
    zero = int(levels.abs().argmin())
    ranks = order.argsort()[indices_of(layer).cpu()] - zero
    return Shared(ranks.int().numpy(), levels.roll(-zero).numpy())


def _multiples(layer: nn.Module) -> Multiples:
    """Round the factors and offsets of a layer, and leave no index where there is no factor."""
    form = form_of(layer)
    if not isinstance(form, LinearKernels):
        raise ValueError(f"layer must have linear kernels, got {layer}")
    parts = []
    for name, rounding in roundings(layer).items():
        integers = rounding.integers(layer.get_parameter(name).detach())[..., None, None]
        step = rounding.step.double().cpu().numpy()
        parts.append(Weight(integers.int().cpu().numpy(), step))
    indices = np.where(parts[0].integers[..., 0, 0] != 0, indices_of(layer).cpu().numpy(), 0)
    templates = form.templates.values.detach().cpu().numpy()
    return Multiples(indices.astype(np.int32), templates, *parts)


def _check_finite(what: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise ModelError(f"the {what} must be finite, got NaN or infinity")


def _export(model: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Export with all weights as named initialisers and batch-norm as nodes of its own."""
    bare = without_quantization(model, rounded=True).cpu()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # The exporter by tracing: ten times faster than the one by torch.export, and it keeps
            # the names of parameters, on which all of this rests.
            torch.onnx.export(
                bare,
                (torch.zeros(2, *input_shape),),
                file,  # type: ignore[arg-type]  # the exporter by tracing takes a file, too
                dynamo=False,
                opset_version=OPSET,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                input_names=["images"],
                output_names=["outputs"],
                dynamic_axes={"images": {0: "n"}, "outputs": {0: "n"}},
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"the network cannot be exported to ONNX: {error}") from error
    return onnx.load_from_string(file.getvalue())


def _resolve(graph: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Undo the exporter's sharing of equal initialisers; return the initialisers by name."""
    values = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    norms = [node for node in graph.graph.node if node.op_type == "BatchNormalization"]
    of_norms = {name for node in norms for name in node.input}
    nodes = []
    for node in graph.graph.node:
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Constant" and node.output[0] in of_norms:  # without parameters
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type not in ("Identity", "Dropout") or node.output[0] == "outputs":
            nodes.append(node)
        else:
            _redirect(graph, node.output[0], node.input[0])
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return values


def _redirect(graph: onnx.ModelProto, old: str, new: str) -> None:
    """Let every reader of one value read another."""
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _gather(
    graph: onnx.ModelProto, shared: dict[str, Shared], values: dict[str, NDArray[np.generic]]
) -> dict[str, QuantizedTensor]:
    """Let nodes gather weights from levels; return the tensors that they gather by and from."""
    tensors = {}
    for name in [name for name in shared if name in _read(graph)]:
        indices, levels = shared[name]
        levels_name = f"{name.removesuffix('weight')}levels"
        _redirect(graph, name, f"{name}:gathered")
        _insert(graph, _gathering(name, levels_name))
        tensors[name] = QuantizedTensor(indices, snap(1.0))
        tensors[levels_name] = _constant(levels_name, levels, fine=True)
        values[name], values[levels_name] = indices.astype(np.float32), levels
    return tensors


def _multiply(
    graph: onnx.ModelProto,
    multiples: dict[str, Multiples],
    weights: dict[str, Weight],
    values: dict[str, NDArray[np.generic]],
) -> tuple[dict[str, tuple[str, ...]], dict[str, QuantizedTensor]]:
    """Let nodes make kernels of templates, factors and offsets.

    Returns:
        For each weight that nodes make, the names of its factors and offsets, which are added to
        the weights; and the tensors of indices and templates.
    """
    made: dict[str, tuple[str, ...]] = {}
    tensors, known = {}, dict[bytes, str]()
    for name in [name for name in multiples if name in _read(graph)]:
        indices, templates, factors, offsets = multiples[name]
        base = name.removesuffix("weight")
        table = known.setdefault(templates.tobytes(), f"{base}templates")
        result, parts = f"{base}kernels", (f"{base}factors", f"{base}offsets")
        _redirect(graph, name, result)
        shapes, scaled = f"{name}:gathered", f"{name}:scaled"
        multiplied = onnx.helper.make_node("Mul", [shapes, parts[0]], [scaled])
        added = onnx.helper.make_node("Add", [scaled, parts[1]], [result])
        _insert(graph, [*_gathering(name, table), multiplied, added])
        made[result] = parts
        weights |= zip(parts, (factors, offsets), strict=True)
        values |= {part: weights[part].integers.astype(np.float32) for part in parts}
        values[name], values[table] = indices.astype(np.float32), templates
        tensors[name] = QuantizedTensor(indices, snap(1.0))
        tensors[table] = quantize(templates, snap(TEMPLATE_STEP))
    return made, tensors


def _gathering(name: str, table: str) -> list[onnx.NodeProto]:
    """Make nodes that look an initialiser's values up in a table."""
    whole = f"{name}:indices"
    return [
        onnx.helper.make_node("Cast", [name], [whole], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("Gather", [table, whole], [f"{name}:gathered"]),
    ]


def _insert(graph: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Put nodes in front of all others."""
    for node in reversed(nodes):
        graph.graph.node.insert(0, node)


def _read(graph: onnx.ModelProto) -> set[str]:
    """Return the names of the values that nodes read."""
    return {name for node in graph.graph.node for name in node.input}


def _dequantize(
    graph: onnx.ModelProto, weights: dict[str, Weight], values: dict[str, NDArray[np.generic]]
) -> dict[str, QuantizedTensor]:
    """Let nodes multiply integers with their steps; return the tensors of both.

    ONNX Runtime would round floating-point weights between integers to one step a layer.
    """
    tensors = {}
    for name in [name for name in weights if name in _read(graph)]:
        integers, steps = weights[name]
        if np.abs(integers).max() > INT8:
            raise ModelError(f"{name} must have integers of 8 bits behind rounded inputs")
        scale, narrow, made = (f"{name}:{part}" for part in ("steps", "integers", "made"))
        _redirect(graph, name, made)
        cast = onnx.helper.make_node("Cast", [name], [narrow], to=onnx.TensorProto.INT8)
        product = onnx.helper.make_node("DequantizeLinear", [narrow, scale], [made], axis=0)
        _insert(graph, [cast, product])
        tensors[name] = QuantizedTensor(integers, snap(1.0))
        tensors[scale] = QuantizedTensor(np.ones(len(steps), np.int32), snap(steps))
        values |= {name: integers.astype(np.float32), scale: steps.astype(np.float32)}
    return tensors


def _fold_norms(
    graph: onnx.ModelProto,
    weights: dict[str, Weight],
    parts: Mapping[str, tuple[str, ...]],
    values: dict[str, NDArray[np.generic]],
) -> dict[str, QuantizedTensor]:
    """Fold batch-norm into the convolution before it, or reduce it to a factor and an offset.

    ``parts`` says of each value that a convolution may read which weights it is the sum of.

    Returns:
        The factors of those that could not be folded. Filters with hardly any weights left have
        some that are hundreds of times the others, so each is rounded for itself, as steps are.
    """
    makers = {output: node for node in graph.graph.node for output in node.output}
    readers: dict[str, int] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    folded, factors = [], {}
    for node in graph.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        gamma, beta, mean, variance = (values[n].astype(np.float64) for n in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        conv = makers.get(node.input[0])
        if (
            conv is not None
            and conv.op_type == "Conv"
            and conv.input[1] in parts
            # neither the feature map nor the weight serves anything else
            and readers[node.input[0]] == readers[conv.input[1]] == 1
        ):
            name = conv.input[1]
            bias = values[conv.input[2]].astype(np.float64) if len(conv.input) > 2 else 0.0
            for part in parts[name]:
                weights[part] = _scaled(weights[part], factor)
            bias_name = "".join(name.rpartition(".")[:2]) + "bias"
            values[bias_name] = ((bias - mean) * factor + beta).astype(np.float32)
            del conv.input[2:]
            conv.input.append(bias_name)
            _redirect(graph, node.output[0], node.input[0])
            folded.append(node)
        else:
            steps = snap(np.where(factor == 0, 1.0, np.abs(factor)))
            factors[node.input[1]] = QuantizedTensor(np.sign(factor).astype(np.int32), steps)
            values[node.input[1]] = factor.astype(np.float32)
            values[node.input[2]] = (beta - mean * factor).astype(np.float32)
            values[node.input[3]] = np.zeros_like(values[node.input[3]])
            values[node.input[4]] = np.ones_like(values[node.input[4]])
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 0.0
    for node in folded:
        graph.graph.node.remove(node)
    return factors


def _scaled(weight: Weight, factor: NDArray[np.float64]) -> Weight:
    """Multiply rows by a factor of any sign: the size goes into the step."""
    sign = np.sign(factor).astype(np.int32).reshape(-1, *[1] * (weight.integers.ndim - 1))
    step = np.where(factor == 0, 1.0, np.abs(factor) * weight.step)
    return Weight(weight.integers * sign, step)


def _constant(name: str, value: NDArray[np.generic], *, fine: bool = False) -> QuantizedTensor:
    """Round a bias or another constant to a step of its own, fine ones to 16 bits."""
    value = value.astype(np.float32)
    _check_finite(f"values of {name}", torch.from_numpy(value))
    largest = float(np.abs(value).max(initial=0.0))
    if largest == 0:
        return quantize(value, snap(1.0))
    if value.ndim == 1 and not fine:
        typical = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
        return quantize(value, snap(max(typical / BIAS_LEVELS, largest / CONSTANT_LEVELS)))
    return quantize(value, snap(largest / CONSTANT_LEVELS))


def _rename(graph: onnx.ModelProto, values: dict[str, NDArray[np.generic]], used: set[str]) -> None:
    """Keep what the file needs: used initialisers, and short names for all other values."""
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in values.items() if name in used
    )
    short = {"images": "images", "outputs": "outputs"} | {name: name for name in values}
    for node in graph.graph.node:
        node.name = ""
        node.doc_string = ""
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name:
                    names[i] = short.setdefault(name, str(len(short)))
    del graph.graph.value_info[:]
    del graph.metadata_props[:]
    graph.producer_name = "filterpress"
    graph.producer_version = ""
    graph.doc_string = ""
    graph.graph.name = "network"
