from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from filterpress import codec
from filterpress.errors import FilterpressError, PackageError
from filterpress.forms import Templates
from filterpress.package import (
    Package,
    construct,
    count,
    describe,
    encode,
    load,
    macs_by_layer,
    read_description,
    save,
)
from filterpress.representations import (
    Chain,
    ChannelOrder,
    like,
    multiply_templates_,
    quantize_,
    share_levels_,
)
from filterpress.surgery import channel_groups, keep_channels_, layers
from tests import networks

IMAGES = networks.images(4)


def package_of(name, network=None):
    return Package(
        network=networks.make(name) if network is None else network,
        model=f"tests.networks:{name}",
        input_shape=networks.SHAPE,
        n_classes=networks.CLASSES,
        inputs={"mean": [1.0, 2.0], "std": [3.0, 4.0]},
        baseline={"n_bytes": 4000, "accuracy": 0.9},
        history=({"stage": "train", "accuracy": 0.9}, {"stage": "prune", "removed": 3.0}),
    )


def written(package, out):
    out.mkdir()
    save(package, out)
    return out


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    return written(package_of("residual"), tmp_path / "package")


def project_(network, name, rank, groups):
    """Put two random layers in place of one."""
    layer = network.get_submodule(name)
    n_out, n_in = layer.weight.shape[:2]
    linear = isinstance(layer, nn.Linear)
    width = rank * groups
    first = nn.Linear(n_in, width, bias=False) if linear else nn.Conv2d(n_in, width, 1, bias=False)
    order = [ChannelOrder(torch.randperm(n_out))] if groups > 1 else []
    network.set_submodule(name, Chain(first, like(layer, width, n_out, groups), *order))


def quantised_(network):
    for layer in layers(network).values():
        quantize_(layer, torch.full((len(layer.weight),), 0.03))


def bounded_(network):
    for layer in layers(network).values():
        n = len(layer.weight)
        bounds = torch.full((n,), -1.0), torch.arange(n) % 3 + 1.0
        quantize_(layer, torch.full((n,), 0.1), *bounds, spacing=2)


def shared_(network):
    levels = torch.tensor([-0.3, -0.1, 0.05, 0.2, 0.4])
    for layer in list(layers(network).values())[::2]:
        distances = (layer.weight.detach()[..., None] - levels).abs()
        share_levels_(layer, levels, distances.argmin(dim=-1))


def multiplied_(network):
    """Let kernels be multiples of templates, one layer's own and others' shared and learning."""
    values = torch.linspace(-1, 1, 27).view(3, 3, 3)
    both = Templates(values, learn=True), Templates(values + 1, learn=False)
    for position, layer in enumerate(layers(network).values()):
        if layer.weight.shape[2:] == (3, 3):
            n_out, n_in = layer.weight.shape[:2]
            indices = torch.arange(n_out * n_in).view(n_out, n_in) % 3
            found = torch.linspace(0.01, 0.1, n_out), torch.full((n_out,), 0.02)
            multiply_templates_(layer, both[position == 0], indices, *found, 0.2)


def pruned_(network):
    groups = channel_groups(network, IMAGES[:2])
    keep_channels_(network, groups, [torch.arange(g.n_channels) % 3 > 0 for g in groups])


def projected_(network):
    for position, (name, layer) in enumerate(list(layers(network).items())):
        if getattr(layer, "groups", 1) == 1:
            conv = isinstance(layer, nn.Conv2d) and len(layer.weight) % 2 == 0
            project_(network, name, 2, 1 + (position % 2 if conv else 0))


CHANGES = {
    "nothing": [],
    "quantised": [quantised_],
    "bounded": [bounded_],
    "shared": [shared_],
    "projected and shared": [projected_, shared_],
    "multiples of templates": [multiplied_],
    "pruned": [pruned_],
    "projected": [projected_],
    "all": [pruned_, projected_, quantised_],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_a_package_comes_back_bit_by_bit(name, change, tmp_path):
    network = networks.make(name)
    for step in CHANGES[change]:
        step(network)
    package = package_of(name, network.eval())
    back = load(written(package, tmp_path / "a"))
    assert back.network(IMAGES).equal(network(IMAGES))
    assert not back.network.training
    for field in ("model", "input_shape", "n_classes", "inputs", "baseline", "history"):
        assert getattr(back, field) == getattr(package, field)
    assert encode(back, back.network) == encode(package, network)
    assert files_of(written(back, tmp_path / "b")) == files_of(tmp_path / "a")


def test_an_index_beyond_the_levels_is_refused(tmp_path):
    network = networks.make("residual")
    shared_(network)
    indices = network.get_buffer("stem.0.parametrizations.weight.0.indices")
    indices[0, 0, 0, 0] = 5
    with pytest.raises(PackageError, match=r"indices of stem\.0 must be below 5"):
        load(written(package_of("residual", network), tmp_path / "package"))


def test_an_index_beyond_the_templates_is_refused(tmp_path):
    network = networks.make("residual")
    multiplied_(network)
    network.get_buffer("stem.0.parametrizations.weight.0.indices")[0, 0] = 3
    with pytest.raises(PackageError, match=r"indices of stem\.0 must be below 3"):
        load(written(package_of("residual", network), tmp_path / "package"))


def test_an_untouched_network_has_no_changes_to_describe(saved):
    assert read_description(saved)["layers"] == {}


def test_a_package_after_a_stage_has_its_report_last(tmp_path):
    package = package_of("residual")
    after = package.after(networks.make("residual", 1), {"stage": "cluster", "merged": 1.0})
    assert [h["stage"] for h in after.history] == ["train", "prune", "cluster"]
    assert len(package.history) == 2
    out = written(after, tmp_path / "package")
    assert json.loads((out / "report.json").read_bytes()) == after.history[-1]


def test_layers_are_built_again_from_their_descriptions():
    made = [
        nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), (1, 2), 2, bias=False, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Linear(3, 5, bias=False),
        nn.BatchNorm1d(5, eps=1e-3, momentum=0.2),
        nn.BatchNorm2d(5, affine=False),
        nn.Identity(),
    ]
    for layer in made:
        description = json.loads(json.dumps(describe(layer)))
        again = construct(description)
        assert repr(again) == repr(layer)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in layer.state_dict().items()
        }


