"""A package: a directory that holds one network and what is known of it.

```
model.json           how to build the network, its baseline and the history of its stages
weights.safetensors  its tensors
report.json          what the last stage reported
model.fpk            the encoded file, once a stage has evaluated the network
```

Nothing is ever pickled. Packages carry no times and no paths: the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from filterpress import codec, models
from filterpress.activations import Activated, ActivationQuantizer
from filterpress.codec.graph import strip
from filterpress.errors import PackageError
from filterpress.export import to_graph
from filterpress.representations import (
    Chain,
    ChannelOrder,
    check_form,
    describe_form,
    take_form_,
    tie_templates_,
    without_quantization,
)
from filterpress.surgery import layers

FORMAT = 2
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A network in memory, and what is known of it.

    Attributes:
        network: The network, in evaluation mode.
        model: Name of what it was built from, see `models.build`.
        input_shape: ``(C, H, W)``.
        n_classes: Number of outputs.
        inputs: What a user of the file must know of its images: ``mean`` and ``std`` of each
            channel.
        baseline: What the trained network had: ``n_bytes``, ``accuracy``, ``validation_accuracy``,
            ``n_parameters``, ``macs``.
        history: The reports of the stages so far.
    """

    network: nn.Module
    model: str
    input_shape: tuple[int, int, int]
    n_classes: int
    inputs: Json = field(default_factory=dict)
    baseline: Json = field(default_factory=dict)
    history: tuple[Json, ...] = ()

    def after(self, network: nn.Module, report: Json) -> Package:
        """Return the package that a stage makes of this one."""
        return replace(self, network=network, history=(*self.history, report))


def save(package: Package, out: Path) -> None:
    """Write a package into a directory that exists; see `files.new_directory`.

    Args:
        package: What to write.
        out: The directory.
    """
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in package.network.state_dict().items()
    }
    weights = save_tensors(state)
    description = {
        "format": FORMAT,
        "model": package.model,
        "input_shape": list(package.input_shape),
        "n_classes": package.n_classes,
        "inputs": package.inputs,
        "layers": describe_changes(package),
        "forms": {
            n: form for n, m in package.network.named_modules() if (form := describe_form(m))
        },
        "baseline": package.baseline,
        "history": list(package.history),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    (out / "weights.safetensors").write_bytes(weights)
    (out / "model.json").write_text(_dump(description))
    (out / "report.json").write_text(_dump(package.history[-1] if package.history else {}))


def load(path: Path) -> Package:
    """Read a package.

    Raises:
        PackageError: There is none, or it is damaged or of another format.
    """
    description = read_description(path)
    try:
        weights = (path / "weights.safetensors").read_bytes()
    except OSError as error:
        raise PackageError(f"{path} is no package: {error.strerror} weights.safetensors") from error
    if hashlib.sha256(weights).hexdigest() != description["weights_sha256"]:
        raise PackageError(f"{path}/weights.safetensors is damaged: its digest is another one")
    try:
        channels, height, width = description["input_shape"]
        shape = (int(channels), int(height), int(width))
        network = models.build(description["model"], shape, description["n_classes"]).eval()
        for name, layer in description["layers"].items():
            network.set_submodule(name, construct(layer))
        state = load_tensors(weights)
        for name, form in description["forms"].items():
            take_form_(network.get_submodule(name), form)
        network.load_state_dict(state)
        for name in description["forms"]:
            check_form(name, network.get_submodule(name))
        tie_templates_(network)
        history = tuple(description["history"])
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PackageError(f"{path} does not describe a network: {reason}") from error
    return Package(
        network=network.eval(),
        model=description["model"],
        input_shape=shape,
        n_classes=description["n_classes"],
        inputs=description["inputs"],
        baseline=description["baseline"],
        history=history,
    )


def read_description(path: Path) -> Json:
    """Read ``model.json`` of a package, without its weights.

    Raises:
        PackageError: There is none, or it is damaged or of another format.
    """
    try:
        description = json.loads((path / "model.json").read_bytes())
    except OSError as error:
        raise PackageError(f"{path} is no package: {error.strerror} model.json") from error
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path}/model.json is damaged: {error}") from error
    wanted = {"format", "model", "input_shape", "n_classes", "inputs", "layers", "baseline"}
    wanted |= {"history", "forms", "weights_sha256"}
    if not isinstance(description, dict) or not wanted <= set(description):
        raise PackageError(f"{path}/model.json is damaged: it must hold {sorted(wanted)}")
    if description["format"] != FORMAT:
        raise PackageError(
            f"{path} must be of package format {FORMAT}, got {description['format']!r}: "
            "use the filterpress that wrote it"
        )
    return description


