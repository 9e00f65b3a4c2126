"""What every method promises, for every row of the tables of methods."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch
from torch import nn

from filterpress import settings
from filterpress.errors import ModelError
from filterpress.fitting import Goal
from filterpress.methods import Outcome
from filterpress.package import Package, encode, load, save
from filterpress.representations import is_quantized
from filterpress.stages.tables import clusterers, pruners, reducers
from filterpress.statistics import recalibrate_
from filterpress.training import FitConfig
from tests import networks

TABLES = {"prune": pruners(), "cluster": clusterers(), "reduce": reducers()}
FORMS = {  # what is tried of a method, where that is not its defaults alone
    ("prune", "blocks"): ['{"allowance": 1000.0}'],
    ("prune", "structured"): [
        "{}",
        '{"grain": "channels", "rate": 0.3, "steps": 1, "multiple": 2}',
        '{"grain": "n:m", "rate": 0.5, "steps": 1}',
    ],
    ("cluster", "kernels"): ['{"templates": 4, "scope": "net"}'],
    ("reduce", "quantize"): [
        "{}",
        '{"bits": 4}',
        '{"bits": 3, "grid": "asymmetric", "per": "tensor"}',
        '{"bits": 2, "grid": "codebook", "per": "tensor", "rounding": "learned"}',
    ],
}
ROWS = [
    (stage, (name, form))
    for stage, table in TABLES.items()
    for name in table
    for form in FORMS.get((stage, name), ["{}"])
]
IMAGES = networks.images(96)
QUICK = {"epochs": 1, "batch_size": 64, "precision": "float32"}  # for methods that train
# networks in which a method finds nothing, whatever its settings
BARREN = {("prune", "blocks"): {"grouped", "concatenating", "flattening"}}
# overrides with which a method finds nothing to gain in networks without duplicates
IDLE = {
    ("prune", "similarity"): {"threshold": 1.0},
    ("reduce", "quantize"): {"bits": 8},
    ("reduce", "joint"): {"bits": 8, "act_bits": 0, "lr": 1e-6},
}

every_row = pytest.mark.parametrize(("stage", "method"), ROWS, ids=str)
every_method = pytest.mark.parametrize(
    ("stage", "method"), [(stage, name) for stage, table in TABLES.items() for name in table]
)
every_network = pytest.mark.parametrize("name", networks.BUILDERS)


def package_of(name, network):
    return Package(
        network=network,
        model=f"tests.networks:{name}",
        input_shape=networks.SHAPE,
        n_classes=networks.CLASSES,
    )


def size_of(name, network):
    return len(encode(package_of(name, network), network))


def source(name):
    """Make a network in which every method has something to gain."""
    return networks.plant_duplicates_(networks.make(name), name)


def run(stage, row, name, network, *, max_bytes, seed=0) -> Outcome:
    method, form = row
    function, kind = TABLES[stage][method]
    trains, fields = issubclass(kind, FitConfig), settings.parse(form)
    config = settings.configure(kind, QUICK | fields if trains else fields)
    more = {"goal": Goal(max_bytes, lambda made: size_of(name, made))}
    if stage == "prune" and not trains:
        more = {}
    return function(network, task(name) if trains else IMAGES, config, seed=seed, **more)


@cache
def task(name):
    """Make a task of what a network says of images."""
    return networks.Imitation(networks.make(name))


def budget(stage, method, name):
    """Choose bytes that a method has to work for: `merge` counts weights, others the file."""
    if (stage, method[0]) == ("cluster", "merge"):
        return n_weights(source(name)) // 4
    return size_of_source(name) // 2


@cache
def size_of_source(name):
    """Encode the network of `source` once for all tests."""
    return size_of(name, source(name))


def n_weights(network):
    """Count the weights that have not been pruned."""
    return sum(int(p.count_nonzero()) for p in network.parameters())


@cache
def given(stage, method, name):
    """Run a method once for all tests that only look; return its argument and what came out."""
    network = source(name)
    return network, run(stage, method, name, network, max_bytes=budget(stage, method, name))


def outcome(stage, method, name) -> Outcome:
    return given(stage, method, name)[1]


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


@every_row
@every_network
def test_the_network_given_is_untouched(stage, method, name):
    network, made = given(stage, method, name)
    assert same_state(network, source(name))
    assert repr(network) == repr(source(name))
    assert IMAGES.equal(networks.images(96))
    storage = {p.data_ptr() for p in network.parameters()}
    assert not storage & {p.data_ptr() for p in made.model.parameters()}
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())


@every_row
@every_network
def test_the_same_seed_gives_the_same_bytes(stage, method, name):
    again = run(stage, method, name, source(name), max_bytes=budget(stage, method, name))
    first = outcome(stage, method, name)
    assert same_state(first.model, again.model)
    assert first.notes == again.notes
    assert first.layers == again.layers


@every_row
@every_network
def test_the_result_takes_the_same_images_and_is_ready_to_use(stage, method, name):
    made = outcome(stage, method, name)
    with torch.no_grad():
        outputs = made.model(networks.images(3, 9))
    assert outputs.shape == (3, networks.CLASSES)
    assert torch.isfinite(outputs).all()
    assert not any(module.training for module in made.model.modules())
    numbers = [v for v in made.notes.values() if not isinstance(v, str)]
    assert all(math.isfinite(v) for v in numbers)


@every_row
@every_network
def test_something_was_gained_and_reported(stage, method, name):
    made = outcome(stage, method, name)
    if name in BARREN.get((stage, method[0]), ()):
        assert not made.layers
        assert same_state(made.model, source(name))
        return
    assert made.layers
    assert set(made.layers) <= {n for n, _ in source(name).named_modules()}
    if stage != "reduce":
        assert n_weights(made.model) < n_weights(source(name))


@every_row
@every_network
def test_a_package_of_the_result_comes_back_bit_by_bit(stage, method, name, tmp_path):
    network = outcome(stage, method, name).model
    save(package_of(name, network), tmp_path)
    back = load(tmp_path).network
    images = networks.images(3, 9)
    with torch.no_grad():
        assert back(images).equal(network(images))
    assert encode(package_of(name, back), back) == encode(package_of(name, network), network)


@every_row
@every_network
def test_the_encoded_file_does_not_grow(stage, method, name):
    assert size_of(name, outcome(stage, method, name).model) <= size_of_source(name)


@every_row
def test_weights_that_are_not_finite_are_refused_in_one_line(stage, method):
    network = source("residual")
    with torch.no_grad():
        network.blocks[0].first[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"blocks\.0\.first\.0\.weight must be finite") as caught:
        run(stage, method, "residual", network, max_bytes=5000)
    assert "\n" not in str(caught.value)


@every_method
def test_the_default_config_is_valid_and_its_text_rebuilds_it(stage, method):
    function, kind = TABLES[stage][method]
    config = kind()
    assert eval(repr(config), {kind.__name__: kind}) == config  # noqa: S307  # what repr is for
    chosen = settings.choose(TABLES[stage], f'{{"method": "{method}"}}')
    assert chosen == (method, function, config)


@every_method
@every_network
def test_a_network_with_nothing_to_gain_comes_back_the_same(stage, method, name):
    network = networks.make(name)
    recalibrate_(network, IMAGES)
    idle = json.dumps(IDLE.get((stage, method), {}))
    made = run(stage, (method, idle), name, network, max_bytes=10**7).model
    assert made is not network
    if stage == "reduce":  # which always quantises
        images = networks.images(200, 9)
        with torch.no_grad():
            error = made(images) - network(images)
        assert float(error.square().mean().sqrt()) < 0.02
    else:
        assert same_state(made, network)


@every_row
@every_network
def test_a_network_that_has_been_reduced_can_be_worked_on_again(stage, method, name):
    reduced = outcome("reduce", ("project", "{}"), name).model
    made = run(stage, method, name, reduced, max_bytes=budget(stage, method, name) * 3 // 4).model
    with torch.no_grad():
        outputs = made(networks.images(3, 9))
    assert torch.isfinite(outputs).all()
    assert any(is_quantized(m) for m in reduced.modules())
    assert isinstance(made, nn.Module)
