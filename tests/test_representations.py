from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from filterpress.codec import quantize, snap
from filterpress.forms import Quantized, Templates
from filterpress.representations import (
    ChannelOrder,
    coarsen_,
    form_of,
    has_codebook,
    has_linear_kernels,
    indices_of,
    integers_of,
    is_quantized,
    latent_weight,
    levels_of,
    like,
    multiply_templates_,
    quantize_,
    roundings,
    share_levels_,
    step_of,
    tie_templates_,
    without_quantization,
)
from tests import networks


def steps(n):
    return torch.from_numpy(snap(np.linspace(0.01, 0.3, n)))


@pytest.fixture
def convolution():
    layer = nn.Conv2d(3, 5, 3, padding=1)
    quantize_(layer, steps(5))
    return layer


def test_the_layer_computes_with_exactly_what_the_codec_stores(convolution):
    latent = latent_weight(convolution)
    stored = quantize(latent.numpy(), step_of(convolution).numpy())
    assert np.array_equal(convolution.weight.detach().numpy(), stored.dequantize())
    assert not torch.equal(convolution.weight, latent)


def test_each_row_has_a_step_of_its_own():
    quantized = Quantized(torch.tensor([0.5, 2.0]))
    found = quantized(torch.tensor([[1.2, -2.6], [0.45, 1.55]]))
    assert found.tolist() == [[0.5, -1.5], [0.0, 4.0]]


def test_the_weight_underneath_learns_in_steps(convolution):
    direction = torch.randn(5, 3, 3, 3)
    (convolution.weight * direction).sum().backward()
    original = convolution.parametrizations.weight.original
    expected = direction * step_of(convolution)[:, None, None, None]
    torch.testing.assert_close(original.grad, expected, rtol=0, atol=0)


def test_coarser_steps_leave_the_weight_underneath_where_it_is(convolution):
    before, steps = latent_weight(convolution), step_of(convolution).clone()
    factor = torch.tensor([1.0, 2.0, 3.0, 1.5, 1.03])
    coarsen_(convolution, factor)
    torch.testing.assert_close(latent_weight(convolution), before)
    torch.testing.assert_close(step_of(convolution), steps * factor)
    rounded = torch.round(before / (steps * factor)[:, None, None, None])
    assert integers_of(convolution).equal(rounded)


def test_steps_do_not_learn(convolution):
    assert "step" not in {name.rpartition(".")[2] for name, _ in convolution.named_parameters()}
    convolution.weight.sum().backward()
    assert not step_of(convolution).requires_grad


def test_integers_stay_within_the_bounds_of_their_row():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 7.0])
    quantized = Quantized(torch.tensor([0.5, 0.1]), low, high)
    units = torch.tensor([[1.2, -6.0, 18.0], [3.1, -2.0, 50.0]])
    assert quantized.integers(units).tolist() == [[1, -1, 1], [3, 0, 7]]
    expected = torch.tensor([[0.5, -0.5, 0.5], [0.3, 0.0, 0.7]])
    torch.testing.assert_close(quantized(units), expected)


def test_a_grid_of_odd_integers_has_the_nearest_of_them():
    low, high = torch.tensor([-3.0]), torch.tensor([3.0])
    quantized = Quantized(torch.tensor([0.5]), low, high, spacing=2)
    units = torch.tensor([[-18.0, -2.2, -1.8, -0.02, 0.02, 1.98, 2.02, 18.0]])
    odd = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    nearest = odd[(units[..., None] - odd).abs().argmin(dim=-1)]
    assert quantized.integers(units).equal(nearest)


def test_no_gradient_leads_a_weight_further_out_of_the_bounds():
    layer = nn.Linear(4, 1)
    weight = torch.tensor([[0.2, 2.0, -2.0, 2.0]])
    with torch.no_grad():
        layer.weight.copy_(weight)
    quantize_(layer, torch.tensor([0.5]), torch.tensor([-1.0]), torch.tensor([1.0]))
    direction = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])  # descent goes the other way
    (layer.weight * direction).sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient.tolist() == [[-0.5, 0.0, 0.0, 0.5]]


def test_the_integers_of_a_layer_are_those_it_computes_with(convolution):
    product = integers_of(convolution) * step_of(convolution)[:, None, None, None]
    assert convolution.weight.equal(product)
    with pytest.raises(ValueError, match="module must be a quantised layer"):
        integers_of(nn.Linear(3, 2))


def test_in_a_dead_zone_the_smaller_integer_wins():
    quantized = Quantized(torch.tensor([0.5]), dead_zone=0.2)
    units = torch.tensor([[0.0, 0.1, 0.69, 0.71, 1.69, 1.71, 40.69]])
    expected = [[0, 0, 0, 1, 1, 2, 40]]
    assert quantized.integers(units).tolist() == expected
    assert (-quantized.integers(-units)).tolist() == expected


@pytest.fixture
def shared():
    layer = nn.Conv2d(3, 5, 3, padding=1)
    indices = torch.arange(135).view(5, 3, 3, 3) % 4
    share_levels_(layer, torch.tensor([-0.5, 0.0, 0.25, 1.0]), indices)
    return layer


