from __future__ import annotations

import pytest
import torch
from torch import nn

from filterpress.fitting import Goal
from filterpress.methods.prune_structures import (
    StructureConfig,
    filter_scores,
    in_multiples,
    kept_of_blocks,
    prune_structures,
    weight_costs,
)
from filterpress.package import Package, count, encode, load, save
from filterpress.saliency import measure
from filterpress.surgery import channel_groups, is_depthwise, layers
from tests import networks

IMAGES = networks.images(64, 7)
every_network = pytest.mark.parametrize("name", networks.BUILDERS)


def config(**fields):
    return StructureConfig(
        **{"precision": "float32", "batch_size": 64, "steps": 1, "multiple": 1} | fields
    )


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def prune(network, seed=0, max_bytes=0, **fields):
    goal, task = Goal(max_bytes, size), networks.Imitation(network)
    return prune_structures(network, task, config(**fields), goal=goal, seed=seed)


def macs(network):
    return count(network, networks.SHAPE)[1]


def n_channels(network, *, linear):
    """Count the channels that can be cut, of convolutions or of fully connected layers."""
    return sum(
        group.n_channels
        for group in channel_groups(network, IMAGES[:2])
        if isinstance(network.get_submodule(group.producers[0].name), nn.Linear) == linear
    )


@every_network
@pytest.mark.parametrize("grain", ["filters", "channels"])
def test_multiply_accumulates_fall_and_the_network_runs(name, grain):
    network = networks.make(name)
    made = prune(network, grain=grain, rate=0.5)
    assert macs(made.model) < 0.9 * macs(network)
    assert sum(p.numel() for p in made.model.parameters()) < 0.9 * sum(
        p.numel() for p in network.parameters()
    )
    with torch.no_grad():
        outputs = made.model(IMAGES)
    assert outputs.shape == (64, networks.CLASSES)
    assert torch.isfinite(outputs).all()


@every_network
def test_of_all_filters_the_rate_goes(name):
    network = networks.make(name)
    made = prune(network, rate=0.25)
    before, after = (n_channels(n, linear=False) for n in (network, made.model))
    assert before - after == made.notes["channels"] - (3 if name == "flattening" else 0)
    assert before - after == round(0.25 * before)


def test_convolutions_and_fully_connected_layers_are_ranked_apart():
    network = networks.make("flattening")
    with torch.no_grad():
        network[12].weight *= 100  # what reads the neurons
    made = prune(network, rate=0.5)
    assert n_channels(made.model, linear=True) == 6
    assert n_channels(made.model, linear=False) == 9


def test_the_score_of_a_filter_is_its_saliency_for_its_cost():
    """Summed by hand in a residual network, over all that makes and reads a channel."""
    network = networks.make("residual")
    saliency = {n: torch.rand_like(w.weight) for n, w in layers(network).items()}
    costs = {n: 1.0 + number for number, n in enumerate(saliency)}
    for group in channel_groups(network, IMAGES[:2]):
        scores = filter_scores(group, saliency, costs)
        for channel in range(group.n_channels):
            worth = cost = 0.0
            for name, side in ((m.name, m.side) for m in group.members if m.name in saliency):
                part = saliency[name][channel] if side == "out" else saliency[name][:, channel]
                worth += float(part.sum())
                cost += part.numel() * costs[name]
            assert float(scores[channel]) == pytest.approx(worth / cost, rel=1e-4)


def test_a_flattened_channel_has_a_weight_for_each_position():
    network = networks.make("flattening")
    saliency = {n: torch.rand_like(w.weight) for n, w in layers(network).items()}
    (group,) = [
        g for g in channel_groups(network, IMAGES[:2]) if "8" in [m.name for m in g.consumers]
    ]
    scores = filter_scores(group, saliency, dict.fromkeys(saliency, 1.0))
    worth = saliency["3"][2].sum() + saliency["8"][:, 8:12].sum()
    assert float(scores[2]) == pytest.approx(float(worth) / (8 * 9 + 12 * 4), rel=1e-4)


@pytest.mark.parametrize(("n_kept", "n_found"), [(1, 4), (5, 4), (7, 8), (9, 8), (10, 10)])
def test_as_many_stay_as_the_nearest_multiple_or_all(n_kept, n_found):
    scores = torch.rand(10, generator=torch.Generator().manual_seed(0))
    kept = scores >= scores.sort(descending=True).values[n_kept - 1]
    (found,) = in_multiples([scores], [kept], 4)
    assert int(found.sum()) == n_found
    assert scores[found].min() >= scores[~found].max() if n_found < 10 else found.all()


