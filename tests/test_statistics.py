from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filterpress import statistics
from filterpress.errors import ModelError
from filterpress.statistics import Moments, measure, note_offsets_, patches, recalibrate_
from tests import networks
from tests.moments import apart

LAYERS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "1x1": nn.Conv2d(4, 6, 1, stride=2),
}
IMAGES = networks.images(12, shape=(4, 8, 8))


def unfolded(layer, x):
    """Return the patches ``(groups, N * positions, d)`` of a convolution, by torch itself."""
    columns = F.unfold(
        x, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )  # (N, I kh kw, positions)
    n, _, positions = columns.shape
    columns = columns.view(n, layer.groups, -1, positions)
    return columns.permute(1, 0, 3, 2).reshape(layer.groups, n * positions, -1)


@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_are_the_second_moment_of_unfolded_patches(kind):
    layer = LAYERS[kind]
    n_outputs = layer(IMAGES).flatten(1).shape[1]
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(n_outputs, 3)).eval()
    found = measure(network, IMAGES)["0"]
    seen = unfolded(layer, IMAGES)
    expected = torch.einsum("gnd,gne->gde", seen, seen) / seen.shape[1]
    torch.testing.assert_close(found.inputs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean, seen.mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_patches_are_padded_as_the_layer_pads(mode):
    layer = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)
    shape = layer(IMAGES).shape
    seen = patches(layer, IMAGES, shape, 10**6, torch.Generator().manual_seed(0))
    outputs = seen[0] @ layer.weight.flatten(1).T + layer.bias
    expected = layer(IMAGES).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_inputs_of_a_linear_layer_are_its_own():
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval()
    seen = IMAGES.flatten(1)
    expected = (seen.T @ seen / len(seen))[None]
    torch.testing.assert_close(measure(network, IMAGES)["1"].inputs, expected, rtol=1e-4, atol=1e-5)


def test_a_sample_of_positions_holds_rows_of_all():
    layer = LAYERS["strided"]
    shape = layer(IMAGES).shape
    every = patches(layer, IMAGES, shape, 10**6, torch.Generator().manual_seed(0))
    some = patches(layer, IMAGES, shape, 5, torch.Generator().manual_seed(0))
    assert some.shape == (1, len(IMAGES) * 5, every.shape[2])
    distances = torch.cdist(some[0], every[0]).amin(dim=1)
    torch.testing.assert_close(distances, torch.zeros_like(distances), rtol=0, atol=2e-2)


def feature_maps(network, images, names):
    """Run a network; return its layers' outputs by name, and its own as ``outputs``."""
    made = {}

    def listen(name):
        def keep(module, args, output):
            made[name] = output

        return network.get_submodule(name).register_forward_hook(keep)

    handles = [listen(name) for name in names]
    made["outputs"] = network(images)
    for handle in handles:
        handle.remove()
    return made


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_outputs_are_the_second_moment_of_gradients_of_each_image(name, monkeypatch):
    network, images = networks.make(name), networks.images(5)
    directions = []
    original = statistics._direction

    def remembered(outputs, generator):
        directions.append(original(outputs, generator))
        return directions[-1]

    monkeypatch.setattr(statistics, "_direction", remembered)
    found = measure(network, images)
    totals = {key: torch.zeros_like(value.outputs) for key, value in found.items()}
    for image, direction in zip(images, torch.cat(directions), strict=True):
        made = feature_maps(network, image[None], list(found))
        gradients = torch.autograd.grad(made.pop("outputs") @ direction, list(made.values()))
        for key, gradient in zip(made, gradients, strict=True):
            rows = gradient[0].reshape(*totals[key].shape[:2], -1)  # (G, O/G, positions)
            totals[key] += rows @ rows.mT / len(images)
    for key, total in totals.items():
        torch.testing.assert_close(found[key].outputs, total, rtol=1e-3, atol=1e-6)
        assert found[key].gain.equal(torch.cat([part.diagonal() for part in found[key].outputs]))


