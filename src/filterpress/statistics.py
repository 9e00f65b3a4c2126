r"""What a layer sees and how much its outputs matter, from one pass over calibration images.

Every method measures the damage of a change :math:`E` of a layer's weight in the same unit, the
expected change of the network's outputs, so that damages of different layers and methods compare:

.. math:: D(E) = \tfrac12 \operatorname{tr}(G E A E^\top)

The rows of ``E`` are its filters, flattened to ``d = I/groups * kh * kw`` numbers; ``A`` is the
second moment of the patches they are applied to; ``G`` is that of the derivative of the network's
outputs by the layer's output channels, summed over positions. Off its diagonal it tells how errors
of filters add up or cancel; its diagonal is the ``gain`` of each.

Reference:
    The Kronecker-factored curvature of Grosse and Martens, "A Kronecker-factored approximate Fisher
    matrix for convolution layers", ICML 2016; the outputs' metric is that of the softened softmax
    instead of the labels' loss, so that no labels are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from filterpress.errors import ModelError
from filterpress.progress import progress
from filterpress.representations import Layer, roundings
from filterpress.surgery import layers, plain

MAX_ROWS = 32768  # patches a layer; with few, rounding is fitted to them and errs on the others
BATCH_PIXELS = 2**19  # of the images that pass at a time
SPARSE = 0.7  # share of columns in use below which the others are left out of a product
RIDGE = 1e-4  # of the mean power, added to second moments
TEMPERATURE = 2.0  # of the softmax whose metric weighs the outputs; 1 ignores confident images


class Moments(NamedTuple):
    """Statistics of one layer."""

    inputs: Tensor  # (groups, d, d) mean of patch patch^T over images and positions
    outputs: Tensor  # (groups, R, R), R = O/groups: mean of derivative derivative^T over images
    mean: Tensor = torch.empty(0)  # (groups, d) of the patches; empty where it was not measured

    @property
    def gain(self) -> Tensor:
        """Squared derivative ``(O,)`` of the network's outputs by each of the layer's."""
        return self.outputs.diagonal(dim1=1, dim2=2).flatten()

    @property
    def importance(self) -> Tensor:
        """What a squared error of each weight costs, if it is the only one: twice, ``(O, d)``."""
        power = self.inputs.diagonal(dim1=1, dim2=2)
        return self.gain[:, None] * power.repeat_interleave(len(self.gain) // len(power), dim=0)

    def error(self, delta: Tensor) -> float:
        """Return the damage ``D`` of a weight change ``(O, I/groups, kh, kw)``."""
        return float(self.errors(delta).sum().clamp(min=0))

    def errors(self, delta: Tensor) -> Tensor:
        """Return each output channel's share ``(O,)`` of the damage of a weight change."""
        rows = delta.flatten(1).view(len(self.inputs), -1, self.inputs.shape[-1])  # (G, O/G, d)
        return 0.5 * ((self.outputs @ rows @ self.inputs) * rows).sum(dim=2).flatten()