def test_what_no_stage_changes_is_not_described():
    assert describe(nn.ReLU()) == {}
    assert describe(nn.Sequential(nn.Linear(2, 2))) == {}


def change_description(folder, **fields):
    description = json.loads((folder / "model.json").read_bytes())
    description.update(fields)
    (folder / "model.json").write_text(json.dumps(description))


def replace_weights(folder, data):
    """Put another file of weights in a package, with its digest."""
    (folder / "weights.safetensors").write_bytes(data)
    change_description(folder, weights_sha256=hashlib.sha256(data).hexdigest())


def one_line(folder):
    """Return the message with which a package is refused."""
    with pytest.raises(FilterpressError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_folder_without_a_package_is_refused(tmp_path):
    assert "no package" in one_line(tmp_path)
    assert "no package" in one_line(tmp_path / "missing")


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_a_package_without_a_file_is_refused_by_its_name(saved, name):
    (saved / name).unlink()
    assert name in one_line(saved)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_truncated_file_is_refused(saved, name, keep):
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    assert f"{name} is damaged" in one_line(saved)


def test_every_damaged_byte_of_the_weights_is_noticed(saved):
    data = (saved / "weights.safetensors").read_bytes()
    for at in (0, 8, len(data) // 2, len(data) - 1):
        (saved / "weights.safetensors").write_bytes(
            data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        )
        assert "damaged" in one_line(saved)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"format": 2}', "\ufeff{}", "[" * 100_000, '"x"']
)
def test_a_foreign_description_is_refused(saved, text):
    (saved / "model.json").write_text(text)
    assert "damaged" in one_line(saved)


@pytest.mark.parametrize("number", [1, 3, "2", None])
def test_another_format_is_refused_by_its_number(saved, number):
    change_description(saved, format=number)
    message = one_line(saved)
    assert f"got {number!r}" in message
    assert "format 2" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"input_shape": 5},
        {"input_shape": [2, 8]},
        {"input_shape": ["a", "b", "c"]},
        {"n_classes": "many"},
        {"model": "tests.networks:missing"},
        {"model": 3},
        {"model": "tests.networks:flattening"},
        {"layers": []},
        {"layers": {"stem.0": {"kind": "unknown"}}},
        {"layers": {"stem.0": {"kind": "conv"}}},
        {"layers": {"stem.0": 7}},
        {"layers": {"missing.0": {"kind": "linear", "in": 1, "out": 1, "bias": True}}},
        {"layers": {"stem.0": {"kind": "linear", "in": 4, "out": 4, "bias": False}}},
        {"forms": {"missing": {"kind": "quantized"}}},
        {"forms": {"stem": {"kind": "folded"}}},
        {"forms": {"stem": {"kind": "codebook"}}},
        {"forms": {"stem": {"kind": "quantized"}}},
        {"forms": 4},
        {"history": 4},
    ],
    ids=str,
)
def test_a_description_of_another_network_is_refused(saved, fields):
    change_description(saved, **fields)
    one_line(saved)


def test_a_pickle_in_place_of_the_weights_is_not_opened(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    replace_weights(saved, pickle.dumps(Trap()))
    one_line(saved)
    assert not (tmp_path / "sprung").exists()


def test_weights_of_other_names_or_shapes_are_refused(saved):
    replace_weights(saved, save_tensors({"stem.0.weight": torch.zeros(1)}))
    assert "does not describe a network" in one_line(saved)


def test_values_that_json_does_not_know_are_not_written(tmp_path):
    package = package_of("depthwise").after(networks.make("depthwise"), {"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        written(package, tmp_path / "out")
    assert not (tmp_path / "out" / "model.json").exists()


def test_the_header_of_the_file_says_what_a_user_must_know():
    package = package_of("residual")
    header = codec.decode(encode(package, package.network)).header
    assert header["input_shape"] == list(networks.SHAPE)
    assert header["n_classes"] == networks.CLASSES
    assert (header["mean"], header["std"]) == ([1.0, 2.0], [3.0, 4.0])


def test_multiply_accumulates_are_those_counted_by_hand():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),  # 4 x 4 positions, 4 x 2 x 9 each
        nn.Conv2d(4, 4, 3, groups=4),  # 2 x 2 positions, 4 x 9 each
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    n_parameters, macs = count(network, (2, 8, 8))
    assert macs == 16 * 72 + 4 * 36 + 80
    assert macs_by_layer(network, (2, 8, 8)) == {"0": 16 * 72, "1": 4 * 36, "3": 80}
    assert n_parameters == (72 + 4) + (36 + 4) + (80 + 5)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_projection_costs_what_its_two_halves_do():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Flatten())
    before = count(network, (8, 4, 4))
    project_(network, "0", 2, 1)
    quantised_(network)
    assert before == (8 * 8 * 9, 16 * 8 * 8 * 9)
    assert count(network, (8, 4, 4)) == (8 * 2 + 2 * 8 * 9, 16 * (8 * 2 + 2 * 8 * 9))