def test_a_codebook_makes_each_weight_the_level_of_its_index(shared):
    levels = [-0.5, 0.0, 0.25, 1.0]
    assert shared.weight.flatten().tolist() == [levels[n % 4] for n in range(135)]
    assert has_codebook(shared)
    assert not is_quantized(shared)
    assert indices_of(shared).flatten().tolist() == [n % 4 for n in range(135)]
    assert latent_weight(shared).equal(shared.weight)
    assert not has_codebook(nn.Linear(2, 2))


def test_a_level_learns_by_the_sum_of_the_gradients_of_its_weights_unless_it_is_zero(shared):
    direction = torch.randn(5, 3, 3, 3)
    (shared.weight * direction).sum().backward()
    sums = torch.stack([direction[indices_of(shared) == level].sum() for level in range(4)])
    assert (levels_of(shared) == 0).sum() == 1
    expected = sums.where(levels_of(shared) != 0, torch.tensor(0.0))
    torch.testing.assert_close(levels_of(shared).grad, expected)
    assert {name for name, _ in shared.named_parameters()} == {
        "bias",
        "parametrizations.weight.original",
    }


def test_an_assigned_weight_gives_each_level_the_mean_of_its_weights(shared):
    weight, before = torch.randn(5, 3, 3, 3), indices_of(shared)
    shared.weight = weight
    assert indices_of(shared).equal(before)
    expected = torch.stack([weight[before == level].mean() for level in range(4)])
    torch.testing.assert_close(levels_of(shared).detach(), expected)


def test_a_level_without_weights_stays_finite():
    layer = nn.Linear(3, 2)
    share_levels_(layer, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0, 0, 2], [2, 0, 0]]))
    layer.weight = torch.ones(2, 3)
    assert levels_of(layer).tolist() == [1.0, 0.0, 1.0]


def test_copies_of_a_codebook_are_independent(shared):
    twin, before = copy.deepcopy(shared), shared.weight.detach().clone()
    with torch.no_grad():
        levels_of(twin).mul_(3.0)
    assert shared.weight.equal(before)
    assert twin.weight.equal(3 * before)


def multiples(layer, *, learn=False, seed=0):
    """Give a convolution of 3 x 3 four templates, neither mean-free nor of unit norm."""
    n_out, n_in = layer.weight.shape[:2]
    values = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(seed))
    indices = torch.arange(n_out * n_in).view(n_out, n_in) % 4
    templates = Templates(values, learn=learn)
    multiply_templates_(layer, templates, indices, steps(n_out), 0.5 * steps(n_out))
    return layer


def test_each_kernel_is_a_factor_of_its_template_and_an_offset():
    layer = multiples(nn.Conv2d(3, 5, 3))
    assert has_linear_kernels(layer)
    assert not is_quantized(layer)
    assert not has_linear_kernels(nn.Conv2d(3, 5, 3))
    form = form_of(layer)
    factors, offsets = (
        form.integers(layer.get_parameter(name).detach()) * form.step[:, None]
        for name, form in roundings(layer).items()
    )
    for row in range(5):
        for column in range(3):
            shape = form.templates.values[(3 * row + column) % 4]
            expected = factors[row, column] * shape + offsets[row, column]
            torch.testing.assert_close(layer.weight[row, column].detach(), expected)


def test_an_assigned_weight_gives_each_kernel_the_nearest_factor_and_offset():
    layer, weight = multiples(nn.Conv2d(3, 5, 3)), torch.randn(5, 3, 3, 3)
    layer.weight = weight
    found = latent_weight(layer)
    for row in range(5):
        for column in range(3):
            shape = form_of(layer).templates.values[(3 * row + column) % 4].flatten()
            basis = torch.stack([shape, torch.ones(9)], dim=1)
            kernel = weight[row, column].flatten()[:, None]
            expected = basis @ torch.linalg.lstsq(basis, kernel).solution
            torch.testing.assert_close(
                found[row, column].flatten(), expected[:, 0], rtol=0, atol=1e-4
            )
    assert not layer.weight.equal(found)


@pytest.mark.parametrize("learn", [False, True])
def test_factors_and_offsets_learn_in_steps_and_templates_where_they_shall(learn):
    layer, direction = multiples(nn.Conv2d(3, 5, 3), learn=learn), torch.randn(5, 3, 3, 3)
    (layer.weight * direction).sum().backward()
    shapes = form_of(layer).templates.values.detach()[indices_of(layer)]
    expected = (direction * shapes).sum(dim=(2, 3)) * steps(5)[:, None]
    own = "parametrizations.weight"
    torch.testing.assert_close(layer.get_parameter(f"{own}.original0").grad, expected)
    expected = direction.sum(dim=(2, 3)) * 0.5 * steps(5)[:, None]
    torch.testing.assert_close(layer.get_parameter(f"{own}.original1").grad, expected)
    learnt = {name for name, _ in layer.named_parameters()}
    more = {f"{own}.0.templates.values"} if learn else set()
    assert learnt == {"bias", f"{own}.original0", f"{own}.original1"} | more


