from __future__ import annotations

import torch

from filterpress.activations import ActivationQuantizer


def test_activations_take_the_nearest_of_few_levels():
    quantizer = ActivationQuantizer(0.5, 1, 2)
    x = torch.tensor([-9.0, -0.6, -0.2, 0.0, 0.3, 0.76, 0.9, 7.0])
    expected = torch.tensor([-0.5, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    assert quantizer(x).equal(expected)


def test_eight_bits_round_as_torch_does():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    scale = float(torch.tensor(0.0123))
    expected = torch.fake_quantize_per_tensor_affine(x, scale, 100, 0, 255)
    found = ActivationQuantizer(0.0123, 100, 8)(x)
    close = (found - expected).abs() < scale / 2  # torch multiplies by the inverse, which may tie
    assert close.float().mean() > 0.999
    assert (found - x).abs().median() > scale / 10


def test_the_gradient_passes_where_nothing_is_cut_off():
    x = torch.tensor([-3.0, -0.6, 0.1, 0.9, 40.0], requires_grad=True)
    (ActivationQuantizer(0.5, 0, 4)(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad.equal(torch.tensor([0.0, 0.0, 3.0, 4.0, 0.0]))


def test_activations_of_half_precision_are_rounded_in_single():
    x = torch.linspace(0, 40, 500).bfloat16()
    quantizer = ActivationQuantizer(0.17, 0, 8)
    assert quantizer(x).dtype == torch.float32
    assert quantizer(x).equal(quantizer(x.float()))
