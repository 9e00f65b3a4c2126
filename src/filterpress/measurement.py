"""Measure a network by the file that ships: decode it and run what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from filterpress import codec, package
from filterpress.activations import Activated
from filterpress.codec.graph import to_onnx
from filterpress.processes import best_device
from filterpress.progress import progress
from filterpress.representations import Chain, has_linear_kernels
from filterpress.tasks import ImageClassification, Predict, Task, share_right
from filterpress.training import predictor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Json = dict[str, Any]

PARTS = ("weight", "factors", "offsets", "templates")  # of a layer's weight in the file
SHOWN_CLASSES = 50  # more of them nobody reads as a table


def runner(encoded: bytes) -> Predict:
    """Decode a file and make the function that runs it in ONNX Runtime.

    Args:
        encoded: The file.

    Returns:
        A function from float32 images ``(N, C, H, W)`` to float32 outputs ``(N, n_classes)``.
    """
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(to_onnx(encoded), providers=providers)

    def predict(images: Tensor) -> Tensor:
        (outputs,) = session.run(None, {"images": images.cpu().numpy()})
        return torch.from_numpy(np.asarray(outputs))

    return predict


def measure(encoded: bytes, task: Task) -> Json:
    """Measure an encoded file: its bytes, and the accuracy of what it decodes to.

    Returns:
        ``n_bytes``; ``validation_accuracy``, which decides; ``accuracy`` on the test set, which is
        only ever reported; and with the built-in task of few classes their ``confusion`` there,
        ``classes`` and ``counts`` with a row a label.
    """
    run = runner(encoded)
    with progress("evaluate", task.size("validation") + task.size("test")) as advance:

        def predict(images: Tensor) -> Tensor:
            advance(len(images))
            return run(images)

        validation = task.score(predict, "validation")
        return {
            "n_bytes": len(encoded),
            "validation_accuracy": validation,
            **_tested(task, predict),
        }


def _tested(task: Task, predict: Predict) -> Json:
    """Measure on the test set, in one pass.

    Exactly the built-in class: a class made of it may score otherwise than by the counts.
    """
    if type(task) is not ImageClassification:
        return {"accuracy": task.score(predict, "test")}
    counts = task.confusion(predict, "test")
    tested: Json = {"accuracy": share_right(counts)}
    if task.n_classes <= SHOWN_CLASSES:
        tested["confusion"] = {"classes": list(task.data.classes), "counts": counts.tolist()}
    return tested


def baseline(network: nn.Module, task: Task) -> Json:
    """Measure a trained network as it is, in float32."""
    device = best_device()
    predict = predictor(network.to(device), device)
    validation, test = (task.score(predict, split) for split in ("validation", "test"))
    n_parameters, macs = package.count(network.cpu(), task.input_shape)
    return {
        "n_bytes": 4 * n_parameters,
        "validation_accuracy": validation,
        "accuracy": test,
        "n_parameters": n_parameters,
        "macs": macs,
    }


def against(measured: Json, reference: Json) -> Json:
    """Set measured numbers beside those of the trained network."""
    return measured | {
        "baseline_bytes": reference["n_bytes"],
        "baseline_accuracy": reference["accuracy"],
        "baseline_validation_accuracy": reference["validation_accuracy"],
        "ratio": reference["n_bytes"] / measured["n_bytes"],
    }


def preprocessing(task: Task) -> Json:
    """Say what a user of the file must do to an image, as far as the task knows."""
    found: Json = {}
    for name in ("mean", "std"):
        value = getattr(task, name, None)
        if isinstance(value, Tensor):
            found[name] = [float(v) for v in value.flatten()]
    return found


def layer_rows(encoded: bytes, network: nn.Module) -> list[Json]:
    """List the weights in an encoded file by layer, in the order of the network.

    Args:
        encoded: The file.
        network: The network that it holds.

    Returns:
        For each layer its ``name``, the ``shape`` of its weight, about how many ``n_bytes`` it has
        in the file, and ``bits_per_weight``. A chain of layers is one row, with the shape from
        before it was cut, its ``rank`` (the channels that a filter of its last layer reads) and its
        ``groups``. What kernels of multiples of templates are made of is one row, too; shared
        templates count for the layer that names them.
    """
    modules = dict(network.named_modules())
    place = {f"{name}.weight": number for number, name in enumerate(modules)}
    stored = codec.decode(encoded).tensors
    weights: dict[str, list[NDArray[np.int32]]] = {}
    for tensor in sorted(stored, key=lambda name: place.get(name, len(place))):
        name, _, part = tensor.rpartition(".")
        name = name if part in PARTS else tensor
        owner = name.rpartition(".")[0]
        layer = owner if isinstance(modules.get(owner), Activated | Chain) else name
        if stored[tensor].integers.ndim > 1:
            weights.setdefault(layer, []).append(stored[tensor].integers)
    return [_layer_row(layer, modules.get(layer), *parts) for layer, parts in weights.items()]


def _layer_row(name: str, layer: nn.Module | None, *parts: NDArray[np.int32]) -> Json:
    bits = sum(codec.estimate_bits(part) for part in parts)
    n_weights = sum(part.size for part in parts)
    shape, more = list(parts[0].shape), {}
    if isinstance(layer, Chain):
        first, last = parts[0], parts[-1]
        n_in = first.shape[1] * getattr(layer[0], "groups", 1)
        kernel = np.prod([part.shape[2:] for part in parts], axis=0, dtype=int).tolist()
        shape = [len(last), n_in, *kernel]
        more = {"rank": last.shape[1], "groups": len(parts[-2]) // last.shape[1]}
    elif layer is not None and has_linear_kernels(layer):
        shape, n_weights = list(layer.weight.shape), layer.weight.numel()  # type: ignore[arg-type, operator]
    return {
        "name": name,
        "shape": shape,
        "n_bytes": round(bits / 8),
        "bits_per_weight": round(bits / max(1, n_weights), 3),
        **more,
    }
