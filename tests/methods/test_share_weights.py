from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from filterpress.fitting import Goal
from filterpress.methods.share_weights import (
    MOST,
    SharingConfig,
    Span,
    multiples_for,
    share_weights,
    shared_levels,
    span_of,
)
from filterpress.package import Package, encode
from filterpress.representations import has_codebook, indices_of, levels_of
from filterpress.retraining import RetrainConfig, fine_tune_
from filterpress.surgery import layers
from tests import networks
from tests.moments import apart, draw, white

IMAGES = networks.images(96)


def size(network):
    package = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(package, network))


def share(network, config=None, *, smaller=0.6):
    goal = Goal(round(smaller * size(network)), size)
    return goal, share_weights(network, IMAGES, config or SharingConfig(), goal=goal)


def pruned_(network, ratio=0.95):
    """Set the smallest weights of each layer to zero."""
    with torch.no_grad():
        for layer in layers(network).values():
            magnitudes = layer.weight.abs()
            layer.weight.masked_fill_(magnitudes < magnitudes.quantile(ratio), 0)
    return network


def test_planted_clusters_are_found_and_shared_to_the_bit():
    centres = torch.tensor([-1.5, -0.25, 0.5, 2.0])
    truth = torch.arange(600).reshape(20, 30) % 4
    weight = centres[truth] + 0.01 * draw(20, 30)
    (levels,) = shared_levels(weight, torch.ones(20, 30), [0.05])
    means = torch.stack([weight[truth == k].mean() for k in range(4)])
    assert levels.n_levels == 4
    assert levels.bits == 2
    torch.testing.assert_close(levels.values, means)


def test_pruned_weights_have_a_level_of_their_own_and_found_no_cluster():
    weight = draw(30, 40)
    zeros = draw(30, 40, seed=1) > 0
    pruned = weight.masked_fill(zeros, 0)
    left, worth = pruned[~zeros], torch.ones(30, 40)
    for radius in (0.1, 0.3):
        (found,) = shared_levels(pruned, worth, [radius])
        (alone,) = shared_levels(left, worth[~zeros], [radius])
        assert found.n_levels == alone.n_levels + 1
        assert (found.values == 0).sum() == 1
        assert found.values[found.values != 0].equal(alone.values)


def test_a_layer_that_has_been_pruned_whole_shares_zero():
    (levels,) = shared_levels(torch.zeros(3, 4), torch.ones(3, 4), [0.1])
    assert levels.values.tolist() == [0.0]


def test_a_larger_radius_has_fewer_clusters_and_an_index_never_more_than_a_byte():
    weight, radii = draw(50, 80), [0.001, 0.01, 0.1, 0.3, 2.0]
    counts = [levels.n_levels for levels in shared_levels(weight, torch.ones(50, 80), radii)]
    assert all(fine > coarse for fine, coarse in pairwise(counts[1:]))
    assert counts[0] == MOST
    assert counts[-1] == 2  # one value is no layer


@pytest.mark.parametrize("radius", [0.05, 0.2, 0.5])
def test_sharing_costs_no_more_than_the_radius_of_each_weight(radius):
    """The radius is the root of the mean squared error in a cluster, so it bounds the damage."""
    weight = draw(30, 60)
    importance = 0.1 + draw(30, 60, seed=2).square()
    (levels,) = shared_levels(weight, importance, [radius])
    error = (weight[..., None] - levels.values).square().amin(dim=2)
    assert 0.02 * radius**2 < (importance * error).sum() / importance.sum() < radius**2


def test_one_unit_of_damage_costs_the_same_in_every_layer():
    weight, moments = draw(6, 9), apart(torch.diag(0.5 + torch.rand(9))[None], 0.1 + torch.rand(6))
    unit = span_of(weight, moments, "damage").unit
    assert float(0.5 * moments.importance.mean() * unit**2) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("threshold", ["deviation", "range", "layer"])
