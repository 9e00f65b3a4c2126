from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from filterpress import training
from filterpress.data import Arrays, DataSet
from filterpress.errors import DataError, ModelError
from filterpress.models import build
from filterpress.processes import is_main
from filterpress.tasks import ImageClassification, load_task
from filterpress.training import (
    FitConfig,
    distillation_loss,
    fit,
    learning_rate,
    predictor,
)

QUICK = FitConfig(epochs=2, batch_size=16, lr=0.05, precision="float32")


def easy_task(n=64, size=6):
    """Two classes: images that are bright at the top, or at the bottom."""
    labels = torch.arange(n) % 2
    images = torch.randint(0, 100, (n, 1, size, size), generator=torch.Generator().manual_seed(0))
    images[labels == 0, :, : size // 2] += 60
    images[labels == 1, :, size // 2 :] += 60
    arrays = Arrays(images.to(torch.uint8), labels)
    mean, std = (torch.tensor([[[value]]]) for value in (80.0, 50.0))
    data = DataSet(arrays, arrays, arrays, ("top", "bottom"))
    return ImageClassification(data=data, mean=mean, std=std, shift=0, flip=False)


@pytest.fixture
def task():
    return easy_task()


def small_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        )


def linear_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))


def checksum(network):
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_training_learns_digits():
    digits = load_task("digits")
    network = build("small", digits.input_shape, digits.n_classes)
    before = digits.score(predictor(network), "test")
    result = fit(network, digits, FitConfig(epochs=6, batch_size=32), seed=0)
    assert before < 0.3
    assert digits.score(predictor(network), "test") > 0.95
    assert result.validation_score > 0.95


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(task):
    def trained(seed):
        torch.manual_seed(len(sums))  # the global state must not matter
        network = nn.Sequential(nn.Dropout(0.3), small_net())
        fit(network, task, QUICK, seed=seed)
        return checksum(network)

    sums = []
    for seed in (1, 1, 2):
        sums.append(trained(seed))
    assert sums[0] == sums[1] != sums[2]


def test_training_leaves_the_global_random_state_alone(task):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fit(small_net(), task, QUICK, seed=0)
    assert torch.rand(2).equal(expected)


def test_the_best_epoch_is_kept_and_the_earliest_of_equal_ones(task):
    states, planned = [], iter([0.5, 0.9, 0.7, 0.9])

    class Planned:
        input_shape, n_classes = task.input_shape, task.n_classes
        batches, size, loss = task.batches, task.size, task.loss

        def score(self, predict, split):
            assert split == "validation"
            states.append(checksum(network))
            return next(planned)

    network = small_net()
    result = fit(network, Planned(), FitConfig(epochs=4, batch_size=16), seed=0)
    assert len(set(states)) == 4
    assert checksum(network) == states[1]
    assert result == (0.9, 2, (0.5, 0.9, 0.7, 0.9))
    assert not network.training


def test_a_penalty_is_minimised_besides_and_the_last_state_kept(task):
    """A state that the penalty has worked on longer is kept, whatever the scores say."""

    def trained(penalised):
        network, states = small_net(), []

        class Falling:
            input_shape, n_classes = task.input_shape, task.n_classes
            batches, size, loss = task.batches, task.size, task.loss

            def score(self, predict, split):
                states.append(checksum(network))
                return 0.9 - 0.4 * len(states)

        def penalty():
            return 10 * network[0].weight.square().sum()

        result = fit(network, Falling(), QUICK, seed=0, penalty=penalty if penalised else None)
        assert checksum(network) == states[result.epoch - 1]
        return network, result

    free, best = trained(penalised=False)
    small, last = trained(penalised=True)
    assert small[0].weight.square().sum() < 0.1 * free[0].weight.square().sum()
    assert (best.epoch, last.epoch) == (1, 2)
    assert last.validation_score == last.scores[1] < last.scores[0]


def test_stop_ends_the_training(task):
    seen = []
    config = FitConfig(epochs=9, batch_size=16)
    result = fit(
        small_net(), task, config, seed=0, stop=lambda score: seen.append(score) or len(seen) == 3
    )
    assert result.scores == tuple(seen)
    assert len(seen) == 3


def test_progress_is_told_every_step_and_its_loss(task):
    calls = []
    fit(small_net(), task, QUICK, seed=0, progress=lambda *call: calls.append(call))
    assert [call[:3] for call in calls] == [(e, s, 4) for e in range(2) for s in (1, 2, 3, 4)]
    assert calls[-1][3] < calls[0][3]


