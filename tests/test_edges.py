"""Networks with unusual tensors, from their making to what onnxruntime makes of their file."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from filterpress import models, package, stages
from filterpress.codec.graph import to_onnx
from filterpress.errors import BudgetError, ModelError
from filterpress.fitting import Goal
from filterpress.methods.merge_filters import MergeConfig, merge_filters
from filterpress.methods.project_channels import ProjectionConfig, project_channels
from filterpress.methods.prune_similar import SimilarityConfig, prune_similar
from tests import tiny

SHAPE, CLASSES = (1, 8, 8), 4
IMAGES = torch.randn(48, *SHAPE, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and a linear layer; the cases change it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def plain(_shape, _classes):
    return Net()


def all_zero(_shape, _classes):
    network = Net()
    for parameter in network.parameters():
        parameter.data.zero_()
    return network


def constant(_shape, _classes):
    network = Net()
    for parameter in network.parameters():
        parameter.data.fill_(0.3)
    return network


def one_element(_shape, _classes):
    class One(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(8, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1))
            self.head = nn.Linear(1, CLASSES)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return super().forward(x) * self.scale

    return One()


def empty(_shape, _classes):
    class Empty(Net):
        def __init__(self):
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(0, 3))

        def forward(self, x):
            return super().forward(x) + self.nothing.sum()

    return Empty()


def integers(_shape, _classes):
    class Integers(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, CLASSES)
            self.register_buffer("chosen", torch.tensor([3, 0, 3]))
            self.register_buffer("calls", torch.tensor(7))

        def forward(self, x):
            return super().forward(x) + self.table(self.chosen).sum(0)

    return Integers()


def shared_weight(_shape, _classes):
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.again = nn.Conv2d(8, 8, 3, padding=1)
            self.again.weight = self.body.weight

        def forward(self, x):
            x = torch.relu(self.body(torch.relu(self.norm(self.stem(x)))))
            return self.head(torch.relu(self.again(x)).mean((2, 3)))

    return Shared()


def layer_used_twice(_shape, _classes):
    class Twice(Net):
        def forward(self, x):
            x = torch.relu(self.body(torch.relu(self.norm(self.stem(x)))))
            return self.head(torch.relu(self.body(x)).mean((2, 3)))

    return Twice()


def strided(_shape, _classes):
    network = Net()
    network.body.weight.data = network.body.weight.data.transpose(0, 1)
    network.stem.weight.data = network.stem.weight.data.to(memory_format=torch.channels_last)
    return network


def float16(_shape, _classes):
    return Net().half()


def bfloat16(_shape, _classes):
    return Net().bfloat16()


def float64(_shape, _classes):
    return Net().double()


def no_convolution(_shape, _classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, CLASSES))


CASES = [plain, all_zero, constant, one_element, empty, integers, shared_weight, layer_used_twice]
CASES += [strided, float16, bfloat16, float64, no_convolution]


def source_of(case):
    network = models.build(f"tests.test_edges:{case.__name__}", SHAPE, CLASSES).eval()
    name = f"tests.test_edges:{case.__name__}"
    return package.Package(network=network, model=name, input_shape=SHAPE, n_classes=CLASSES)


def outputs_of(encoded):
    session = onnxruntime.InferenceSession(to_onnx(encoded), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": IMAGES.numpy()})[0]


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_generous_size_computes_what_the_network_does(case):
    source = source_of(case)
    with torch.no_grad():
        expected = source.network(IMAGES).numpy()
    found = outputs_of(package.encode(source, source.network))
    assert np.abs(found - expected).max() <= 0.03 * max(np.abs(expected).max(), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_compressing_gives_a_smaller_file_that_computes_what_was_stored(case):
    source = source_of(case)
    full = len(package.encode(source, source.network))
    least = package.least_bytes(source)
    max_bytes = (full + least) // 2
    goal = Goal(max_bytes, lambda network: len(package.encode(source, network)))
    pruned = prune_similar(source.network, IMAGES, SimilarityConfig()).model
    merged = merge_filters(pruned, IMAGES, MergeConfig(), goal=goal).model
    found = project_channels(
        merged,
        IMAGES,
        ProjectionConfig(),
        goal=goal,
    ).model
    encoded = package.encode(source, found)
    assert len(encoded) <= max(max_bytes, least)
    with torch.no_grad():
        expected = found(IMAGES).numpy()
    tolerance = 0.03 * max(np.abs(expected).max(), 1e-6)
    assert np.abs(outputs_of(encoded) - expected).max() <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_a_package_gives_the_same_network_back(case, tmp_path):
    source = source_of(case)
    package.save(source, tmp_path)
    again = package.load(tmp_path)
    with torch.no_grad():
        assert again.network(IMAGES).equal(source.network(IMAGES))
    assert package.encode(again, again.network) == package.encode(source, source.network)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["stem.weight", "head.weight", "head.bias", "norm.running_mean"])
def test_what_is_not_finite_is_refused_by_name(value, place):
    source = source_of(plain)
    source.network.state_dict()[place].view(-1)[0] = value
    with pytest.raises(ModelError, match="must be finite, got NaN or infinity"):
        package.encode(source, source.network)


def test_a_budget_that_nothing_meets_ends_in_the_smallest_file_and_its_cost(tmp_path):
    given = {name: tiny.COMMON[name] for name in ("task",)}
    with tiny.one_thread():
        stages.train(tmp_path / "0", model=tiny.COMMON["model"], config=tiny.TRAINED, **given)
        least = package.least_bytes(package.load(tmp_path / "0"))
        size = str(least + 10)
        stages.cluster(tmp_path / "0", tmp_path / "1", max_size=size, **given)
        reduced = stages.reduce(tmp_path / "1", tmp_path / "2", max_size=size, **given)
        report = stages.evaluate(
            tmp_path / "2", tmp_path / "3", state=reduced["state"], max_size=size, **given
        )
    assert reduced["state"] == report["decision"] == "too-big"
    with pytest.raises(BudgetError) as caught:
        stages.give_up(tmp_path / "3", max_size=size)
    assert f"{report['n_bytes']} bytes of {size} allowed" in str(caught.value)
    assert f"validation accuracy {report['validation_accuracy']:.4f}" in str(caught.value)
