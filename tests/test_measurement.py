from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filterpress import codec, measurement
from filterpress.data import Arrays, DataSet
from filterpress.errors import BitstreamError
from filterpress.forms import Templates
from filterpress.package import Package, encode
from filterpress.representations import Chain, like, multiply_templates_, quantize_
from filterpress.surgery import layers
from filterpress.tasks import ImageClassification
from tests import networks


class Toy:
    """A task whose labels are what a network says, so that its accuracy is known."""

    input_shape = networks.SHAPE
    n_classes = networks.CLASSES
    mean = torch.tensor([[[1.0]], [[2.0]]])
    std = torch.tensor([[[3.0]], [[4.0]]])

    def __init__(self, network, wrong):
        self.sets = {}
        for seed, (split, n_wrong) in enumerate(wrong.items()):
            images = networks.images(40, seed)
            with torch.no_grad():
                labels = network(images).argmax(1)
            labels[:n_wrong] = (labels[:n_wrong] + 1) % self.n_classes
            self.sets[split] = (images, labels)

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        images, labels = self.sets[split]
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def size(self, split):
        return len(self.sets[split][1])

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def score(self, predict, split):
        images, labels = self.sets[split]
        return float((predict(images).argmax(1) == labels).double().mean())


@pytest.fixture(scope="module")
def network():
    made = networks.make("residual")
    for layer in layers(made).values():
        quantize_(layer, torch.full((len(layer.weight),), 2.0**-10))
    return made


@pytest.fixture(scope="module")
def source(network):
    return Package(
        network=network,
        model="tests.networks:residual",
        input_shape=networks.SHAPE,
        n_classes=networks.CLASSES,
    )


@pytest.fixture(scope="module")
def encoded(source, network):
    return encode(source, network)


def test_the_runner_computes_what_the_network_does(network, encoded):
    images = networks.images(5)
    with torch.no_grad():
        expected = network(images)
    found = measurement.runner(encoded)(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.std()))


def test_a_damaged_file_is_not_run(encoded):
    with pytest.raises(BitstreamError):
        measurement.runner(encoded[:-1])


def test_each_set_is_scored_with_the_decoded_file(encoded):
    predict = measurement.runner(encoded)
    task = Toy(predict, {"validation": 10, "test": 4})
    measured = measurement.measure(encoded, task)
    assert measured["n_bytes"] == len(encoded)
    assert measured["validation_accuracy"] == pytest.approx(30 / 40)
    assert measured["accuracy"] == pytest.approx(36 / 40)


def test_a_baseline_is_the_network_in_floats():
    network = networks.make("depthwise")
    task = Toy(network, {"validation": 8, "test": 20})
    found = measurement.baseline(network, task)
    n_parameters = sum(p.numel() for p in network.parameters())
    assert found["n_parameters"] == n_parameters
    assert found["n_bytes"] == 4 * n_parameters
    assert found["validation_accuracy"] == pytest.approx(32 / 40)
    assert found["accuracy"] == pytest.approx(20 / 40)
    assert found["macs"] > 0


def test_numbers_stand_beside_those_of_the_trained_network():
    reference = {"n_bytes": 1200, "accuracy": 0.9, "validation_accuracy": 0.8}
    found = measurement.against({"n_bytes": 100, "accuracy": 0.7}, reference)
    assert found == {
        "n_bytes": 100,
        "accuracy": 0.7,
        "baseline_bytes": 1200,
        "baseline_accuracy": 0.9,
        "baseline_validation_accuracy": 0.8,
        "ratio": 12.0,
    }


def test_preprocessing_is_what_the_task_knows_of_it(network):
    task = Toy(network, {})
    assert measurement.preprocessing(task) == {"mean": [1.0, 2.0], "std": [3.0, 4.0]}
    assert measurement.preprocessing(object()) == {}


def test_rows_list_every_weight_of_the_file_with_its_share(network, encoded):
    rows = measurement.layer_rows(encoded, network)
    assert [row["name"] for row in rows] == list(layers(network))
    for row in rows:
        weight = network.get_submodule(row["name"]).weight
        assert row["shape"] == list(weight.shape)
        assert row["n_bytes"] == pytest.approx(row["bits_per_weight"] * weight.numel() / 8, abs=1)
        assert "rank" not in row
    overhead = len(codec.encode({}, codec.decode(encoded).graph, {}))
    assert sum(row["n_bytes"] for row in rows) < len(encoded) - overhead / 2


def test_the_halves_of_a_projected_layer_are_one_row_of_its_shape(source):
    network = networks.make("residual")
    halves = {}
    for groups, (name, layer) in enumerate(list(layers(network).items())[1:3], 1):
        n_out, n_in = layer.weight.shape[:2]
        first = nn.Conv2d(n_in, 2 * groups, 1, bias=False)
        halves[name] = Chain(first, like(layer, 2 * groups, n_out, groups))
        network.set_submodule(name, halves[name])
    rows = measurement.layer_rows(encode(source, network), network)
    assert [row["name"] for row in rows] == list(layers(networks.make("residual")))
    for row in rows:
        name, plain = row["name"], networks.make("residual").get_submodule(row["name"])
        assert row["shape"] == list(plain.weight.shape)
        assert ("rank" in row) == (name in halves)
        if name in halves:
            assert (row["rank"], row["groups"]) == (2, list(halves).index(name) + 1)
            n_weights = sum(half.weight.numel() for half in halves[name])
            assert row["n_bytes"] == pytest.approx(row["bits_per_weight"] * n_weights / 8, abs=1)


