"""The stages that measure and decide: ``evaluate``, ``publish`` and ``give_up``."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filterpress import files
from filterpress.budget import SMALLEST, decide, parse_accuracy
from filterpress.stages.handover import (
    ENCODED,
    Report,
    budget_of,
    encoded_file,
    evaluated_report,
    max_bytes_of,
    pass_on,
    require,
    settled,
    task_of,
)

_NOT_TOLD = ("layers", "confusion")  # of an evaluation, in the report of a release
STORY = "story.json"  # in a receipt: the model.json of the package that was released
SIGNED = ("accuracy", "validation_accuracy", "macs", "ratio")  # of the report, with the file


def check_thresholds(model: Path, *, max_size: str, min_accuracy: str) -> None:
    """Refuse thresholds that no network compressed from a trained one could meet.

    Args:
        model: Package of the trained network.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.

    Raises:
        ValueError: The floor is above the trained network's accuracy, or the size below what the
            format alone needs.
    """
    from filterpress import package

    source = package.load(model)
    parse_accuracy(min_accuracy, source.baseline["validation_accuracy"])
    if max_size != SMALLEST:
        max_bytes_of(source, max_size)


def evaluate(
    model: Path,
    out: Path,
    *,
    state: str = "fits",
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    round: int = 1,
    retrains: int = 0,
    max_rounds: int = 2,
    max_retrains: int = 2,
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
) -> Report:
    """Encode the network, decode the file again, and measure what came out.

    Args:
        model: Package to measure.
        out: Package to write: the same one with its encoded file, model.fpk.
        state: fits or retrain measures; too-big measures and settles; any other decision has been
            taken before and is passed on with its package.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        round: Number of this round, from 1.
        retrains: Retrains done in this round.
        max_rounds: Rounds at most.
        max_retrains: Retrains in a round at most.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.

    Returns:
        Report with all the numbers; its ``decision`` is publish, retrain, next, give-up or too-big.
    """
    from filterpress import measurement, package

    if settled(state, ("publish", "next", "give-up"), ("fits", "retrain", "too-big")):
        return pass_on(model, out)
    source = package.load(model)
    budget = budget_of(source, max_size, min_accuracy, max_rounds, max_retrains)
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
    encoded = package.encode(source, source.network)
    measured = measurement.measure(encoded, its_task)
    n_parameters, macs = package.count(source.network, source.input_shape)
    measured |= {"n_parameters": n_parameters, "macs": macs}
    decision = decide(
        budget,
        n_bytes=len(encoded),
        accuracy=measured["validation_accuracy"],
        round=round,
        retrains=retrains,
    )
    report = {
        "stage": "evaluate",
        **measurement.against(measured, source.baseline),
        "max_bytes": budget.max_bytes,
        "min_accuracy": budget.min_accuracy,
        "decision": decision,
        "round": round,
        "retrains": sum(h["stage"] == "retrain" for h in source.history),
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "layers": measurement.layer_rows(encoded, source.network),
    }
    with files.new_directory(out) as draft:
        package.save(source.after(source.network, report), draft)
        (draft / ENCODED).write_bytes(encoded)
    return report


def publish(
    model: Path,
    out: Path,
    *,
    store: str = "",
    keys: str = "",
    name: str = "filterpress",
    channel: str = "any/stable",
    percent: float = 100.0,
    run: str = "",
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
) -> Report:
    """Sign the evaluated file and release it, once both thresholds hold for the file itself.

    A channel then says which vehicles shall run it. Publishing the same file again issues nothing
    new, and leaves the channel at the share that it has been ramped to.

    Args:
        model: Evaluated package.
        out: Folder to write, with the receipt, report.json.
        store: Folder or gs://bucket/prefix of the signed repository, made when it is new; empty
            for one of its own, with keys for this release alone, in out.
        keys: Folder of signing keys, outside the store; empty for the folder keys beside a local
            store, where development keys are made if there are none.
        name: Name of the network in the repository.
        channel: Kind of vehicle and name of the channel that shall name the release; empty for
            none.
        percent: Share of these vehicles that take part at once.
        run: What made the file, such as the id of a pipeline's run, for the channel's record.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.

    Returns:
        Report with the release: ``store``, ``target``, ``sha256``, ``release_counter``,
        ``n_bytes``, ``delta_bytes`` of the smallest delta from a release before (0 without one),
        and ``channel``.

    Raises:
        ValueError: The channel or the share cannot be used; nothing is published.
        BudgetError: A threshold does not hold; nothing is published.
    """
    from filterpress import measurement, package, release
    from filterpress.release import rollout
    from filterpress.release.channel import parts_of, path_of
    from filterpress.release.keys import keys_for

    path, name_it = "", None
    if channel:
        hardware, channel_name = parts_of(channel)
        path = path_of(hardware, channel_name)
        name_it = rollout.naming(hardware=hardware, channel=channel_name, percent=percent, run=run)
    source = package.load(model)
    budget = budget_of(source, max_size, min_accuracy)
    encoded = encoded_file(model)
    evaluated = evaluated_report(source, encoded)
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
    measured = measurement.measure(encoded, its_task)
    require(budget, measured["n_bytes"], measured["validation_accuracy"])
    with files.new_directory(out) as draft, tempfile.TemporaryDirectory() as fresh:
        place: dict[str, Any] = {
            "store": store or str(draft / "release"),
            "keys": keys_for(store, keys) if store or keys else Path(fresh) / "keys",
        }
        issued = release.publish_network(
            encoded,
            name=name,
            # signed metadata knows no fractions: numbers travel as text
            custom={k: str(evaluated[k]) for k in SIGNED},
            then=name_it,
            **place,
        )
        report = {k: v for k, v in evaluated.items() if k not in _NOT_TOLD} | {
            "stage": "publish",
            "decision": "publish",
            "store": store or str(out / "release"),
            "target": issued.target,
            "release_counter": issued.version,
            "delta_bytes": min(issued.deltas.values(), default=0),
            "channel": path,
            "created": issued.created,
        }
        (draft / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        shutil.copyfile(model / "model.json", draft / STORY)
    return report


def give_up(
    model: Path,
    *,
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
) -> Report:
    """End a run whose network did not meet the thresholds.

    Args:
        model: Evaluated package.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.

    Returns:
        Nothing: it always raises, unless the thresholds hold after all.

    Raises:
        BudgetError: With the numbers, in one line.
    """
    from filterpress import package

    source = package.load(model)
    budget = budget_of(source, max_size, min_accuracy)
    evaluated = evaluated_report(source, encoded_file(model))
    require(budget, evaluated["n_bytes"], evaluated["validation_accuracy"])
    return evaluated
