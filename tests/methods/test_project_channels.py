from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import nn

from filterpress.allocation import Option, options
from filterpress.chains import project
from filterpress.errors import ModelError
from filterpress.fitting import Goal
from filterpress.methods.project_channels import ProjectionConfig, project_channels
from filterpress.package import Package, encode
from filterpress.representations import Chain, has_codebook, is_quantized
from filterpress.statistics import measure, recalibrate_
from filterpress.subspaces import channel_moments, input_subspaces
from filterpress.surgery import layers, plain
from tests import networks
from tests.moments import apart, white

IMAGES = networks.images(128)


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def run(network, max_bytes, *, avoid=frozenset(), seed=0, **fields):
    return project_channels(
        network,
        IMAGES,
        ProjectionConfig(**fields),
        goal=Goal(max_bytes, size, avoid),
        seed=seed,
    )


def low_rank_(layer, rank, seed=0):
    """Let a layer's filters live in few directions of its input channels."""
    generator = torch.Generator().manual_seed(seed)
    n_out, n_in = layer.weight.shape[:2]
    taps = layer.weight[0, 0].numel()
    inner = torch.randn(n_out, rank, taps, generator=generator)
    basis = torch.randn(rank, n_in, generator=generator)
    with torch.no_grad():
        weight = torch.einsum("ort,ri->oit", inner, basis)
        layer.weight.copy_(weight.view_as(layer.weight) / math.sqrt(n_in * taps * rank))


class Wide(nn.Module):
    """Two wide convolutions, of which the second may have low rank."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, networks.CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.wide(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def wide():
    network = networks.randomise_(Wide())
    low_rank_(network.wide, 3)
    return network


def test_planted_low_rank_is_found(wide):
    made = run(wide, size(wide) // 2)
    assert 3 <= made.layers["wide"]["rank"] <= 6
    assert isinstance(made.model.wide, Chain)
    assert isinstance(made.model.stem, nn.Conv2d)
    with torch.no_grad():
        expected = wide(IMAGES)
        error = (made.model(IMAGES) - expected).square().mean() / expected.var(dim=0).mean()
    assert float(error) < 0.05


def test_every_layer_is_quantised(wide):
    made = run(wide, size(wide) // 2)
    assert all(is_quantized(layer) for layer in layers(made.model).values())


def uneven_(layer):
    """Let a layer's weights be four numbers that no step divides."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor([-0.31, -0.02, 0.11, 0.17])
    with torch.no_grad():
        layer.weight.copy_(numbers[torch.randint(4, layer.weight.shape, generator=generator)])


@pytest.mark.parametrize("levels", ["steps", "widths", "codebooks", "all"])
def test_a_codebook_is_taken_where_weights_are_one_and_it_is_on_offer(levels):
    network = networks.randomise_(Wide())
    uneven_(network.wide)
    made = run(network, 4000, levels=levels)
    wide = made.model.wide
    offered = levels in ("codebooks", "all")
    assert has_codebook(wide) == offered
    assert made.layers["wide"].get("bits") == (2.0 if offered else None)
    assert size(made.model) <= 4000
    if offered:
        assert wide.weight.detach().allclose(network.wide.weight, atol=1e-3)