def _dump(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def describe_changes(package: Package) -> dict[str, Json]:
    """Describe the layers that differ from those of the network it was built from."""
    source = models.build(package.model, package.input_shape, package.n_classes)
    original = {n: describe(m) for n, m in source.named_modules()}
    changed: dict[str, Json] = {}
    for name, module in package.network.named_modules():
        inside = any(name.startswith(f"{other}.") for other in changed)
        found = describe(module)
        if found and not inside and original.get(name) != found:
            changed[name] = found
    return changed


def describe(module: nn.Module) -> Json:
    """Describe a layer that a stage may change or put in, as JSON; ``{}`` for any other module."""
    match module:
        case Chain():
            return {"kind": "chain", "parts": [describe(part) for part in module]}
        case Activated():
            return {"kind": "activated", "parts": [describe(part) for part in module]}
        case ActivationQuantizer():
            return {
                "kind": "quantizer",
                "scale": module.scale,
                "zero_point": module.zero_point,
                "bits": module.bits,
            }
        case ChannelOrder():
            return {"kind": "order", "channels": len(module.index)}
        case nn.Conv2d():
            return {
                "kind": "conv",
                "in": module.in_channels,
                "out": module.out_channels,
                "kernel": list(module.kernel_size),
                "stride": list(module.stride),
                "padding": module.padding
                if isinstance(module.padding, str)
                else list(module.padding),
                "dilation": list(module.dilation),
                "groups": module.groups,
                "bias": module.bias is not None,
                "padding_mode": module.padding_mode,
            }
        case nn.Linear():
            bias = module.bias is not None
            return {
                "kind": "linear",
                "in": module.in_features,
                "out": module.out_features,
                "bias": bias,
            }
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return {
                "kind": type(module).__name__.lower(),
                "channels": module.num_features,
                "eps": module.eps,
                "momentum": module.momentum,
                "affine": module.affine,
            }
        case nn.Identity():
            return {"kind": "identity"}
    return {}


def construct(layer: Json) -> nn.Module:
    """Build the layer that `describe` described, without its weights.

    Raises:
        ValueError: The description is of no known kind.
    """

    def pair(key: str) -> tuple[int, int]:
        first, second = layer[key]
        return int(first), int(second)

    match layer.get("kind"):
        case "chain":
            return Chain(*(construct(part) for part in layer["parts"]))
        case "activated":
            return Activated(*(construct(part) for part in layer["parts"]))
        case "quantizer":
            return ActivationQuantizer(layer["scale"], layer["zero_point"], layer["bits"])
        case "order":
            return ChannelOrder(torch.arange(layer["channels"]))
        case "conv":
            padding = layer["padding"]
            return nn.Conv2d(
                layer["in"],
                layer["out"],
                pair("kernel"),
                pair("stride"),
                padding if isinstance(padding, str) else pair("padding"),
                pair("dilation"),
                layer["groups"],
                layer["bias"],
                layer["padding_mode"],
            )
        case "linear":
            return nn.Linear(layer["in"], layer["out"], layer["bias"])
        case "batchnorm1d" | "batchnorm2d":
            kind = nn.BatchNorm1d if layer["kind"] == "batchnorm1d" else nn.BatchNorm2d
            return kind(layer["channels"], layer["eps"], layer["momentum"], layer["affine"])
        case "identity":
            return nn.Identity()
    raise ValueError(f"kind must be that of a known layer, got {layer.get('kind')!r}")


def encode(package: Package, network: nn.Module) -> bytes:
    """Encode a network, with what a package knows of it, into the bytes that travel.

    Args:
        package: Where the description comes from.
        network: The network, the package's own or what a stage made of it.

    Returns:
        The encoded file; its length is what storage budgets speak of.
    """
    graph, tensors = to_graph(network, package.input_shape)
    header = {
        "writer": f"filterpress {version('filterpress')}",
        "model": package.model,
        "input_shape": list(package.input_shape),
        "n_classes": package.n_classes,
        **package.inputs,
    }
    return codec.encode(tensors, strip(graph, tensors), header)


def least_bytes(package: Package) -> int:
    """Return what the file of a network needs for everything but its weights."""
    empty = without_quantization(package.network, rounded=True)  # a step must not become zero
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            if tensor.is_floating_point():
                tensor.zero_()
    return len(encode(package, empty))


def count(network: nn.Module, input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Count the parameters of a network and its multiply-accumulates for one image."""
    macs = macs_by_layer(network, input_shape)
    return sum(p.numel() for p in network.parameters()), sum(macs.values())


def macs_by_layer(network: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Count the multiply-accumulates of each layer that is used for one image."""
    macs: dict[str, int] = {}

    def listen(name: str, layer: nn.Module) -> RemovableHandle:
        def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            positions = output[0, 0].numel() if output.ndim > 2 else 1
            macs[name] = macs.get(name, 0) + positions * layer.weight.numel()  # type: ignore[operator]

        return layer.register_forward_hook(add)

    handles = [listen(name, layer) for name, layer in layers(network).items()]
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *input_shape))
    finally:
        for handle in handles:
            handle.remove()
    return macs
