"""KFP component of the ``evaluate`` stage."""

from kfp import dsl

from components import stage


@stage
def evaluate(
    model: dsl.Input[dsl.Model],
    state: str,
    max_size: str,
    min_accuracy: str,
    round: int,
    retrains: int,
    max_rounds: int,
    max_retrains: int,
    data: str,
    data_dir: str,
    image_size: int,
    task: str,
    evaluated: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
) -> str:
    """Encode the network, decode those bytes, measure what came out, and decide what is next.

    Args:
        model: Package to measure.
        state: State of the round or the last decision; a settled one is passed on.
        max_size: Largest file: bytes, 300KB, 300KiB or 12x.
        min_accuracy: Least accuracy: 0.92, or -1pp against the trained network.
        round: Number of this round, from 1.
        retrains: Retrains done in this round.
        max_rounds: Rounds allowed.
        max_retrains: Retrains allowed in a round.
        data: Data set.
        data_dir: Folder or bucket of the data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        evaluated: Package with its encoded file.
        page: The story of the package so far.
        report: What the stage found.
        confusion: What was taken for what on the test set, where the task has few classes.

    Returns:
        Decision: "publish", "retrain", "next", "give-up" or "too-big".
    """
    from pathlib import Path

    from filterpress import recording, reporting, stages

    found = stages.evaluate(
        Path(model.path),
        Path(evaluated.path),
        state=state,
        max_size=max_size,
        min_accuracy=min_accuracy,
        round=round,
        retrains=retrains,
        max_rounds=max_rounds,
        max_retrains=max_retrains,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        task=task,
    )
    recording.record(found, report, evaluated)
    recording.record_confusion(found, confusion)
    reporting.write_html(Path(evaluated.path), Path(page.path), found)
    return found["decision"]
