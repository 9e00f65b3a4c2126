"""KFP component of the ``retrain`` stage."""

from kfp import dsl

from components import stage


@stage
def retrain(
    model: dsl.Input[dsl.Model],
    trained: dsl.Input[dsl.Model],
    decision: str,
    max_size: str,
    min_accuracy: str,
    seed: int,
    preset: str,
    config: str,
    data: str,
    data_dir: str,
    image_size: int,
    task: str,
    scratch: str,
    nodes: int,
    runtime: str,
    retrained: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
):
    """Win accuracy back in the compressed form, with the trained network as teacher.

    Args:
        model: Evaluated package.
        trained: Package with the trained network.
        decision: Last decision; all but "retrain" pass the package on as it is.
        max_size: Largest file: bytes, 300KB, 300KiB or 12x.
        min_accuracy: Least accuracy: 0.92, or -1pp against the trained network.
        seed: Seed of everything random.
        preset: Name of the methods and settings that config goes over.
        config: JSON: what overrides the retraining's config.
        data: Data set.
        data_dir: Folder or bucket of the data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        scratch: Folder or bucket for checkpoints; empty for none.
        nodes: Machines to train on.
        runtime: TrainingRuntime of the machines, where there are several.
        retrained: Package with retrained numbers.
        page: The story of the package so far.
        report: What the stage found.
    """
    from pathlib import Path

    from filterpress import recording, reporting, stages

    found = stages.retrain(
        Path(model.path),
        Path(trained.path),
        Path(retrained.path),
        decision=decision,
        max_size=max_size,
        min_accuracy=min_accuracy,
        seed=seed,
        preset=preset,
        config=config,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        task=task,
        scratch=scratch,
        nodes=nodes,
        runtime=runtime,
    )
    recording.record(found, report, retrained)
    reporting.write_html(Path(retrained.path), Path(page.path), found)
