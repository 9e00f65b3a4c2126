"""Retrain a network for one epoch with each of two decisions undone, and compare.

    python benchmarks/retraining.py RUN --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``; its first reduced network is retrained, with
its trained one as the teacher. ``plain rates`` lets each layer learn at the plain learning rate
instead of one pace for the network (docs/adr/0013), ``no dead zone`` rounds to the nearest integer
(docs/adr/0012). Divergence from the teacher is measured on the validation set. Results are printed
as JSON and added to ``benchmarks/results/retraining.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

from torch import nn
from torch.nn import functional as F

from filterpress import package
from filterpress.representations import UNROUNDED, is_quantized, step_of
from filterpress.retraining import RetrainConfig, constant_channels_held, paces
from filterpress.tasks import Task, load_task
from filterpress.training import fit, predictor

RESULTS = Path(__file__).parent / "results" / "retraining.json"


def plain_rates(network: nn.Module) -> dict[str, float]:
    """Return paces at which each layer learns as if it did not learn in steps."""
    quantized = {name: m for name, m in network.named_modules() if is_quantized(m)}
    return {f"{n}.{UNROUNDED}": float(step_of(m).median() ** -2) for n, m in quantized.items()}


def without_dead_zone_(network: nn.Module) -> None:
    """Let weights round to the nearest integer."""
    for module in network.modules():
        if is_quantized(module):
            module.get_buffer("parametrizations.weight.0.dead_zone").zero_()


def divergence(network: nn.Module, teacher: nn.Module, task: Task) -> float:
    """Return the mean KL divergence of a network's outputs from the teacher's."""
    total = 0.0
    for images, _ in task.batches("validation", 500):
        outputs, wanted = (predictor(n)(images).log_softmax(1) for n in (network, teacher))
        total += float(F.kl_div(outputs, wanted, log_target=True, reduction="sum"))
    return total / task.size("validation")


def main() -> None:
    """Retrain in each way and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of filterpress compress")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()
    task = load_task(given.data, given.data_dir, 0, "")
    source = package.load(given.run / "round-1" / "reduce-1")
    teacher = package.load(given.run / "train").network
    rows = []
    for name in ("as it is", "plain rates", "no dead zone"):
        student = copy.deepcopy(source.network)
        if name == "no dead zone":
            without_dead_zone_(student)
        pace = plain_rates(student) if name == "plain rates" else paces(student)
        row = {"run": given.run.name, "way": name, "epochs": given.epochs}
        row["bytes_before"] = len(package.encode(source, source.network))
        row["divergence_before"] = round(divergence(source.network, teacher, task), 5)
        with constant_channels_held(student):
            config = RetrainConfig(epochs=given.epochs)
            fitted = fit(student, task, config, seed=1, teacher=teacher, paces=pace)
        row["bytes"] = len(package.encode(source, student))
        row["divergence"] = round(divergence(student, teacher, task), 5)
        row["validation_accuracy"] = fitted.validation_score
        print(json.dumps(row), flush=True)
        rows.append(row)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    others = [row for row in before if row["run"] != given.run.name]
    RESULTS.write_text(json.dumps(others + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
