from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from filterpress.fitting import Goal
from filterpress.methods.prune_salient import SaliencyConfig, prune_salient
from filterpress.package import Package, encode
from filterpress.retraining import fine_tune_
from filterpress.saliency import measure
from filterpress.surgery import layers
from tests import networks

IMAGES = networks.images(128, 7)


def config(**fields):
    return SaliencyConfig(**{"precision": "float32", "batch_size": 64, "steps": 1} | fields)


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def prune(network, seed=0, max_bytes=0, **fields):
    goal, task = Goal(max_bytes, size), networks.Imitation(network)
    return prune_salient(network, task, config(**fields), goal=goal, seed=seed)


def weights(network):
    return {name: layer.weight.detach() for name, layer in layers(network).items()}


def zeros(network):
    return sum(int((weight == 0).sum()) for weight in weights(network).values())


def flat(network):
    return torch.cat([weight.flatten() for weight in weights(network).values()])


def divergence(network, teacher):
    with torch.no_grad():
        found, wanted = (F.log_softmax(n(IMAGES), 1) for n in (network, teacher))
    return float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))


def test_the_weights_of_least_saliency_in_the_network_go():
    network = networks.make("concatenating")
    saliency = measure(network, networks.Imitation(network), config())
    made = prune(network, rate=0.6)
    assert made.notes["channels"] == 0
    expected = sorted(float(s) for score in saliency.values() for s in score.flatten())
    n_gone = round(0.6 * len(expected))
    assert zeros(made.model) == n_gone
    assert made.notes["pruned"] == pytest.approx(n_gone / len(expected))
    for name, weight in weights(made.model).items():
        assert (weight == 0).equal(saliency[name] <= expected[n_gone - 1])


def test_layers_lose_different_shares():
    made = prune(networks.make("residual"), rate=0.5)
    shares = [entry["pruned"] for entry in made.layers.values()]
    assert min(shares) < 0.4
    assert max(shares) > 0.55


def test_what_an_early_turn_prunes_stays_pruned():
    network = networks.make("concatenating")
    early = prune(network, rate=0.5 * (1 - 0.5**3), lr=0.05)
    late = prune(network, rate=0.5, steps=2, lr=0.05)
    assert late.notes["channels"] == 0
    for name, weight in weights(early.model).items():
        assert not weights(late.model)[name][weight == 0].any()
    assert zeros(late.model) == round(0.5 * len(flat(network))) > zeros(early.model)


def test_what_stays_is_trained_to_make_up_for_what_went():
    network = networks.make("residual")
    made = prune(network, rate=0.5, epochs=6, lr=0.05)
    untrained = copy.deepcopy(network)
    saliency = measure(network, networks.Imitation(network), config())
    border = torch.cat([s.flatten() for s in saliency.values()]).quantile(0.5)
    with torch.no_grad():
        for name, layer in layers(untrained).items():
            layer.weight.masked_fill_(saliency[name] <= border, 0)
    assert divergence(made.model, network) < 0.7 * divergence(untrained, network)


def test_a_later_training_leaves_zeros_alone():
    network = networks.make("residual")
    made = prune(network, rate=0.6).model
    before = {name: weight.clone() for name, weight in weights(made).items()}
    fine_tune_(made, network, networks.Imitation(network), config(lr=0.1), seed=1)
    for name, weight in weights(made).items():
        assert (weight == 0).equal(before[name] == 0)
        assert not weight.equal(before[name])


def test_channels_that_nothing_reads_go():
    network = networks.make("residual")
    made = prune(network, rate=0.9)
    n_before, n_after = (sum(p.numel() for p in n.parameters()) for n in (network, made.model))
    assert made.notes["channels"] > 0
    assert n_after < n_before


def test_vectors_are_never_pruned():
    made = prune(networks.make("concatenating"), rate=0.9, lr=1e-6)
    assert all(p.all() for p in made.model.parameters() if p.ndim == 1)


def test_a_smaller_budget_prunes_more():
    network = networks.make("residual")
    whole = size(network)
    made = [prune(network, max_bytes=whole * share // 100) for share in (55, 45, 35)]
    pruned = [m.notes["pruned"] for m in made]
    assert pruned == sorted(pruned)
    assert 0 < pruned[0] < pruned[2]


def test_a_network_that_fits_comes_back_as_it_is():
    network = networks.make("residual")
    made = prune(network, max_bytes=10**6)
    assert made.notes["pruned"] == 0
    assert made.layers == {}
    assert made.model is not network
    before = network.state_dict()
    assert all(before[key].equal(value) for key, value in made.model.state_dict().items())


def test_the_seed_decides():
    network = networks.make("residual")
    states = [prune(network, seed=seed, rate=0.5).model.state_dict() for seed in (3, 3, 4)]
    assert all(states[0][key].equal(value) for key, value in states[1].items())
    assert not all(states[0][key].equal(value) for key, value in states[2].items())


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"^rate must be in \["):
        SaliencyConfig(rate=1.0)
