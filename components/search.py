"""KFP component of the ``search`` stage."""

from kfp import dsl

from components import stage


@stage
def search(
    model: dsl.Input[dsl.Model],
    trained: dsl.Input[dsl.Model],
    max_size: str,
    min_accuracy: str,
    max_minutes: int,
    max_retrains: int,
    size_tries: int,
    seed: int,
    preset: str,
    cluster_config: str,
    reduce_config: str,
    retrain_config: str,
    data: str,
    data_dir: str,
    image_size: int,
    task: str,
    scratch: str,
    nodes: int,
    runtime: str,
    found: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
) -> str:
    """Find the smallest file that keeps the floor, where no size is given.

    Args:
        model: Package to compress.
        trained: Package with the trained network.
        max_size: "smallest" searches; any size passes the package on as it is.
        min_accuracy: Accuracy floor: a fraction, or points below the trained network.
        max_minutes: Time for the search.
        max_retrains: Retrains for each size tried.
        size_tries: Pairs of cluster and reduce for each size tried.
        seed: Seed of everything random.
        preset: Name of the methods and settings that those below go over.
        cluster_config: JSON: a method and what overrides its config.
        reduce_config: JSON: a method and what overrides its config.
        retrain_config: JSON: what overrides the retraining's config.
        data: Data set.
        data_dir: Folder or bucket of the data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        scratch: Folder or bucket for checkpoints; empty for none.
        nodes: Machines to train on.
        runtime: TrainingRuntime of the machines, where there are several.
        found: Package with the smallest file, or the one that came.
        page: The story of the package so far.
        report: What the stage found.

    Returns:
        State of the first round: "fits" or "too-big".
    """
    from pathlib import Path

    from filterpress import recording, reporting, stages

    outcome = stages.search(
        Path(model.path),
        Path(trained.path),
        Path(found.path),
        max_size=max_size,
        min_accuracy=min_accuracy,
        max_minutes=max_minutes,
        max_retrains=max_retrains,
        size_tries=size_tries,
        seed=seed,
        preset=preset,
        cluster_config=cluster_config,
        reduce_config=reduce_config,
        retrain_config=retrain_config,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        task=task,
        scratch=scratch,
        nodes=nodes,
        runtime=runtime,
    )
    recording.record(outcome, report, found)
    reporting.write_html(Path(found.path), Path(page.path), outcome)
    return outcome["state"]
