from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from filterpress.errors import ModelError
from filterpress.export import to_graph
from filterpress.fitting import Goal
from filterpress.levels import fit_levels, level_option
from filterpress.methods.quantize_weights import QuantizationConfig, quantize_weights
from filterpress.package import Package, encode
from filterpress.representations import (
    has_codebook,
    integers_of,
    is_quantized,
    levels_of,
    step_of,
)
from filterpress.statistics import measure
from filterpress.surgery import layers
from tests import networks
from tests.test_export import decoded_outputs

IMAGES = networks.images(128)
EVERY = [
    {"bits": 1},
    {"bits": 2, "fit": "weights", "rounding": "learned"},
    {"bits": 4},
    {"bits": 4, "fit": "range", "rounding": "nearest"},
    {"bits": 3, "grid": "asymmetric", "per": "tensor"},
    {"bits": 8, "grid": "asymmetric", "rounding": "nearest"},
    {"bits": 4, "grid": "codebook", "per": "tensor"},
    {"bits": 2, "grid": "codebook", "per": "tensor", "fit": "weights", "rounding": "learned"},
]
every_config = pytest.mark.parametrize("fields", EVERY, ids=str)


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def run(network, max_bytes=10**6, *, avoid=frozenset(), **fields):
    config = QuantizationConfig(**fields)
    return quantize_weights(network, IMAGES, config, goal=Goal(max_bytes, size, avoid))


@cache
def trained(name="residual"):
    return networks.make(name)


@every_config
def test_every_layer_computes_with_as_many_levels_as_its_bits_allow(fields):
    made = run(trained(), **fields).model
    most = 2 ** fields["bits"] - (fields.get("grid") is None and fields["bits"] > 1)
    for layer in layers(made).values():
        assert is_quantized(layer) != has_codebook(layer)
        assert has_codebook(layer) == (fields.get("grid") == "codebook")
        rows = layer.weight.detach().flatten(1)
        if has_codebook(layer):
            assert len(levels_of(layer)) <= most
        else:
            assert max(len(row.unique()) for row in rows) <= most
            reach = integers_of(layer).flatten(1)
            assert (reach.amax(dim=1) - reach.amin(dim=1)).max() <= max(most - 1, 2)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_a_tensor_has_one_step_or_one_for_each_channel(per):
    for layer in layers(run(trained(), bits=4, per=per).model).values():
        assert (len(step_of(layer).unique()) == 1) == (per == "tensor")


@every_config
@pytest.mark.parametrize("name", ["residual", "flattening"])
def test_the_decoded_file_computes_nearly_the_same(name, fields):
    made = run(trained(name), **fields).model
    with torch.no_grad():
        expected = made(IMAGES)
    # steps are stored to half a percent, biases and constants to 64 levels
    error = decoded_outputs(made, IMAGES) - expected
    assert float(error.std() / expected.std()) < 0.06


def test_codebooks_are_stored_to_16_bits():
    made = run(trained(), bits=4, grid="codebook", per="tensor").model
    _, tensors = to_graph(made, networks.SHAPE)
    for name, layer in layers(made).items():
        stored = torch.from_numpy(tensors[f"{name}.levels"].dequantize()).sort().values
        levels = levels_of(layer).detach().sort().values
        largest = float(levels.abs().max())
        torch.testing.assert_close(stored, levels, rtol=0, atol=largest / 2**15)


def test_more_bits_are_closer_and_larger():
    with torch.no_grad():
        expected, errors, sizes = trained()(IMAGES), [], []
        for bits in (1, 2, 3, 4, 6, 8):
            made = run(trained(), bits=bits).model
            errors.append(float((made(IMAGES) - expected).square().mean()))
            sizes.append(size(made))
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[-1] < 1e-3 * float(expected.var())


@pytest.mark.parametrize(
    "fields", [{}, {"grid": "asymmetric"}, {"grid": "codebook", "per": "tensor"}], ids=str
)
def test_estimated_bytes_are_nearly_those_of_the_file(fields):
    layer = nn.Linear(300, 128)
    network = nn.Sequential(nn.Flatten(), nn.Linear(128, 300), nn.ReLU(), layer)
    empty = nn.Sequential(nn.Flatten(), nn.Linear(128, 300), nn.ReLU(), nn.Linear(300, 128))
    nn.init.zeros_(empty[3].weight)
    nn.init.zeros_(empty[3].bias)
    for bits in (2, 4, 6):
        made = run(network, **{"bits": bits, "rounding": "nearest", **fields}).model
        moments = measure(network.eval(), IMAGES)["3"]
        kind = fields.get("grid", "symmetric")
        levels = fit_levels(layer.weight.detach(), moments, kind, bits)
        estimate = level_option(layer, levels, moments, "nearest")
        made[1] = empty[1]
        assert estimate.n_bytes == pytest.approx(size(made) - size(empty), rel=0.1)


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "codebook"])
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_widths_are_chosen_so_that_the_file_fits(share, grid):
    network = trained("concatenating")
    per = "tensor" if grid == "codebook" else "channel"
    budget = round(share * size(network))
    made = run(network, budget, grid=grid, per=per)
    assert 0.8 * budget < size(made.model) <= budget
    counts = {name: layer.weight.numel() for name, layer in layers(network).items()}
    total = sum(counts[name] * entry["bits"] for name, entry in made.layers.items())
    assert made.notes["bits"] == pytest.approx(total / sum(counts.values()))


def test_layers_that_matter_more_get_more_bits():
    network = trained("concatenating")
    bits = [entry["bits"] for entry in run(network, round(0.6 * size(network))).layers.values()]
    assert len(set(bits)) > 1


def test_a_budget_that_cannot_be_met_gives_the_narrowest_widths():
    made = run(trained(), 10)
    assert {entry["bits"] for entry in made.layers.values()} == {1.0}
    assert {e["bits"] for e in run(trained(), 10, grid="asymmetric").layers.values()} == {2.0}


def test_widths_that_failed_are_not_taken_again_but_a_given_width_is():
    budget = size(trained()) // 2
    first = run(trained(), budget)
    second = run(trained(), budget, avoid=frozenset([first.notes["allocation"]]))
    assert second.notes["allocation"] != first.notes["allocation"]
    assert size(second.model) <= budget
    given = run(trained(), budget, bits=3)
    again = run(trained(), budget, bits=3, avoid=frozenset([given.notes["allocation"]]))
    assert again.notes == given.notes


def test_running_out_of_widths_is_said():
    class Everything(frozenset):
        def __contains__(self, item):
            return True

    with pytest.raises(ModelError, match="has failed before"):
        run(trained(), 2000, avoid=Everything())


def test_a_given_width_does_not_look_at_the_budget():
    one, other = (run(trained(), n, bits=4) for n in (10, 10**6))
    assert size(one.model) == size(other.model)
    assert {entry["bits"] for entry in one.layers.values()} == {4.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": 0}, "images must be at least 1"),
        ({"bits": 9}, r"bits must be in 1\.\.8, or 0 to choose them, got 9"),
        ({"bits": -1}, "bits must be in"),
        ({"grid": "round"}, "grid must be one of"),
        ({"per": "row"}, "per must be one of"),
        ({"fit": "nothing"}, "fit must be one of"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"grid": "asymmetric", "bits": 1}, "bits must be 2 or more for an asymmetric grid"),
        ({"grid": "codebook"}, "per must be tensor for a codebook, got channel"),
        (
            {"grid": "codebook", "per": "tensor", "fit": "range"},
            "fit must be weights or outputs for a codebook, got range",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        QuantizationConfig(**fields)
    assert "\n" not in str(caught.value)