@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_relative_thresholds_find_the_same_clusters_in_scaled_weights(threshold, scale):
    weight, moments = draw(30, 40), white(30, 40)
    counts = []
    for values in (weight, scale * weight):
        unit = span_of(values, moments, threshold).unit
        found = shared_levels(values, torch.ones(30, 40), [0.02 * unit, 0.1 * unit])
        counts.append([levels.n_levels for levels in found])
    assert counts[0] == counts[1]
    assert counts[0][0] > counts[0][1] > 1


def test_thresholds_reach_from_one_cluster_to_as_many_as_there_can_be():
    spans = [Span(1.0, 0.5), Span(3.0, 100.0), Span(0.0, 1.0)]
    multiples = multiples_for(spans)
    assert multiples[0] * 0.5 <= 1.0 / MOST
    assert multiples[0] * 100.0 <= 3.0 / MOST
    assert multiples[-1] * 0.5 >= 1.0
    assert multiples[-1] * 100.0 >= 3.0
    assert multiples_for([Span(0.0, 1.0)]) == [1.0]


@pytest.mark.parametrize("threshold", ["damage", "deviation", "range", "layer"])
def test_the_file_fits_and_every_layer_computes_with_shared_weights(threshold):
    goal, made = share(networks.make("residual"), SharingConfig(threshold=threshold))
    assert size(made.model) <= goal.max_bytes
    assert made.notes["shared"] == len(layers(made.model))
    for name, layer in layers(made.model).items():
        assert has_codebook(layer)
        assert len(levels_of(layer)) == made.layers[name]["clusters"]
    assert made.notes["clusters"] == sum(layer["clusters"] for layer in made.layers.values())


def test_a_smaller_file_has_fewer_clusters():
    found = [share(networks.make("flattening"), smaller=s)[1].notes for s in (0.8, 0.6)]
    assert found[0]["clusters"] > found[1]["clusters"]
    assert found[0]["distortion"] < found[1]["distortion"]


def test_a_network_whose_file_fits_stays_as_it_is():
    network = networks.make("residual")
    goal, made = share(network, smaller=1.0)
    assert goal.max_bytes == size(network)
    assert made.notes == {"shared": 0.0, "distortion": 0.0}
    assert not any(has_codebook(layer) for layer in layers(made.model).values())


def test_pruned_weights_stay_exactly_zero_through_retraining():
    teacher = networks.make("residual")
    task, network = networks.Imitation(teacher), pruned_(networks.make("residual"), 0.6)
    made = share(network)[1].model
    zeros = {name: layer.weight == 0 for name, layer in layers(network).items()}
    before = {name: levels_of(layer).detach().clone() for name, layer in layers(made).items()}
    config = RetrainConfig(epochs=1, batch_size=32, lr=0.05, precision="float32")
    fine_tune_(made, teacher, task, config, seed=0)
    for name, layer in layers(made).items():
        assert zeros[name].any()
        assert not layer.weight[zeros[name]].any()
        moved = levels_of(layer).detach() != before[name]
        assert moved.equal(before[name] != 0)


def test_zeros_are_written_in_no_more_than_their_entropy():
    layer = nn.Conv2d(2, 256, 3)
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(256 * 36, 5, bias=False))
    pruned_(network)
    sparse = network[2]
    with torch.no_grad():
        network(IMAGES[:2])
    made = share(network, smaller=0.9)[1].model
    indices = indices_of(made[2]).flatten()
    counts = indices.bincount().double()
    entropy = float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)
    least = entropy * len(indices) / 8
    assert (sparse.weight == 0).double().mean() > 0.94
    assert (made[2].weight == 0).double().mean() > 0.94
    with torch.no_grad():
        bare = size(nn.Sequential(made[0], nn.Flatten(), _emptied(made[2])))
    assert size(made) - bare < 1.1 * least + 2 * len(levels_of(made[2])) + 100


def _emptied(layer):
    empty = nn.Linear(layer.in_features, layer.out_features, bias=False)
    nn.init.zeros_(empty.weight)
    return empty


def test_wrong_fields_are_refused():
    for field, value in (("images", 0), ("threshold", "mean"), ("fit", "x"), ("rounding", "up")):
        with pytest.raises(ValueError, match=f"{field} must be"):
            SharingConfig(**{field: value})
