from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from filterpress.methods.prune_similar import (
    Measure,
    SimilarityConfig,
    distinct,
    prune_similar,
)
from filterpress.statistics import recalibrate_
from filterpress.surgery import layers
from tests import networks

IMAGES = networks.images(200)


def outputs(network, images=IMAGES):
    with torch.no_grad():
        return network(images)


@pytest.mark.parametrize("measure", get_args(Measure))
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_planted_duplicates_go_and_the_outputs_stay(name, measure):
    network = networks.plant_duplicates_(networks.make(name), name)
    recalibrate_(network, IMAGES)
    made = prune_similar(network, IMAGES, SimilarityConfig(measure=measure, threshold=0.9999))
    producer = networks.CHAINS[name][0]
    n_filters = len(network.get_submodule(producer).weight)
    assert made.notes["removed"] == 2
    assert made.layers == {producer: {"removed": 2.0, "kept": n_filters - 2.0}}
    assert len(made.model.get_submodule(producer).weight) == n_filters - 2
    torch.testing.assert_close(outputs(made.model), outputs(network), rtol=0, atol=0.05)


@pytest.mark.parametrize("measure", get_args(Measure))
def test_filters_of_the_same_shape_and_another_size_are_similar(measure):
    network = networks.make("flattening")
    with torch.no_grad():
        network[0].weight[4] = 3 * network[0].weight[2]
        network[0].bias[4] = 3 * network[0].bias[2]
    recalibrate_(network, IMAGES)
    made = prune_similar(network, IMAGES, SimilarityConfig(measure=measure, threshold=0.9999))
    assert made.layers["0"] == {"removed": 1.0, "kept": 7.0}
    torch.testing.assert_close(outputs(made.model), outputs(network), rtol=0, atol=0.05)


def test_pearson_alone_overlooks_a_common_offset():
    network = networks.make("flattening")
    with torch.no_grad():
        network[0].weight[4] = network[0].weight[2] + 1.0
    removed = {
        measure: prune_similar(
            network, IMAGES, SimilarityConfig(measure=measure, threshold=0.9999)
        ).notes["removed"]
        for measure in ("cosine", "pearson")
    }
    assert removed == {"cosine": 0, "pearson": 1}


def test_filters_of_opposite_sign_are_not_similar():
    network = networks.make("flattening")
    with torch.no_grad():
        network[0].weight[4] = -network[0].weight[2]
    for measure in get_args(Measure):
        config = SimilarityConfig(measure=measure, threshold=0.99)
        assert prune_similar(network, IMAGES, config).notes["removed"] == 0


def test_filters_that_never_fire_go():
    network = networks.make("flattening")
    with torch.no_grad():
        network[0].weight[4] = 0
        network[0].bias[4] = -1
    recalibrate_(network, IMAGES)
    made = prune_similar(network, IMAGES, SimilarityConfig(threshold=1.0))
    assert made.layers["0"] == {"removed": 1.0, "kept": 7.0}
    torch.testing.assert_close(outputs(made.model), outputs(network), rtol=0, atol=0.05)


def test_a_layer_that_never_fires_keeps_one_filter():
    network = networks.make("flattening")
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.fill_(-1)
    made = prune_similar(network, IMAGES, SimilarityConfig())
    assert len(made.model[0].weight) == 1
    assert torch.isfinite(outputs(made.model)).all()
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_a_lower_threshold_never_removes_fewer():
    network = networks.make("residual")
    removed = [
        prune_similar(network, IMAGES, SimilarityConfig(threshold=t)).notes["removed"]
        for t in (0.99, 0.9, 0.7, 0.4)
    ]
    assert removed == sorted(removed)
    assert removed[-1] > removed[0]


def test_summed_outputs_are_compared_where_they_are_read():
    """Filters alike in one producer of a sum are not alike after it."""
    network = networks.make("residual")
    with torch.no_grad():
        for module in (network.blocks[0].second[0], network.blocks[0].second[1]):
            for value in (module.weight, getattr(module, "bias", None)):
                if value is not None:
                    value[3] = value[1].clone()
    made = prune_similar(network, IMAGES, SimilarityConfig(threshold=0.999, measure="activation"))
    assert made.notes["removed"] == 0


def test_the_output_layer_keeps_all_its_rows():
    for name in networks.BUILDERS:
        network = networks.make(name)
        *_, last = layers(network)
        with torch.no_grad():
            network.get_submodule(last).weight[1] = network.get_submodule(last).weight[0]
        made = prune_similar(network, IMAGES, SimilarityConfig(threshold=0.5))
        assert len(made.model.get_submodule(last).weight) == networks.CLASSES


def angled(*degrees):
    """Return the cosines between directions in the plane."""
    angle = torch.tensor(degrees) * math.pi / 180
    return torch.cos(angle[:, None] - angle)


def test_similarity_exactly_at_the_threshold_counts():
    similarity = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.3], [0.2, 0.3, 1.0]])
    importance = torch.tensor([3.0, 2.0, 1.0])
    assert distinct(similarity, importance, 0.9).tolist() == [True, False, True]
    assert distinct(similarity, importance, 0.901).tolist() == [True, True, True]


def test_every_pair_of_a_cluster_is_similar_not_only_neighbours():
    kept = distinct(angled(0, 20, 40, 60), torch.ones(4), math.cos(math.radians(30)))
    assert int(kept.sum()) == 2


def test_the_most_important_of_a_cluster_stays():
    importance = torch.tensor([1.0, 5.0, 3.0, 2.0])
    assert distinct(angled(0, 2, 4, 90), importance, 0.99).tolist() == [False, True, False, True]


def test_of_equals_the_first_stays():
    assert distinct(torch.ones(4, 4), torch.ones(4), 0.95).tolist() == [True, False, False, False]


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_items_stay(n):
    assert distinct(torch.ones(n, n), torch.ones(n), 0.5).tolist() == [True] * n


@pytest.mark.parametrize(
    ("field", "value"),
    [("measure", "euclid"), ("threshold", 0.0), ("threshold", 1.01), ("images", 0)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        SimilarityConfig(**{field: value})
