from __future__ import annotations

import pytest
import torch

from filterpress.compensation import ChannelStatistics
from filterpress.fitting import Goal
from filterpress.methods.merge_filters import (
    MergeConfig,
    central_channels,
    cluster_levels,
    merge_filters,
)
from filterpress.statistics import measure
from filterpress.surgery import channel_groups, layers
from tests import networks

IMAGES = networks.images(200)


def goal(n_bytes):
    return Goal(round(n_bytes), n_weights)


def n_weights(network):
    return sum(p.numel() for p in network.parameters())


def outputs(network, images=IMAGES):
    with torch.no_grad():
        return network(images)


def views_of(features, importance=None):
    """Return what one consumer knows of channels ``(n, positions)``."""
    n = len(features)
    importance = torch.eye(n) if importance is None else importance
    return [ChannelStatistics(features @ features.T / features.shape[1], importance)]


def test_planted_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 500, generator=generator)
    planted = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 2, 2])
    sizes = 0.5 + torch.rand(10, 1, generator=generator)
    noise = 0.05 * torch.randn(10, 500, generator=generator)
    kept = central_channels(views_of(sizes * centres[planted] + noise), 4)
    assert int(kept.sum()) == 4
    assert sorted(planted[kept].tolist()) == [0, 1, 2, 3]


def test_no_more_channels_stay_than_clusters():
    features = torch.randn(9, 200, generator=torch.Generator().manual_seed(0))
    for k in range(1, 10):
        assert 1 <= int(central_channels(views_of(features), k).sum()) <= k
    assert central_channels(views_of(features), 9).all()


def test_a_channel_without_power_is_no_reason_for_nan():
    features = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    features[2] = 0
    assert int(central_channels(views_of(features), 3).sum()) == 3


@pytest.mark.parametrize("name", ["residual", "grouped", "flattening", "concatenating"])
def test_merging_duplicates_costs_next_to_nothing(name):
    copies = (3, 5, 6)
    network = networks.plant_duplicates_(networks.make(name), name, copies)
    producer, moments = networks.CHAINS[name][0], measure(network, IMAGES)
    group = next(g for g in channel_groups(network, IMAGES[:2]) if g.producers[0].name == producer)
    levels = cluster_levels(network, group, moments)
    n_distinct = group.n_channels - len(copies)
    damages = {
        int(keep.sum()): float(d) for keep, d in zip(levels.kept, levels.damage, strict=True)
    }
    without = [d for n, d in damages.items() if n >= n_distinct]
    with_distinct = [d for n, d in damages.items() if n < n_distinct]
    assert len(without) > 1
    assert max(without) < 0.1 * min(with_distinct)


@pytest.mark.parametrize("name", ["residual", "grouped", "flattening", "concatenating"])
def test_planted_duplicates_are_merged_under_a_tight_budget(name):
    network = networks.plant_duplicates_(networks.make(name), name, (3, 5, 6))
    producer = networks.CHAINS[name][0]
    made = merge_filters(network, IMAGES, MergeConfig(), goal=goal(n_weights(network) * 0.15))
    assert made.layers[producer]["merged"] >= 3
    weight = made.model.get_submodule(producer).weight.detach().flatten(1)
    assert len(weight.unique(dim=0)) == len(weight)


def test_a_smaller_budget_never_merges_fewer():
    network = networks.make("residual")
    merged = [
        merge_filters(network, IMAGES, MergeConfig(), goal=goal(share * n_weights(network))).notes[
            "merged"
        ]
        for share in (10.0, 0.5, 0.1, 0.02)
    ]
    assert merged == sorted(merged)
    assert merged[0] == 0
    assert merged[-1] > 0


def test_summed_outputs_stay():
    network = networks.make("residual")
    made = merge_filters(network, IMAGES, MergeConfig(), goal=goal(100))
    summed = {"stem.0", "blocks.0.second.0", "blocks.1.second.0", "blocks.1.shortcut.0"}
    assert made.layers
    assert not summed & made.layers.keys()
    for name in summed:
        before, after = (n.get_submodule(name).weight for n in (network, made.model))
        assert len(before) == len(after)


def test_narrow_layers_stay():
    network = networks.make("residual")
    made = merge_filters(network, IMAGES, MergeConfig(min_channels=12), goal=goal(100))
    assert made.layers
    assert all(len(network.get_submodule(name).weight) >= 12 for name in made.layers)


def test_every_layer_keeps_a_filter():
    for name in networks.BUILDERS:
        made = merge_filters(networks.make(name), IMAGES, MergeConfig(min_channels=2), goal=goal(1))
        assert all(len(layer.weight) >= 1 for layer in layers(made.model).values())
        assert torch.isfinite(outputs(made.model)).all()


@pytest.mark.parametrize(("field", "value"), [("images", 0), ("min_channels", 1)])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be at least"):
        MergeConfig(**{field: value})
