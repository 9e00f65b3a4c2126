"""KFP component of the ``train`` stage."""

from kfp import dsl

from components import stage


@stage
def train(
    model: str,
    weights: str,
    seed: int,
    config: str,
    data: str,
    data_dir: str,
    image_size: int,
    task: str,
    scratch: str,
    nodes: int,
    runtime: str,
    trained: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
):
    """Train the network that is to be compressed, or take it with its weights.

    Args:
        model: Network: a built-in name, torchvision:NAME or package.module:function.
        weights: File of trained weights; empty trains from scratch.
        seed: Seed of everything random.
        config: JSON: what overrides the training's config.
        data: Data set.
        data_dir: Folder or bucket of the data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        scratch: Folder or bucket for checkpoints; empty for none.
        nodes: Machines to train on.
        runtime: TrainingRuntime of the machines, where there are several.
        trained: Package with the trained network.
        page: The story of the package so far.
        report: What the stage found.
    """
    from pathlib import Path

    from filterpress import recording, reporting, stages

    found = stages.train(
        Path(trained.path),
        model=model,
        weights=weights,
        seed=seed,
        config=config,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        task=task,
        scratch=scratch,
        nodes=nodes,
        runtime=runtime,
    )
    recording.record(found, report, trained)
    reporting.write_html(Path(trained.path), Path(page.path))
