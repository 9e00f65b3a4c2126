"""Tiny networks for images of 2 x 8 x 8, one for each way in which channels hang together.

Each function is a model that a package can name, as ``tests.networks:residual``.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from filterpress.models import ResidualNet
from filterpress.statistics import recalibrate_
from filterpress.surgery import layers

SHAPE = (2, 8, 8)
CLASSES = 5


def residual(input_shape=SHAPE, n_classes=CLASSES):
    """Sums of feature maps, with and without a convolution in the shortcut."""
    return ResidualNet(input_shape[0], (8, 12), 1, n_classes)


class _Inverted(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.expand = nn.Conv2d(width, inner, 1, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.shrink = nn.Conv2d(inner, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu6(self.norm(self.expand(x)))
        y = F.relu6(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.shrink(y))


class Depthwise(nn.Module):
    def __init__(self, in_channels, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.block = _Inverted(8, 16)
        self.head = nn.Linear(8, n_classes)

    def forward(self, x):
        return self.head(self.block(F.relu(self.stem(x))).mean((2, 3)))


def depthwise(input_shape=SHAPE, n_classes=CLASSES):
    """An inverted residual block: a depthwise convolution between two of 1 x 1."""
    return Depthwise(input_shape[0], n_classes)


class Bottlenecks(nn.Module):
    def __init__(self, in_channels, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 10, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.first = _Inverted(10, 16)
        self.second = _Inverted(10, 12)
        self.shrink = nn.Conv2d(10, 8, 1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, n_classes)

    def forward(self, x):
        x = self.shrink(self.second(self.first(self.norm(self.stem(x)))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def bottlenecks(input_shape=SHAPE, n_classes=CLASSES):
    """Linear bottlenecks: sums and pairs of layers without a nonlinearity between."""
    return Bottlenecks(input_shape[0], n_classes)


class Grouped(nn.Module):
    def __init__(self, in_channels, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(12, 8, 1)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, n_classes)

    def forward(self, x):
        x = F.relu(self.norm(self.grouped(F.relu(self.stem(x)))))
        return self.head(F.relu(self.norm2(self.mix(F.relu(self.last(x))))).mean((2, 3)))


def grouped(input_shape=SHAPE, n_classes=CLASSES):
    """A convolution of two groups among ordinary ones."""
    return Grouped(input_shape[0], n_classes)


class Concatenating(nn.Module):
    def __init__(self, in_channels, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.right = nn.Conv2d(8, 10, 1)
        self.norm = nn.BatchNorm2d(24)
        self.join = nn.Conv2d(24, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, n_classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(torch.cat([self.left(x), x, self.right(x)], dim=1)))
        return self.head(F.relu(self.join(x)).mean((2, 3)))


def concatenating(input_shape=SHAPE, n_classes=CLASSES):
    """Feature maps side by side, normalised after they have met."""
    return Concatenating(input_shape[0], n_classes)


def flattening(input_shape=SHAPE, n_classes=CLASSES):
    """Convolutions, then linear layers on all positions of the last feature map."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(10 * 4, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(12, n_classes),
    )


BUILDERS = {
    f.__name__: f for f in (residual, depthwise, bottlenecks, grouped, concatenating, flattening)
}


def randomise_(network, seed=0):
    """Draw weights that keep the power of activations, and norms with factors of any sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            size = 0.1 if parameter.ndim == 1 else math.sqrt(2 / parameter[0].numel())
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                n = module.num_features
                signs = torch.randint(2, (n,), generator=generator) * 2 - 1
                if module.affine:
                    module.weight.copy_(signs * (0.5 + torch.rand(n, generator=generator)))
                module.running_mean.copy_(0.3 * torch.randn(n, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(n, generator=generator))
    return network.eval()


def images(n=16, seed=0, shape=SHAPE):
    """Draw images with mean 0 and variance 1, neighbouring pixels alike as in photographs."""
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    smooth = F.avg_pool2d(noise, 3, stride=1, padding=1)
    return smooth / smooth.std()


def make(name, seed=0):
    """Build one of the networks above, with random weights and outputs that tell images apart.

    Batch-norm has the statistics of images like those of `images`, and so have the outputs: over
    the images each has a mean near 0 and a variance near 1.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = randomise_(BUILDERS[name](), seed)
    calibration = images(200, seed=1000 + seed)
    recalibrate_(network, calibration)
    *_, head = layers(network).values()
    with torch.no_grad():
        head.weight /= network(calibration).std(dim=0)[:, None]
        head.bias -= network(calibration).mean(dim=0)
    return network


# layers, in the order of the graph, that each hold a row for every channel of one group
CHAINS = {
    "residual": ("blocks.1.first.0", "blocks.1.first.1"),
    "depthwise": ("block.expand", "block.norm", "block.depthwise", "block.norm2"),
    "bottlenecks": ("first.expand", "first.norm", "first.depthwise", "first.norm2"),
    "grouped": ("last",),
    "concatenating": ("join",),
    "flattening": ("3", "4"),
}


def plant_duplicates_(network, name, copies=(3, 5), source=1):
    """Let some filters do exactly what another one does."""
    with torch.no_grad():
        for module in map(network.get_submodule, CHAINS[name]):
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, key, None)
                if value is not None:
                    value[list(copies)] = value[source].clone()
    return network


class Imitation:
    """A task whose labels are what a teacher says."""

    input_shape = SHAPE
    n_classes = CLASSES

    def __init__(self, teacher):
        self.sets = {}
        for seed, (split, n) in enumerate({"train": 256, "validation": 128, "test": 8}.items()):
            drawn = images(n, seed)
            with torch.no_grad():
                self.sets[split] = (drawn, teacher(drawn).argmax(1))

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        images, labels = self.sets[split]
        n = len(labels)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for index in order.split(batch_size):
            yield images[index].to(device), labels[index].to(device)

    def size(self, split):
        return len(self.sets[split][1])

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def score(self, predict, split):
        images, labels = self.sets[split]
        with torch.no_grad():
            return float((predict(images).argmax(1) == labels).double().mean())