def test_coarser_steps_leave_factors_and_offsets_where_they_are():
    layer = multiples(nn.Conv2d(3, 5, 3))
    before, weight = latent_weight(layer), layer.weight.detach().clone()
    coarsen_(layer, torch.tensor(3.0))
    torch.testing.assert_close(latent_weight(layer), before)
    assert not layer.weight.allclose(weight)
    found = [form.step for form in roundings(layer).values()]
    torch.testing.assert_close(found, [3 * steps(5), 1.5 * steps(5)])


def test_only_equal_templates_become_one():
    convolutions = [nn.Conv2d(2, 3, 3) for _ in range(4)]
    kinds = (0, True), (0, True), (1, True), (0, False)
    for layer, (seed, learn) in zip(convolutions, kinds, strict=True):
        multiples(layer, learn=learn, seed=seed)
    network = nn.Sequential(*convolutions)
    before = network[1].weight.detach().clone()
    tie_templates_(network)
    a, b, c, d = (form_of(layer).templates for layer in network)
    assert a is b
    assert a is not c
    assert a is not d
    assert network[1].weight.equal(before)
    twin = copy.deepcopy(network)
    assert form_of(twin[0]).templates is form_of(twin[1]).templates is not a


def test_copies_are_independent(convolution):
    twin = copy.deepcopy(convolution)
    before = convolution.weight.detach().clone()
    with torch.no_grad():
        twin.parametrizations.weight.original.add_(1.0)
        step_of(twin).mul_(3.0)
    assert convolution.weight.equal(before)
    assert not twin.weight.equal(before)


def test_an_assigned_weight_is_kept_unrounded(convolution):
    weight = torch.randn(5, 3, 3, 3)
    convolution.weight = weight
    torch.testing.assert_close(latent_weight(convolution), weight)
    assert not convolution.weight.allclose(weight)


def test_a_plain_layer_is_not_quantised_and_learns_with_its_weight():
    layer = nn.Linear(3, 2)
    assert not is_quantized(layer)
    assert latent_weight(layer).equal(layer.weight)


def test_channel_order_puts_each_channel_in_its_place():
    order = ChannelOrder(torch.tensor([2, 0, 1]))
    for x in (torch.randn(4, 3, 2, 2), torch.randn(4, 3)):
        torch.testing.assert_close(order(x), torch.stack([x[:, 2], x[:, 0], x[:, 1]], dim=1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), (1, 2), padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding="same", bias=False),
        nn.Linear(4, 6, bias=False),
    ],
    ids=["geometry", "same", "linear"],
)
def test_a_like_layer_differs_in_width_alone(layer):
    twin = like(layer, 8, 12, groups=2 if isinstance(layer, nn.Conv2d) else 1)
    shapes = (twin.weight.shape[0], twin.weight.shape[1], *twin.weight.shape[2:])
    n_in = 4 if isinstance(layer, nn.Conv2d) else 8
    assert shapes == (12, n_in, *layer.weight.shape[2:])
    assert (twin.bias is None) == (layer.bias is None)
    if isinstance(layer, nn.Conv2d):
        for key in ("stride", "padding", "dilation", "padding_mode"):
            assert getattr(twin, key) == getattr(layer, key)


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_a_network_without_quantisation_computes_the_same_when_rounded(name):
    network = networks.make(name)
    images = networks.images(4)
    exactly = images.double()
    plain_outputs = copy.deepcopy(network).double()(exactly)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            quantize_(module, torch.full((len(module.weight),), 0.05))
    quantized_outputs = network(images)
    rounded = without_quantization(network, rounded=True)
    latent = without_quantization(network, rounded=False)
    assert not any(is_quantized(module) for module in rounded.modules())
    torch.testing.assert_close(rounded(images), quantized_outputs, rtol=0, atol=1e-6)
    torch.testing.assert_close(latent.double()(exactly), plain_outputs, rtol=0, atol=1e-6)
    assert not torch.allclose(plain_outputs.float(), quantized_outputs, atol=1e-3)
    assert is_quantized(next(m for m in network.modules() if isinstance(m, nn.Conv2d)))


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_a_network_without_codebooks_computes_the_same(name, rounded):
    network, images = networks.make(name), networks.images(4)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            levels = torch.tensor([-0.2, 0.0, 0.1])
            distances = (module.weight.detach()[..., None] - levels).abs()
            share_levels_(module, levels, distances.argmin(dim=-1))
    bare = without_quantization(network, rounded=rounded)
    assert not any(has_codebook(module) for module in bare.modules())
    assert bare(images).equal(network(images))
    assert any(has_codebook(module) for module in network.modules())


def test_a_network_without_linear_kernels_computes_the_same():
    network, images = networks.make("residual"), networks.images(4)
    shared = [m for m in network.modules() if getattr(m, "kernel_size", ()) == (3, 3)]
    for layer in shared:
        multiples(layer)
    bare = without_quantization(network, rounded=True)
    assert not any(has_linear_kernels(module) for module in bare.modules())
    torch.testing.assert_close(bare(images), network(images))
    assert all(has_linear_kernels(layer) for layer in shared)
    latent = without_quantization(network, rounded=False)
    assert not latent(images).allclose(network(images))