def reference_step(network, images, targets, config, soft=None):
    """SGD with Nesterov momentum as Sutskever et al. define it, for one first step."""
    outputs = network(images)
    loss = F.cross_entropy(outputs, targets)
    if soft is not None:
        teacher, student = ((o / config.temperature).softmax(1) for o in (soft, outputs))
        divergence = (teacher * (teacher.log() - student.log())).sum(1).mean()
        loss = (1 - config.alpha) * loss + config.alpha * config.temperature**2 * divergence
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    rate = learning_rate(config, 0.5)
    updated = []
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        decay = config.weight_decay * parameter if parameter.ndim > 1 else 0
        step = (gradient + decay) * (1 + config.momentum)
        updated.append((parameter - rate * step).detach())
    return updated


def test_an_epoch_ends_after_its_steps_and_the_next_one_is_on_other_images(task):
    drawn = []

    class Noted:
        """The task, noting what it trains on."""

        def __getattr__(self, name):
            return getattr(task, name)

        def batches(self, split, batch_size, **options):
            for images, labels in task.batches(split, batch_size, **options):
                if split == "train":
                    drawn.append(images)
                yield images, labels

    told = []
    config = replace(QUICK, epochs=3, epoch_steps=2)
    result = fit(small_net(), Noted(), config, seed=0, progress=lambda *step: told.append(step[:3]))
    assert told == [(epoch, step, 2) for epoch in range(3) for step in (1, 2)]
    assert len(result.scores) == 3
    assert len(drawn) == 6
    assert not torch.equal(drawn[0], drawn[2])


def test_an_epoch_is_a_pass_at_most(task):
    ends = []
    for epoch_steps in (0, 99):
        network = small_net()
        fit(network, task, replace(QUICK, epoch_steps=epoch_steps), seed=0)
        ends.append(checksum(network))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_step_is_the_one_written_down(task, with_teacher):
    # The whole set is one batch, so its order matters by rounding only.
    network, teacher = linear_net(0), linear_net(1)
    config = FitConfig(
        epochs=1, batch_size=64, weight_decay=0.1, precision="float32", alpha=0.7, temperature=3.0
    )
    ((images, targets),) = task.batches("train", 64)
    soft = teacher(images) if with_teacher else None
    expected = reference_step(network, images, targets, config, soft)
    fit(network, task, config, seed=0, teacher=teacher if with_teacher else None)
    for parameter, value in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_the_gradient_of_distillation_is_the_difference_of_the_softmaxes():
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64)
    for temperature in (1.0, 4.0):
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        p, q = ((x / temperature).softmax(1) for x in (student.detach(), teacher))
        torch.testing.assert_close(gradient, temperature * (p - q) / 5)


def test_a_perfect_imitation_costs_nothing():
    outputs = torch.randn(3, 4)
    assert abs(float(distillation_loss(outputs, outputs, 2.0))) < 1e-6


def test_label_smoothing_is_that_of_torch(task):
    outputs, targets = torch.randn(9, 2), torch.randint(0, 2, (9,))
    loss = training._loss(task, FitConfig(label_smoothing=0.1), outputs, targets, None)
    expected = F.cross_entropy(outputs, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_a_student_imitates_its_teacher_rather_than_the_labels(task):
    teacher, student = linear_net(0), linear_net(1)
    fit(teacher, task, QUICK, seed=0)
    with torch.no_grad():  # a teacher that is always wrong
        for parameter in teacher.parameters():
            parameter.neg_()
    before = checksum(teacher)
    fit(student, task, FitConfig(epochs=4, batch_size=16, alpha=1.0), seed=0, teacher=teacher)
    assert task.score(predictor(teacher), "test") < 0.2
    assert task.score(predictor(student), "test") < 0.2
    assert checksum(teacher) == before


def test_a_parameter_learns_at_its_own_pace(task):
    plain, paced = small_net(), small_net()
    config = FitConfig(epochs=1, batch_size=task.size("train"), momentum=0.0, weight_decay=0.0)
    before = plain[0].weight.detach().clone()
    fit(plain, task, config, seed=0)
    fit(paced, task, config, seed=0, paces={"0.weight": 0.25})
    moved = paced[0].weight.detach() - before
    torch.testing.assert_close(moved, 0.25 * (plain[0].weight.detach() - before))
    torch.testing.assert_close(paced[0].bias, plain[0].bias)


class Affine(nn.Module):
    """A representation with a matrix, a vector, and a buffer of integers."""

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape[0]))
        self.register_buffer("codes", torch.arange(shape[0]) % 2)

    def forward(self, weight):
        return weight * (self.scale * self.codes)[:, None, None, None]


def test_parametrised_layers_are_trained_through_their_numbers(task):
    network = small_net()
    parametrize.register_parametrization(network[0], "weight", Affine(network[0].weight.shape))
    inside = network[0].parametrizations.weight[0]
    fit(network, task, QUICK, seed=0)
    assert inside.codes.tolist() == [0, 1, 0, 1]
    assert inside.scale[0] == inside.scale[2] == 1  # no gradient, and vectors do not decay
    assert inside.scale[1] != 1
    assert not network[0].weight[0].any()


