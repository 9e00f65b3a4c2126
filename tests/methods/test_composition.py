"""Methods of one stage after those of another: a network that fits, or a reason why not."""

from __future__ import annotations

import json
from functools import cache

import pytest

from filterpress import settings
from filterpress.errors import ModelError
from filterpress.fitting import Goal
from filterpress.package import Package, encode
from filterpress.stages.tables import clusterers, pruners, reducers
from filterpress.training import FitConfig
from tests import networks

pytestmark = pytest.mark.slow
NAME = "flattening"
IMAGES = networks.images(96)
QUICK = {"epochs": 1, "batch_size": 64, "precision": "float32"}
OWN = {  # what lets a method find something to do in so small a network
    "saliency": {"rate": 0.5, "steps": 1},
    "structured": {"rate": 0.3, "steps": 1, "multiple": 2},
    "macs": {"macs": 0.5},
    "kernels": {"templates": 8},
    "joint": {"act_bits": 0},
}
CONNECTIONS = ("saliency", "threshold", "macs")  # what these take out, others may not fill
FILLING = ("merge", "kernels")


def size(network):
    shape, classes = networks.SHAPE, networks.CLASSES
    made = Package(
        network=network, model=f"tests.networks:{NAME}", input_shape=shape, n_classes=classes
    )
    return len(encode(made, network))


def budget():
    return Goal(round(0.6 * size(networks.make(NAME))), size)


def apply(table, method, network, goal=None):
    function, kind = table[method]
    trains = issubclass(kind, FitConfig)
    fields = (QUICK if trains else {}) | OWN.get(method, {})
    config = settings.configure(kind, json.loads(json.dumps(fields)))
    data = networks.Imitation(networks.make(NAME)) if trains else IMAGES
    more = {} if table.keys() == pruners().keys() and not trains else {"goal": goal or budget()}
    return function(network, data, config, **more, seed=0).model


@cache
def pruned(method):
    network = networks.plant_duplicates_(networks.make(NAME), NAME)
    return apply(pruners(), method, network)


@cache
def clustered(pruner, clusterer):
    return apply(clusterers(), clusterer, pruned(pruner))


@pytest.mark.parametrize("pruner", CONNECTIONS)
@pytest.mark.parametrize("clusterer", FILLING)
def test_what_would_fill_pruned_connections_refuses_in_one_line_with_a_way_out(pruner, clusterer):
    with pytest.raises(ModelError, match="pruned") as caught:
        apply(clusterers(), clusterer, pruned(pruner), Goal(100, size))
    assert "\n" not in str(caught.value)
    assert any(way in str(caught.value) for way in ("none", "before", "share"))


@pytest.mark.parametrize("reducer", reducers())
@pytest.mark.parametrize(
    ("pruner", "clusterer"),
    [
        (pruner, clusterer)
        for pruner in pruners()
        for clusterer in clusterers()
        if not (pruner in CONNECTIONS and clusterer in FILLING)
    ],
)
def test_every_other_order_ends_in_a_file_that_fits_the_budget(pruner, clusterer, reducer):
    made = apply(reducers(), reducer, clustered(pruner, clusterer))
    assert size(made) <= budget().max_bytes