def test_more_kinds_of_levels_are_never_predicted_to_damage_more(wide):
    few, many = (run(wide, size(wide) // 4, levels=levels) for levels in ("steps", "all"))
    assert many.notes["distortion"] <= 1.05 * few.notes["distortion"]


@cache
def trained():
    network = networks.make("residual")
    recalibrate_(network, IMAGES)
    return network


@cache
def reduced(share):
    """Shrink one network to a share of its size, once for all tests that look at it."""
    budget = round(share * size(trained()))
    return budget, run(trained(), budget)


@pytest.mark.parametrize("share", [0.7, 0.5, 0.35])
def test_a_budget_is_met_and_used(share):
    budget, made = reduced(share)
    assert 0.85 * budget < size(made.model) <= budget
    assert made.notes["expected_bytes"] == pytest.approx(size(made.model), rel=0.02)


def test_more_bytes_give_a_closer_network():
    with torch.no_grad():
        errors = [
            float((reduced(share)[1].model(IMAGES) - trained()(IMAGES)).square().mean())
            for share in (0.7, 0.5, 0.35)
        ]
    assert errors == sorted(errors)


def test_a_budget_that_cannot_be_met_gives_the_smallest_file():
    network = networks.make("grouped")
    hopeless, smallest = (size(run(network, n).model) for n in (10, 500))
    assert hopeless > 10
    assert hopeless <= smallest


def test_an_allocation_that_failed_is_not_taken_again():
    budget, made = reduced(0.5)
    first = made.notes["allocation"]
    second = run(trained(), budget, avoid=frozenset([first]))
    assert second.notes["allocation"] != first
    assert size(second.model) <= budget


def test_running_out_of_allocations_is_said():
    class Everything(frozenset):
        def __contains__(self, item):
            return True

    with pytest.raises(ModelError, match="has failed before"):
        run(networks.make("grouped"), 2000, avoid=Everything())


def test_one_pass_shrinks_no_further_than_allowed():
    network = networks.make("concatenating")
    before = size(network)
    made = run(network, before // 4, max_shrink=1.5)
    assert before / 1.5 * 0.85 < size(made.model) <= before / 1.5 + 1


def test_one_group_is_all_that_is_offered_when_asked():
    made = run(networks.make("concatenating"), 2000, max_groups=1)
    assert {entry["groups"] for entry in made.layers.values()} == {1.0}


def test_nothing_is_projected_or_folded_without_groups_and_zeros_stay():
    network = networks.make("bottlenecks")
    generator = torch.Generator().manual_seed(0)
    pruned = torch.rand(network.last.weight.shape, generator=generator) < 0.7
    with torch.no_grad():
        network.last.weight[pruned] = 0
    made = run(network, size(network) // 2, max_groups=0)
    assert (made.notes["projected"], made.notes["folded"]) == (0.0, 0.0)
    assert (made.model.last.weight[pruned] == 0).all()
    assert made.model.last.weight.any()


def test_chains_stand_beside_projections_where_they_are_named():
    network = networks.make("concatenating")
    alone = run(network, size(network) // 3)
    beside = run(network, size(network) // 3, kinds="cp,separable")
    taken = {entry["kind"] for entry in beside.layers.values() if "kind" in entry}
    assert taken
    assert taken <= {"cp", "separable"}
    assert beside.notes["cut"] == sum("kind" in entry for entry in beside.layers.values())
    assert not any("kind" in entry for entry in alone.layers.values())


def test_grouped_and_depthwise_convolutions_are_quantised_only():
    for name, layer in (("grouped", "grouped"), ("depthwise", "block.depthwise")):
        network = networks.make(name)
        made = run(network, size(network) // 2)
        assert made.layers[layer]["rank"] == 0
        assert is_quantized(made.model.get_submodule(layer))


def statistics_of(layer, images):
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(images).flatten(1).shape[1], 3))
    return measure(network.eval(), images)["0"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.Conv2d(6, 8, 1),
    ],
    ids=["3x3", "strided", "1x1"],
)
def test_a_projection_of_full_rank_and_fine_steps_is_the_layer_itself(layer, groups):
    images = networks.images(256, shape=(6, 8, 8))
    moments = statistics_of(layer, images)
    weight = layer.weight.detach()
    channels = channel_moments(weight, moments)
    subspaces = input_subspaces(weight, moments.outputs[0], channels, groups)
    option = Option(6, subspaces, (), 0.0)
    made = project(layer, option, moments, 1e-12)
    with torch.no_grad():
        expected, found = layer(images), made(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.std()))
    assert (len(made) == 3) == (groups > 1)


def test_the_damage_predicted_is_the_damage_done():
    layer = nn.Conv2d(16, 24, 3)
    low_rank_(layer, 8)
    gain = torch.linspace(0.5, 2.0, 24)
    moments = apart(torch.eye(144)[None], gain)
    for option in options(layer, moments, max_groups=2)[1:]:
        made = project(layer, option, moments, 1e-10)
        weight = layers(plain(nn.Sequential(made)))["0"].weight.detach()
        done = moments.error(weight - layer.weight.detach())
        assert done == pytest.approx(option.damage, rel=0.05, abs=1e-4)


def test_a_layer_that_stays_cannot_be_projected():
    layer = nn.Conv2d(4, 4, 1)
    moments = white(4, 4)
    with pytest.raises(ValueError, match="option must have a rank"):
        project(layer, Option(0, None, (), 0.0), moments, 1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", 0),
        ("max_groups", -1),
        ("kinds", "svd,cpp"),
        ("levels", "some"),
        ("max_shrink", 0.5),
        ("max_shrink", 1.0),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        ProjectionConfig(**{field: value})


@pytest.mark.parametrize("max_shrink", [float("nan"), float("inf"), 1.0, 0.5, -2.0])
def test_a_pass_that_shrinks_by_no_sensible_factor_is_refused(max_shrink):
    with pytest.raises(ValueError, match="max_shrink must be 0 or above 1, got"):
        ProjectionConfig(max_shrink=max_shrink)
