from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from filterpress._torchvision import torchvision


def run(program):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )


def test_networks_of_torchvision_run_in_a_new_interpreter():
    done = run(
        "import torch\n"
        "from filterpress._torchvision import torchvision\n"
        "net = torchvision.models.resnet18(num_classes=3).eval()\n"
        "print(tuple(net(torch.zeros(2, 3, 32, 32)).shape))\n"
    )
    assert done.stdout == "(2, 3)\n", done.stderr


def test_torchvision_is_not_imported_by_those_who_do_not_ask_for_it():
    done = run(
        "import sys\n"
        "from filterpress.tasks import load_task\n"
        "from filterpress.models import build\n"
        "import filterpress.training\n"
        "build('small', load_task('digits').input_shape, 10)\n"
        "print([name for name in ('torchvision', 'PIL', 'google.cloud') if name in sys.modules])\n"
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_declared_operators_take_the_arguments_of_torchvision():
    for name in ("nms", "qnms"):
        schema = getattr(torch.ops.torchvision, name).default._schema
        assert [argument.name for argument in schema.arguments] == [
            "dets",
            "scores",
            "iou_threshold",
        ]
    boxes, scores = torch.rand(5, 4, device="meta"), torch.rand(5, device="meta")
    with pytest.raises(RuntimeError):  # its shape depends on data: the fake kernel is torchvision's
        torchvision.ops.nms(boxes, scores, 0.5)