def regular(matrix: Tensor) -> Tensor:
    """Add to second moments ``(..., n, n)`` what makes them safe to factorise.

    A share of the mean power, because calibration images are few, and of the largest one, because
    float32 tells no smaller ones from rounding.
    """
    power = matrix.diagonal(dim1=-2, dim2=-1)
    least = 10 * torch.finfo(matrix.dtype).eps * power.amax(dim=-1, keepdim=True)
    ridge = RIDGE * power.mean(dim=-1, keepdim=True) + least + 1e-24
    return matrix + torch.diag_embed(ridge.expand_as(power))


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues ``(..., n)``, rising, and eigenvectors of symmetric ``(..., n, n)``.

    Single precision does not always converge on second moments that nearly lack rank, and does not
    always say so; double does.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        failed = not bool(torch.isfinite(values).all())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        failed = True
    if failed:
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def measure(model: nn.Module, images: Tensor, *, seed: int = 0) -> dict[str, Moments]:
    """Collect the statistics of every convolution and linear layer.

    Args:
        model: A plain network in evaluation mode; its weights and buffers stay as they are.
        images: ``(N, C, H, W)`` normalised calibration images, N at least 1.
        seed: Chooses positions and the directions in which outputs are differentiated.

    Returns:
        Statistics by layer name. A layer that is not used by the forward pass has none.

    Raises:
        ModelError: Activations overflow, as in a network that was never trained.
    """
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Moments] = {}
    rows = max(1, -(-MAX_ROWS // len(images)))
    parts = batches(images)
    with (
        _listening(model, totals, rows, generator),
        torch.enable_grad(),
        progress("calibrate", len(parts)) as advance,
    ):
        for batch in parts:
            leaf = batch.clone().requires_grad_()
            outputs = model(leaf)
            # the weights' own gradients are not needed, and would take as long again
            outputs.backward(_direction(outputs.detach(), generator), inputs=[leaf])
            advance()
    count = len(images)
    for name, total in totals.items():
        for second in (total.inputs, total.outputs):
            # what is not finite is so on the diagonal, too
            if not torch.isfinite(second.diagonal(dim1=1, dim2=2)).all():
                raise ModelError(f"the activations of {name} must be finite, got NaN or infinity")
        for part in total:
            part.div_(count)
    return totals


def plain_for(model: nn.Module, images: Tensor) -> nn.Module:
    """Copy a network in plain form, ready for methods to change it.

    A quantised network normalises what its rounded weights make; in plain form it computes with
    the weights it learns with, and these can be far away, so its batch-norm is measured again.

    Args:
        model: Any network.
        images: ``(N, C, H, W)`` calibration images, at least 2.

    Returns:
        The copy, whose batch-norm remembers for `recalibrate_` how it differed from these images'.
    """
    noted = copy.deepcopy(model)
    forget_offsets_(noted)
    note_offsets_(noted, images)
    result = plain(noted)
    if any(roundings(module) for module in model.modules()):
        recalibrate_(result, images)
    return result


def batch_size(images: Tensor) -> int:
    """Return how many images ``(N, C, H, W)`` pass at a time."""
    return max(2, min(512, BATCH_PIXELS // (images.shape[-1] * images.shape[-2])))


def batches(images: Tensor) -> tuple[Tensor, ...]:
    """Split images ``(N, C, H, W)`` into equal batches, or nearly so."""
    return images.tensor_split(-(-len(images) // batch_size(images)))


def _direction(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ``v`` with ``E[v v^T]`` the Hessian of the softened cross-entropy, one row an image."""
    p = torch.softmax(outputs / TEMPERATURE, dim=-1)
    z = torch.randn(outputs.shape, generator=generator).to(outputs) * p.sqrt()
    return z - p * z.sum(dim=-1, keepdim=True)


@contextmanager
def _listening(
    model: nn.Module, totals: dict[str, Moments], n_rows: int, generator: torch.Generator
) -> Iterator[None]:
    """Add up the statistics of each layer while the network runs."""
    handles: list[RemovableHandle] = []

    def listen(name: str, layer: Layer) -> None:
        def forward(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen = patches(layer, args[0].detach(), output.shape, n_rows, generator)
            if name not in totals:
                empty = seen.new_zeros(len(seen), seen.shape[2], seen.shape[2])
                side = output.shape[1] // len(seen)
                outputs = seen.new_zeros(len(seen), side, side)
                totals[name] = Moments(empty, outputs, seen.new_zeros(empty.shape[:2]))
            scale = len(output) / seen.shape[1]
            add_second_moment_(totals[name].inputs, seen, scale)
            totals[name].mean.add_(seen.sum(dim=1), alpha=scale)
            if output.requires_grad:
                output.register_hook(lambda gradient: backward(name, gradient))  # type: ignore[no-untyped-call]

        handles.append(layer.register_forward_hook(forward))

    def backward(name: str, gradient: Tensor) -> None:
        total = totals[name].outputs
        rows = gradient.flatten(2) if gradient.ndim > 2 else gradient[..., None]  # (N, O, P)
        rows = torch.unflatten(rows, 1, total.shape[:2])  # (N, G, R, P)
        rows = rows.permute(1, 0, 3, 2).flatten(1, 2)  # (G, N P, R)
        total.baddbmm_(rows.transpose(1, 2), rows)

    for name, layer in layers(model).items():
        listen(name, layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_second_moment_(total: Tensor, seen: Tensor, scale: float) -> None:
    """Add ``scale`` times the second moment of patches ``(G, n, d)`` to ``total`` ``(G, d, d)``."""
    used = (seen != 0).any(dim=1).any(dim=0)
    if len(seen) == 1 and used.float().mean() < SPARSE:
        # on small feature maps most taps of a kernel only ever see padding
        index = used.nonzero().flatten()
        rows = seen[0][:, index]
        total[0].index_put_((index[:, None], index), rows.T @ rows * scale, accumulate=True)
    else:
        total.baddbmm_(seen.transpose(1, 2), seen, alpha=scale)


def patches(
    layer: Layer, x: Tensor, out_shape: torch.Size, n_rows: int, generator: torch.Generator
) -> Tensor:
    """Gather what a layer's filters are applied to, at some positions.

    Args:
        layer: The layer.
        x: Its input, ``(N, I, H, W)`` or ``(N, I)``.
        out_shape: Shape of its output.
        n_rows: Positions an image; all of them when there are not more.
        generator: Chooses the positions, the same for all images.

    Returns:
        ``(groups, N * positions, d)``, ``d = I/groups * kh * kw`` in the order of the weight.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    kh, kw = layer.kernel_size
    height, width = out_shape[2:]
    chosen = torch.randperm(height * width, generator=generator)[:n_rows].sort().values.to(x.device)
    rows = torch.arange(kh, device=x.device) * layer.dilation[0]
    columns = torch.arange(kw, device=x.device) * layer.dilation[1]
    ys = (chosen // width * layer.stride[0])[:, None, None] + rows[:, None]  # (P, kh, 1)
    xs = (chosen % width * layer.stride[1])[:, None, None] + columns  # (P, 1, kw)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    seen = padded[:, :, ys, xs]  # (N, I, P, kh, kw)
    seen = torch.unflatten(seen, 1, (layer.groups, -1))  # (N, G, I/G, P, kh, kw)
    return seen.permute(1, 0, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def note_offsets_(model: nn.Module, images: Tensor) -> None:
    """Let batch-norm remember how its statistics differ from those of some images.

    It was trained on more images than these, and on augmented ones. What a later `recalibrate_`
    measures on the same images is corrected by the difference, in deviations: a network that has
    hardly changed keeps its statistics, instead of taking over the noise of a small sample, and a
    channel that became constant, which batch-norm scales by hundreds, has none of it.

    Args:
        model: Network, changed in place; its state stays, and so do offsets noted before.
        images: ``(N, C, H, W)`` calibration images, at least 2.
    """
    if all("offset" in norm._buffers for norm in _norms(model)):
        return
    measured = copy.deepcopy(model)
    forget_offsets_(measured)
    recalibrate_(measured, images)
    for norm, other in zip(_norms(model), _norms(measured), strict=True):
        if "offset" in norm._buffers:
            continue
        mean, variance = other.running_mean, other.running_var
        factor = torch.where(variance > 0, norm.running_var / variance, 1)
        offset = torch.where(variance > 0, (norm.running_mean - mean) * variance.rsqrt(), 0)
        norm.register_buffer("offset", offset, persistent=False)
        norm.register_buffer("factor", factor, persistent=False)


def recalibrate_(model: nn.Module, images: Tensor) -> None:
    """Measure the means and variances of batch-norm again, after the weights before it changed.

    Args:
        model: Network, changed in place and left in evaluation mode.
        images: ``(N, C, H, W)`` calibration images, at least 2; those of `note_offsets_`, if that
            was called before.
    """
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean of all batches
        norm.train()
    with torch.no_grad():
        for batch in batches(images):
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if "offset" in norm._buffers:
            norm.running_mean += norm.offset * norm.running_var.sqrt()
            norm.running_var *= norm.factor
    model.eval()


def forget_offsets_(model: nn.Module) -> None:
    """Let a later `recalibrate_` take what it measures as it is."""
    for norm in _norms(model):
        norm._buffers.pop("offset", None)
        norm._buffers.pop("factor", None)


def _norms(model: nn.Module) -> list[Any]:
    """List the batch-norms of a network that keep statistics."""
    kinds = nn.BatchNorm1d | nn.BatchNorm2d
    return [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