@every_network
def test_widths_are_multiples_or_as_before(name):
    network = networks.make(name)
    made = prune(network, rate=0.5, multiple=4)
    before = {n: len(layer.weight) for n, layer in layers(network).items()}
    widths = {n: len(layer.weight) for n, layer in layers(made.model).items()}
    assert widths != before
    for n, width in widths.items():
        assert width == before[n] or width % 4 == 0


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_what_weights_cost_adds_up_to_the_network(balance):
    network = networks.make("residual")
    costs = weight_costs(network, IMAGES[:2], balance)
    sizes = {name: layer.weight.numel() for name, layer in layers(network).items()}
    assert sum(costs[name] * n for name, n in sizes.items()) == pytest.approx(1)
    stem, classifier = costs["stem.0"], costs["classifier"]
    n_weights, n_macs = sum(sizes.values()), macs(network)
    assert classifier == pytest.approx(balance / n_weights + (1 - balance) / n_macs)
    assert stem == pytest.approx(balance / n_weights + (1 - balance) * 64 / n_macs)


def test_balance_trades_multiply_accumulates_for_parameters():
    network = networks.make("residual")
    of_macs, of_parameters = (
        count(prune(network, rate=0.4, balance=b).model, networks.SHAPE) for b in (0.0, 1.0)
    )
    assert of_macs[1] < of_parameters[1]
    assert of_macs[0] > of_parameters[0]


def test_a_channel_that_one_layer_reads_is_cut_and_others_become_zeros():
    network = networks.make("residual")
    made = prune(network, grain="channels", rate=0.5)
    inner, stream = made.model.blocks[0].second[0], made.model.blocks[0].first[0]
    assert inner.in_channels < network.blocks[0].second[0].in_channels
    assert not (inner.weight == 0).all(dim=(0, 2, 3)).any()
    assert (stream.weight == 0).all(dim=(0, 2, 3)).any()


@every_network
def test_in_every_block_as_many_weights_stay(name):
    network = networks.make(name)
    made = prune(network, grain="n:m", rate=0.5)
    assert made.notes["pruned"] > 0
    assert macs(made.model) == macs(network)
    for layer in layers(made.model).values():
        weight = layer.weight.detach().flatten(2) if layer.weight.ndim > 2 else layer.weight
        for block in weight.split(4, dim=1):
            assert int((block != 0).sum(dim=1).max()) <= 2
        if is_depthwise(layer):
            assert layer.weight.all()


def test_of_each_block_the_most_salient_stay():
    score = torch.rand(3, 10, 2, 2, generator=torch.Generator().manual_seed(0))
    kept = kept_of_blocks(score, 2, 4)
    for o in range(3):
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            for start in (0, 4, 8):
                column = score[o, start : start + 4, y, x].tolist()
                highest = sorted(column)[-2:]
                found = kept[o, start : start + 4, y, x].tolist()
                assert found == [value in highest for value in column]


def test_the_same_network_gives_the_same_bytes_again():
    network = networks.make("residual")
    states = [prune(network, seed=1, rate=0.3).model.state_dict() for _ in range(2)]
    assert all(states[0][key].equal(value) for key, value in states[1].items())


def test_turns_go_on_where_the_last_one_ended():
    network = networks.make("residual")
    made = prune(network, rate=0.5, steps=3)
    assert n_channels(made.model, linear=False) == n_channels(network, linear=False) // 2


def test_the_lowest_filters_of_the_network_go():
    network = networks.make("grouped")
    saliency = measure(network, networks.Imitation(network), config())
    costs = weight_costs(network, IMAGES[:2], 0.5)
    groups = channel_groups(network, IMAGES[:2])
    scores = torch.cat([filter_scores(group, saliency, costs) for group in groups])
    n_gone = round(0.3 * len(scores))
    border = scores.sort().values[n_gone]
    expected = [int((filter_scores(g, saliency, costs) >= border).sum()) for g in groups]
    made = prune(network, rate=0.3).model
    assert [g.n_channels for g in channel_groups(made, IMAGES[:2])] == expected


class Unknown(nn.Module):
    """A network whose channels cannot be followed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3)
        self.norm = nn.GroupNorm(2, 6)
        self.second = nn.Conv2d(6, 5, 3)

    def forward(self, x):
        return self.second(self.norm(self.first(x))).mean((2, 3))


def test_a_network_whose_channels_cannot_be_cut_is_passed_on():
    network = Unknown().eval()
    made = prune(network, rate=0.5)
    assert (made.notes["pruned"], made.layers) == (0, {})
    before = network.state_dict()
    assert all(before[key].equal(value) for key, value in made.model.state_dict().items())


def test_a_network_that_fits_comes_back_as_it_is():
    network = networks.make("residual")
    made = prune(network, max_bytes=10**6)
    assert made.layers == {}
    before = network.state_dict()
    assert all(before[key].equal(value) for key, value in made.model.state_dict().items())


def test_a_package_of_a_smaller_network_comes_back(tmp_path):
    made = prune(networks.make("residual"), rate=0.5).model
    source = Package(
        network=made, model="tests.networks:residual", input_shape=networks.SHAPE, n_classes=5
    )
    save(source, tmp_path)
    with torch.no_grad():
        assert load(tmp_path).network(IMAGES).equal(made(IMAGES))


@pytest.mark.parametrize(
    ("field", "value"),
    [("grain", "kernels"), ("balance", 1.1), ("multiple", 0), ("m", 1), ("rate", -0.5)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        StructureConfig(**{field: value})