def test_directions_have_the_curvature_of_the_softened_softmax():
    outputs = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = statistics._direction(outputs.expand(200_000, -1), generator)
    p = torch.softmax(outputs[0] / statistics.TEMPERATURE, dim=0)
    torch.testing.assert_close(
        drawn.T @ drawn / len(drawn), torch.diag(p) - p[:, None] * p, rtol=0, atol=3e-3
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_importance_is_what_an_error_of_one_weight_costs(groups):
    root = torch.randn(groups, 5, 5)
    moments = apart(root @ root.mT, torch.rand(6))
    for row, column in ((0, 0), (3, 4), (5, 2)):
        delta = torch.zeros(6, 5)
        delta[row, column] = 0.3
        assert moments.error(delta) == pytest.approx(
            0.5 * 0.09 * float(moments.importance[row, column])
        )


@pytest.mark.parametrize("groups", [1, 3])
def test_error_is_the_quadratic_form_of_both_sides(groups):
    generator = torch.Generator().manual_seed(1)
    d, n_out = 8, 6
    root = torch.randn(groups, d, d, generator=generator)
    side = torch.randn(groups, n_out // groups, n_out // groups, generator=generator)
    moments = Moments(root @ root.mT, side @ side.mT)
    delta = torch.randn(n_out, 2, 2, 2, generator=generator)
    expected = 0.0
    for group, rows in enumerate(delta.flatten(1).split(n_out // groups)):
        error = moments.outputs[group] @ rows @ moments.inputs[group] @ rows.T
        expected += 0.5 * float(error.trace())
    assert moments.error(delta) == pytest.approx(expected, rel=1e-4)
    assert float(moments.errors(delta).sum()) == pytest.approx(expected, rel=1e-4)
    assert moments.error(torch.zeros_like(delta)) == 0


@torch.no_grad()
def test_error_predicts_the_change_of_the_outputs_of_a_linear_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(32, 6)).eval()
    images = networks.images(20_000, shape=(2, 4, 4))
    delta = 1e-2 * torch.randn(6, 32)
    moments = measure(network, images)["1"]
    p = torch.softmax(network(images) / statistics.TEMPERATURE, dim=1)
    change = images.flatten(1) @ delta.T
    expected = 0.5 * ((p * change.square()).sum(dim=1) - (p * change).sum(dim=1).square()).mean()
    assert moments.error(delta) == pytest.approx(float(expected), rel=0.1)


def test_measuring_leaves_nothing_behind():
    network = networks.make("residual")
    before = copy.deepcopy(network.state_dict())
    first = measure(network, networks.images(20), seed=3)
    assert all(before[key].equal(value) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())
    second = measure(network, networks.images(20), seed=3)
    assert all(first[key].gain.equal(second[key].gain) for key in first)


def test_a_layer_that_is_not_used_has_no_statistics():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(128, 3), nn.Linear(128, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    assert set(measure(Idle().eval(), networks.images(4))) == {"used"}


def test_many_images_give_the_same_statistics_as_few_at_a_time():
    network, images = networks.make("flattening"), networks.images(700)
    whole = measure(network, images)
    halves = [measure(network, part) for part in images.split(350)]
    # the last layer before the outputs sees every position of every image
    expected = (halves[0]["12"].inputs + halves[1]["12"].inputs) / 2
    torch.testing.assert_close(whole["12"].inputs, expected, rtol=1e-3, atol=1e-4)


def test_recalibrated_norms_have_the_statistics_of_what_reaches_them():
    network, images = networks.make("residual"), networks.images(40)
    recalibrate_(network, images)
    seen = network.stem[0](images)
    norm = network.stem[1]
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, seen.transpose(0, 1).flatten(1).var(dim=1))
    assert norm.momentum == 0.1
    assert not any(module.training for module in network.modules())


def test_recalibration_keeps_weights_and_dropout_out_of_it():
    network, images = networks.make("flattening"), networks.images(40)
    before = copy.deepcopy(dict(network.named_parameters()))
    recalibrate_(network, images)
    once = copy.deepcopy(network.state_dict())
    recalibrate_(network, images)
    assert all(p.equal(before[key]) for key, p in network.named_parameters())
    assert all(once[key].equal(value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "flattening", "depthwise"])
def test_a_network_that_has_not_changed_keeps_its_own_statistics(name):
    """Those of training, and not what a few other images happen to have."""
    network, few = networks.make(name), networks.images(12, seed=9)
    found = statistics.plain_for(network, few)
    recalibrate_(found, few)
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-4, atol=1e-4)
    assert set(found.state_dict()) == set(network.state_dict())


def test_the_statistics_of_training_follow_a_change_in_proportion():
    network, few = networks.make("residual"), networks.images(12, seed=9)
    found = statistics.plain_for(network, few)
    before = found.stem[1].running_mean.clone(), found.stem[1].running_var.clone()
    with torch.no_grad():
        found.stem[0].weight.mul_(3)
    recalibrate_(found, few)
    torch.testing.assert_close(found.stem[1].running_var, 9 * before[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.stem[1].running_mean, 3 * before[0], rtol=1e-3, atol=1e-4)


def test_a_filter_that_becomes_zero_gives_what_batch_norm_adds():
    network, few = networks.make("residual"), networks.images(12, seed=9)
    found = statistics.plain_for(network, few)
    with torch.no_grad():
        found.stem[0].weight[2] = 0
        recalibrate_(found, few)
        made = found.stem[1](found.stem[0](few))[:, 2]
    torch.testing.assert_close(made, found.stem[1].bias[2].detach().expand_as(made))


def test_offsets_noted_for_other_images_are_forgotten():
    network, few = networks.make("residual"), networks.images(12, seed=9)
    again = statistics.plain_for(statistics.plain_for(network, networks.images(40)), few)
    once = statistics.plain_for(network, few)
    torch.testing.assert_close(again.stem[1].offset, once.stem[1].offset)
    torch.testing.assert_close(again.stem[1].factor, once.stem[1].factor)


def test_a_channel_that_is_constant_has_no_infinite_factor():
    network, few = networks.make("residual"), networks.images(12, seed=9)
    with torch.no_grad():
        network.stem[0].weight[2] = 0
    found = statistics.plain_for(network, few)
    recalibrate_(found, few)
    assert all(torch.isfinite(value).all() for value in found.state_dict().values())


def test_eigen_rebuilds_a_matrix_that_lacks_rank_and_nearly_vanishes():
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rows[:, 20:] *= 1e-22
    matrix = rows.T @ rows
    values, vectors = statistics.eigen(matrix)
    torch.testing.assert_close(vectors * values @ vectors.T, matrix, rtol=1e-4, atol=1e-4)
    assert (values.diff() >= 0).all()
    assert int((values > 1e-3).sum()) == 5


def test_activations_that_overflow_are_refused_by_the_name_of_the_layer():
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        network[1].weight.fill_(1e30)
    with pytest.raises(ModelError, match="the activations of 2 must be finite"):
        measure(network, IMAGES)


@pytest.mark.parametrize("says_so", [True, False])
def test_where_single_precision_does_not_converge_double_does(says_so, monkeypatch):
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    matrix, original = root @ root.T, torch.linalg.eigh

    def single_fails(given):
        if given.dtype == torch.float64:
            return original(given)
        if says_so:
            raise torch.linalg.LinAlgError
        return given.diagonal() * torch.nan, given * torch.nan

    monkeypatch.setattr(torch.linalg, "eigh", single_fails)
    values, vectors = statistics.eigen(matrix)
    assert values.dtype == torch.float32
    torch.testing.assert_close(vectors * values @ vectors.T, matrix, rtol=1e-4, atol=1e-5)


def test_a_constant_channel_whose_statistics_lag_behind_stays_harmless():
    """As after a filter has been pruned and trained around for a few steps only."""
    network = networks.make("residual")
    norm = network.blocks[0].first[1]
    with torch.no_grad():
        network.blocks[0].first[0].weight[2] = 0
        norm.running_mean[2], norm.running_var[2] = 0.3, 0.5
    images = networks.images(200)
    changed = copy.deepcopy(network)
    note_offsets_(changed, images)
    recalibrate_(changed, images)
    with torch.no_grad():
        constant = changed.blocks[0].first[0](network.stem(images))
        made = changed.blocks[0].first[1](constant)[:, 2]
    torch.testing.assert_close(made, norm.bias[2].detach().expand_as(made))