def test_all_that_multiples_of_templates_are_made_of_is_one_row(source):
    network = networks.make("residual")
    templates = Templates(torch.randn(4, 3, 3), learn=False)
    shared = [name for name, m in layers(network).items() if m.weight.shape[2:] == (3, 3)]
    for name in shared:
        layer = network.get_submodule(name)
        n_out, n_in = layer.weight.shape[:2]
        steps = torch.full((n_out,), 0.01), torch.full((n_out,), 0.02)
        indices = torch.randint(4, (n_out, n_in))
        multiply_templates_(layer, templates, indices, *steps)
    encoded = encode(source, network)
    rows = measurement.layer_rows(encoded, network)
    assert [row["name"] for row in rows] == list(layers(network))
    stored = codec.decode(encoded).tensors
    for row in rows:
        weight = network.get_submodule(row["name"]).weight
        assert row["shape"] == list(weight.shape)
        assert row["n_bytes"] == pytest.approx(row["bits_per_weight"] * weight.numel() / 8, abs=1)
        parts = [t for name, t in stored.items() if name.startswith(f"{row['name']}.")]
        bits = sum(codec.estimate_bits(t.integers) for t in parts if t.integers.ndim > 1)
        assert row["n_bytes"] == round(bits / 8)
        assert len(parts) >= (4 if row["name"] in shared else 1)


def test_a_chain_of_more_layers_is_one_row_of_the_shape_before_it_was_cut(source):
    network = networks.make("residual")
    name, layer = list(layers(network).items())[2]
    n_out, n_in = layer.weight.shape[:2]
    chains = {
        "conv": Chain(
            nn.Conv2d(n_in, 5, 1, bias=False),
            nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False),
            nn.Conv2d(5, n_out, 1),
        ),
        "cross": Chain(
            nn.Conv2d(n_in, 5, (3, 1), padding=(1, 0), bias=False),
            nn.Conv2d(5, n_out, (1, 3), padding=(0, 1)),
        ),
        "by channel": Chain(
            nn.Conv2d(n_in, 2 * n_in, 3, padding=1, groups=n_in, bias=False),
            nn.Conv2d(2 * n_in, n_out, 1),
        ),
    }
    for kind, chain in chains.items():
        network.set_submodule(name, chain)
        rows = {
            row["name"]: row for row in measurement.layer_rows(encode(source, network), network)
        }
        assert list(rows) == list(layers(networks.make("residual")))
        assert rows[name]["shape"] == [n_out, n_in, 3, 3]
        rank = 2 * n_in if kind == "by channel" else 5
        assert (rows[name]["rank"], rows[name]["groups"]) == (rank, 1)
        n_weights = sum(part.weight.numel() for part in chain)
        bits = rows[name]["bits_per_weight"]
        assert rows[name]["n_bytes"] == pytest.approx(bits * n_weights / 8, abs=1)


def test_weights_that_belong_to_no_layer_come_last():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(networks.SHAPE))
            self.layer = nn.Conv2d(networks.SHAPE[0], 4, 3)

        def forward(self, images):
            return self.layer(images * self.scale).mean((2, 3))

    network = Scaled().eval()
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=4)
    rows = measurement.layer_rows(encode(source, network), network)
    assert [row["name"] for row in rows] == ["layer", "scale"]


def classification(predict):
    """Images whose labels are what a network says, but for three of the test set."""
    sets = {}
    for seed, split in enumerate(("train", "validation", "test")):
        images = (networks.images(30, seed) * 40 + 128).clamp(0, 255).byte()
        sets[split] = Arrays(images, torch.zeros(30, dtype=torch.int64))
    labels = tuple(f"class {k}" for k in range(networks.CLASSES))
    task = ImageClassification(
        data=DataSet(**sets, classes=labels),
        mean=torch.full((2, 1, 1), 128.0),
        std=torch.full((2, 1, 1), 40.0),
        shift=1,
        flip=False,
    )
    for split, arrays in sets.items():
        ((images, _),) = task.batches(split, 30)
        arrays.labels.copy_(predict(images).argmax(1))
    sets["test"].labels[:3] = (sets["test"].labels[:3] + 1) % networks.CLASSES
    return task


def test_what_is_taken_for_what_is_counted_on_the_test_set(source, network):
    encoded = encode(source, network)
    task = classification(measurement.runner(encoded))
    measured = measurement.measure(encoded, task)
    counts = torch.tensor(measured["confusion"]["counts"])
    assert measured["confusion"]["classes"] == list(task.data.classes)
    assert (
        counts.sum(1).tolist()
        == torch.bincount(task.data.test.labels, minlength=networks.CLASSES).tolist()
    )
    assert int(counts.sum() - counts.diagonal().sum()) == 3
    assert measured["accuracy"] == 27 / 30
    assert measured["validation_accuracy"] == 1.0


def test_a_class_made_of_the_built_in_one_is_scored_by_its_own_rule_alone(source, network):
    class Strict(ImageClassification):
        def score(self, predict, split):
            return 0.25

    built_in = classification(network.eval())
    own = Strict(data=built_in.data, mean=built_in.mean, std=built_in.std, shift=1, flip=False)
    measured = measurement.measure(encode(source, network), own)
    assert measured["accuracy"] == 0.25
    assert "confusion" not in measured


def test_many_classes_are_not_tabulated(source, network, monkeypatch):
    monkeypatch.setattr(measurement, "SHOWN_CLASSES", networks.CLASSES - 1)
    task = classification(network.eval())
    assert "confusion" not in measurement.measure(encode(source, network), task)
