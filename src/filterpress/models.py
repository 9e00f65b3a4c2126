"""The networks that a run can train and compress.

=============================  =====================================================================
``small``                      95 thousand parameters, for images of 8 to 32 pixels; trains in
                               seconds
``resnet20``                   He et al. 2016, section 4.2, with projections in the shortcuts
``torchvision:NAME``           any classifier of torchvision, without weights
``package.module:function``    the user's own; called with (input_shape, n_classes)
=============================  =====================================================================
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from filterpress._user_code import load_function
from filterpress.errors import ModelError

MAX_BYTES = 2**31 - 1  # of weights: files are made by way of ONNX, which holds no more
_RESIDUAL = {"small": ((24, 48), 2), "resnet20": ((16, 32, 64), 3)}
_TORCHVISION = "torchvision:"


def build(
    model: str, input_shape: tuple[int, int, int], n_classes: int, *, seed: int = 0
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        model: A name that this module's documentation lists.
        input_shape: (C, H, W) of one image.
        n_classes: Number of outputs.
        seed: Decides the weights; the global generator is left as it was.

    Returns:
        The network, in float32 and in training mode.

    Raises:
        ValueError: There is no such network.
        ModelError: The network cannot be built, has more weights than a file can be made of, does
            not take such images, or gives something else than one output a class.

    Example:
        >>> sum(p.numel() for p in build("resnet20", (3, 32, 32), 10).parameters())
        272474
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = find(model)(input_shape, n_classes)
    if not isinstance(network, nn.Module):
        raise ModelError(f"{model} must return a torch.nn.Module, got {type(network).__name__}")
    if bound := [n for n, m in network.named_modules() if parametrize.is_parametrized(m)]:
        raise ModelError(f"{model} must have no parametrised layers, got {bound[0]}: remove them")
    network.float()
    n_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    if n_bytes > MAX_BYTES:
        raise ModelError(
            f"{model} must have at most {MAX_BYTES} bytes of weights, as ONNX holds no more, "
            f"got {n_bytes}: choose a smaller network"
        )
    _check_shapes(network, model, input_shape, n_classes)
    return network.train()


def find(model: str) -> Callable[[tuple[int, int, int], int], Any]:
    """Find what builds a network, without building it.

    Args:
        model: A name that this module's documentation lists.

    Returns:
        A function of the input shape and the number of classes.

    Raises:
        ValueError: There is no such network.
    """
    if model in _RESIDUAL:
        return partial(_residual, *_RESIDUAL[model])
    if ":" not in model:
        known = ", ".join([*_RESIDUAL, "torchvision:NAME", "package.module:function"])
        raise ValueError(f"model must be one of {known}, got {model!r}")
    if model.startswith(_TORCHVISION):
        return _torchvision_classifier(model)
    return partial(_users_own, model, load_function("model", model))


def _users_own(
    model: str,
    function: Callable[..., Any],
    input_shape: tuple[int, int, int],
    n_classes: int,
) -> Any:
    try:
        return function(input_shape, n_classes)
    except Exception as error:
        raise ModelError(f"{model} failed: {type(error).__name__}: {error}") from error


def _check_shapes(
    network: nn.Module, model: str, input_shape: tuple[int, int, int], n_classes: int
) -> None:
    shape = "x".join(map(str, input_shape))
    try:
        with torch.inference_mode():
            outputs = network.eval()(torch.zeros(2, *input_shape))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{model} does not take images of {shape} ({reason}); set image_size or another model"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (2, n_classes):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelError(f"{model} must give outputs of shape (2, {n_classes}), got {got}")


def _residual(
    widths: Sequence[int], depth: int, input_shape: tuple[int, int, int], n_classes: int
) -> nn.Module:
    return ResidualNet(input_shape[0], widths, depth, n_classes)


class ResidualNet(nn.Module):
    """A stem of 3 x 3, stages of residual blocks that halve the image, the mean, a linear layer.

    Reference: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.
    Shortcuts that change the shape are projections (option B), so that they can be compressed.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], depth: int, n_classes: int) -> None:
        super().__init__()
        self.stem = _convolution(in_channels, widths[0], 3)
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(depth):
                blocks.append(_Block(before, width, stride=2 if stage and not block else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, n_classes)."""
        features = self.blocks(F.relu(self.stem(images)))
        return self.classifier(features.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.first = _convolution(in_channels, out_channels, 3, stride)
        self.second = _convolution(out_channels, out_channels, 3)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity() if same else _convolution(in_channels, out_channels, 1, stride)
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.shortcut(features) + self.second(F.relu(self.first(features))))


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _torchvision_classifier(model: str) -> Callable[[tuple[int, int, int], int], nn.Module]:
    from filterpress._torchvision import torchvision  # slow to import

    models, name = torchvision.models, model.removeprefix(_TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"model must be torchvision: and one of {', '.join(known)}, got {model!r}")
    # The extra heads of the two Inception networks serve training only.
    inception = name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": True} if inception else {}

    def classifier(input_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
        network: nn.Module = models.get_model(name, weights=None, num_classes=n_classes, **options)
        if input_shape[0] != 3:
            _adapt_first_convolution(network, input_shape[0])
        return network

    return classifier


def _adapt_first_convolution(network: nn.Module, in_channels: int) -> None:
    name, old = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule(name, new)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a network, in place.

    Args:
        module: The network; untouched if the checkpoint is refused.
        path: ``.safetensors``, or what ``torch.save`` wrote of a state dict, also as
            ``{"state_dict": …}`` and with the names that DataParallel gives (``module.…``).

    Raises:
        ModelError: The file is missing, damaged or holds other objects than tensors; its names or
            shapes do not fit the network; or a weight is not finite.
    """
    path = Path(path)
    weights = _read_weights(path)
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{path} does not fit the network: {'; '.join(problems[:3])}{more}")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{name} in {path} has NaN or infinite values; take another checkpoint"
            )
    module.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no file of weights {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says what there is to say
            found: Any = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors and is refused, for it could run code; "
            "save model.state_dict() alone"
        ) from error
    # torch.load meets a file that is none with whatever its bytes happen to break
    except (OSError, EOFError, LookupError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path} is no readable file of weights ({reason})") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ModelError(f"{path} holds no state dict; save model.state_dict()")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