def test_frozen_parameters_stay(task):
    network = small_net()
    network[0].weight.requires_grad_(False)
    before = network[0].weight.clone()
    fit(network, task, QUICK, seed=0)
    assert network[0].weight.equal(before)


def test_the_weights_keep_the_standard_layout(task):
    network = small_net()
    fit(network, task, QUICK, seed=0)
    assert all(tensor.is_contiguous() for tensor in network.state_dict().values())


def test_the_predictor_is_the_network_in_evaluation_mode(task):
    network = small_net().train()
    images = torch.randn(3, 1, 6, 6)
    outputs = predictor(network)(images)
    torch.testing.assert_close(outputs, network.eval()(images))
    assert outputs.dtype == torch.float32
    rough = predictor(network, precision="bfloat16")(images)
    assert rough.dtype == torch.float32
    assert not rough.equal(outputs)
    torch.testing.assert_close(rough, outputs.detach(), atol=0.05, rtol=0.05)


def test_precision_is_chosen_by_the_machine_and_the_network_unless_it_is_given(monkeypatch):
    cpu, plain = torch.device("cpu"), small_net()
    depthwise = nn.Sequential(plain, nn.Conv2d(4, 4, 3, groups=4))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert training.in_bfloat16("auto", plain, cpu) == native
        assert not training.in_bfloat16("auto", depthwise, cpu)
        assert training.in_bfloat16("bfloat16", depthwise, cpu)
        assert not training.in_bfloat16("float32", plain, cpu)


def test_adamw_learns_too(task):
    config = FitConfig(epochs=4, batch_size=16, optimizer="adamw", lr=0.01)
    assert fit(small_net(), task, config, seed=0).validation_score > 0.9


def test_a_loss_that_explodes_is_reported_with_advice(task):
    config = FitConfig(epochs=20, lr=1e18, batch_size=16, precision="float32")
    with pytest.raises(ModelError, match=r"the loss became (nan|inf) while training; lower lr"):
        fit(small_net(), task, config, seed=0)


def test_what_cannot_be_trained_is_refused(task):
    with pytest.raises(ModelError, match="no parameter that can be trained"):
        fit(nn.Flatten(), task, QUICK, seed=0)
    with pytest.raises(DataError, match="training needs at least 2 images, got 1"):
        fit(small_net(), easy_task(n=1), QUICK, seed=0)


def test_a_last_batch_of_one_image_does_not_stop_batch_normalisation():
    network = nn.Sequential(nn.Conv2d(1, 4, 6), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    fit(network, easy_task(n=33), QUICK, seed=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epoch_steps": -1}, "epoch_steps must be at least 0, got -1"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"temperature": -1}, "temperature must be positive, got -1"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\), got 1.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\], got 1.1"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"optimizer": "adam"}, "optimizer must be sgd or adamw, got 'adam'"),
        ({"precision": "half"}, "precision must be auto, float32 or bfloat16, got 'half'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**setting)


def test_the_learning_rate_rises_and_falls_to_zero():
    config = FitConfig(lr=0.4, warmup=0.25)
    rates = [learning_rate(config, k / 100) for k in range(101)]
    assert rates.index(max(rates)) == 25
    assert max(rates) == 0.4
    assert rates[0] == 0
    assert abs(rates[100]) < 1e-12
    assert learning_rate(config, 1.5) == rates[100]
    assert learning_rate(FitConfig(lr=0.4, warmup=0.0), 0.0) == 0.4


DISTRIBUTED = Path(__file__).with_name("train_under_torchrun.py")


@pytest.mark.slow
def test_two_processes_end_with_equal_replicas_that_are_the_single_ones(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, DISTRIBUTED, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert [first["is_main"], second["is_main"]] == [True, False]
    assert first["scores"] == second["scores"]
    for kind in ("state", "retrained", "resumed"):
        for name, tensor in first[kind].items():
            assert tensor.equal(second[kind][name]), (kind, name)
    for name, tensor in first["whole"].items():
        assert tensor.equal(first["resumed"][name]), name
    assert first["largest"] < 10_000  # a whole state has more than 200 000 bytes
    assert not first["retrained"]["4.bias"].equal(first["state"]["4.bias"])
    # Without batch normalisation, two halves of a batch give the gradient of the whole.
    alone = linear_net(0)
    fit(alone, easy_task(), QUICK, seed=0)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first["linear"][name], tensor)
    assert not set(first["seen"]) & set(second["seen"])
    assert sorted(first["seen"] + second["seen"]) == list(range(64))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused(score):
    task = easy_task()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(task), "score", lambda *_: score)
        with pytest.raises(ModelError, match=f"^the validation score became {score} while"):
            fit(small_net(0), task, QUICK, seed=0)


def test_a_single_process_is_the_main_one():
    assert is_main()
