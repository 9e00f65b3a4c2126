from __future__ import annotations

import hashlib
import inspect
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from filterpress.errors import ModelError
from filterpress.models import build, load_weights


def n_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def checksum(network):
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["small", "resnet20"])
def test_our_networks_take_any_small_image(name, channels, size):
    network = build(name, (channels, size, size), 7)
    assert network(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert network.training


def test_the_sizes_of_our_networks():
    assert 75_000 < n_parameters(build("small", (1, 8, 8), 10)) < 150_000
    # The paper's 0.27 M (table 6), and the weights of 3x3 layers counted by hand.
    resnet = build("resnet20", (3, 32, 32), 10)
    threes = 3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64
    counted = [m for m in resnet.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(counted) == 19
    assert sum(m.weight.numel() for m in counted) == 9 * threes
    assert 270_000 <= n_parameters(resnet) < 275_000


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = checksum(build("small", (1, 8, 8), 10, seed=4))
    assert torch.rand(3).equal(expected)
    assert checksum(build("small", (1, 8, 8), 10, seed=4)) == first
    assert checksum(build("small", (1, 8, 8), 10, seed=5)) != first


def test_building_does_not_touch_the_running_statistics():
    for module in build("small", (1, 8, 8), 10).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.running_mean.any()
            assert module.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", "conv1"),
        ("mobilenet_v3_small", "features.0.0"),
        ("squeezenet1_1", "features.0"),
    ],
)
def test_the_first_convolution_of_torchvision_takes_grey_images(name, stem):
    grey, colour = (build(f"torchvision:{name}", (c, 32, 32), 5) for c in (1, 3))
    new, old = grey.get_submodule(stem), colour.get_submodule(stem)
    assert new.weight.shape == (old.out_channels, 1, *old.kernel_size)
    assert (new.stride, new.padding, new.bias is None) == (
        old.stride,
        old.padding,
        old.bias is None,
    )
    assert grey(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_googlenet_has_no_extra_heads():
    network = build("torchvision:googlenet", (3, 32, 32), 5)
    assert network.train()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_a_network_that_needs_another_image_size_says_so():
    with pytest.raises(ModelError, match=r"does not take images of 3x32x32 \(.*set image_size"):
        build("torchvision:vit_b_16", (3, 32, 32), 10)


def test_what_does_not_exist_is_answered_with_what_does():
    with pytest.raises(ValueError, match=r"model must be one of small, resnet20, torchvision:NAME"):
        build("resnet", (1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"torchvision: and one of alexnet, .*got 'torchvision:x'"):
        build("torchvision:x", (1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"model must name a function .*No module named"):
        build("no_such_module:net", (1, 8, 8), 10)


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    name = f"user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn
            def net(input_shape, n_classes):
                channels, height, width = input_shape
                return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, n_classes))
            def heavy(input_shape, n_classes, ballast=2**29 - 1):
                network = net(input_shape, n_classes)
                ballast -= sum(p.numel() for p in network.parameters())
                network.ballast = nn.Parameter(torch.zeros(1).expand(ballast))  # in no memory
                return network
            def too_heavy(input_shape, n_classes): return heavy(input_shape, n_classes, 2**29)
            def headless(input_shape, n_classes): return nn.Flatten()
            def pair(input_shape, n_classes):
                class Pair(nn.Module):
                    def forward(self, x): return x, x
                return Pair()
            def none(input_shape, n_classes): return None
            def broken(input_shape, n_classes): raise KeyError("width")
            """
        )
    )
    return name


def test_a_network_of_the_users_own(user_code):
    network = build(f"{user_code}:net", (2, 3, 4), 5)
    assert network[1].weight.shape == (5, 24)
    assert checksum(network) == checksum(build(f"{user_code}:net", (2, 3, 4), 5))


def test_a_network_larger_than_onnx_holds_is_refused_before_it_is_trained(user_code):
    assert n_parameters(build(f"{user_code}:heavy", (2, 3, 4), 5)) == 2**29 - 1
    rule = r"too_heavy must have at most 2147483647 bytes of weights, .* got 2147483648: "
    with pytest.raises(ModelError, match=rule):
        build(f"{user_code}:too_heavy", (2, 3, 4), 5)


def test_what_is_wrong_with_the_users_network_is_said_in_one_line(user_code):
    for name, message in {
        "headless": r"must give outputs of shape \(2, 5\), got \(2, 24\)",
        "pair": r"must give outputs of shape \(2, 5\), got tuple",
        "none": r"must return a torch\.nn\.Module, got NoneType",
        "broken": r"broken failed: KeyError: 'width'",
    }.items():
        with pytest.raises(ModelError, match=message):
            build(f"{user_code}:{name}", (2, 3, 4), 5)


@pytest.fixture
def network():
    return build("small", (1, 8, 8), 10, seed=1)


@pytest.fixture
def trained():
    return build("small", (1, 8, 8), 10, seed=2)


def test_checkpoints_of_every_form_are_loaded(network, trained, tmp_path):
    weights = trained.state_dict()
    parallel = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save(weights, tmp_path / "plain.pt")
    torch.save({"state_dict": parallel, "epoch": 3}, tmp_path / "wrapped.pth")
    save_file(weights, tmp_path / "tensors.safetensors")
    for name in ("plain.pt", "wrapped.pth", "tensors.safetensors"):
        fresh = build("small", (1, 8, 8), 10, seed=1)
        load_weights(fresh, tmp_path / name)
        assert checksum(fresh) == checksum(trained)


def refused(network, path, message):
    before = checksum(network)
    with pytest.raises(ModelError, match=message):
        load_weights(network, path)
    assert checksum(network) == before


def test_a_missing_file_is_refused(network, tmp_path):
    refused(network, tmp_path / "no.pt", r"there is no file of weights .*no\.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\3\4 cut off"])
def test_a_file_of_something_else_is_refused(network, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(network, tmp_path / name, rf"{name} (is no readable file|holds more than tensors)")


class Payload:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_a_pickle_that_could_run_code_is_refused_and_does_not_run(network, tmp_path, capsys):
    torch.save({"weight": Payload()}, tmp_path / "evil.pt")
    refused(network, tmp_path / "evil.pt", r"holds more than tensors .* save model\.state_dict\(\)")
    torch.save(network, tmp_path / "whole.pt")
    refused(network, tmp_path / "whole.pt", "holds more than tensors")
    assert capsys.readouterr().out == ""


def test_a_file_without_a_state_dict_is_refused(network, tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    refused(network, tmp_path / "x.pt", r"holds no state dict; save model\.state_dict\(\)")
    torch.save([torch.zeros(3)], tmp_path / "x.pt")
    refused(network, tmp_path / "x.pt", "holds no state dict")


def test_names_and_shapes_that_do_not_fit_are_listed(network, trained, tmp_path):
    weights = trained.state_dict()
    del weights["classifier.bias"]
    weights["classifier.weight"] = torch.zeros(3, 48)
    weights["head.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "x.safetensors")
    refused(
        network,
        tmp_path / "x.safetensors",
        r"classifier\.bias is missing; head\.weight is unknown; "
        r"classifier\.weight has shape \(3, 48\) for \(10, 48\)$",
    )
    other = build("resnet20", (1, 8, 8), 10)
    save_file(other.state_dict(), tmp_path / "y.safetensors")
    refused(network, tmp_path / "y.safetensors", r"does not fit the network: .* and \d+ more$")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_named(network, trained, tmp_path, value):
    weights = trained.state_dict()
    weights["classifier.bias"][3] = value
    save_file(weights, tmp_path / "x.safetensors")
    message = r"classifier\.bias in .* has NaN or infinite values"
    refused(network, tmp_path / "x.safetensors", message)


def weight_normed(input_shape, n_classes):
    layer = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], n_classes)
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(layer))


def test_a_network_with_parametrised_layers_is_refused(monkeypatch, tmp_path):
    source = inspect.getsource(weight_normed)
    (tmp_path / "normed.py").write_text(f"from torch import nn\n\n\n{source}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="must have no parametrised layers, got 1"):
        build("normed:weight_normed", (1, 4, 4), 3)
