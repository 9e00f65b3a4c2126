"""Measure a network by the file that ships: decode it and run what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from filterpress import codec, package
from filterpress.codec.graph import to_onnx
from filterpress.progress import progress
from filterpress.tasks import Predict, Task
from filterpress.training import best_device, predictor

if TYPE_CHECKING:
    pass

Json = dict[str, Any]


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
        only ever reported.
    """
    run = runner(encoded)
    with progress("evaluate", task.size("validation") + task.size("test")) as advance:

        def predict(images: Tensor) -> Tensor:
            advance(len(images))
            return run(images)

        return {
            "n_bytes": len(encoded),
            "validation_accuracy": task.score(predict, "validation"),
            "accuracy": task.score(predict, "test"),
        }


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


def layer_rows(encoded: bytes) -> list[Json]:
    """List the weights in an encoded file, with their shapes and estimated bytes."""
    rows = []
    for name, tensor in codec.decode(encoded).tensors.items():
        if tensor.integers.ndim < 2:
            continue
        bits = codec.estimate_bits(tensor.integers)
        rows.append(
            {
                "name": name.removesuffix(".weight"),
                "shape": list(tensor.integers.shape),
                "n_bytes": round(bits / 8),
                "baseline_bytes": 4 * tensor.integers.size,
                "bits_per_weight": round(bits / max(1, tensor.integers.size), 3),
            }
        )
    return rows
