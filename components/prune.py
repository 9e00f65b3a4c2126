"""KFP component of the ``prune`` stage."""

from kfp import dsl

from components import stage


@stage
def prune(
    model: dsl.Input[dsl.Model],
    max_size: str,
    seed: int,
    preset: str,
    config: str,
    data: str,
    data_dir: str,
    image_size: int,
    task: str,
    scratch: str,
    pruned: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
):
    """Remove what the network can do without.

    Args:
        model: Package to compress.
        max_size: Largest file, for methods that prune as far as it asks.
        seed: Seed of everything random.
        preset: Name of the methods and settings that config goes over.
        config: JSON: a method and what overrides its config.
        data: Data set.
        data_dir: Folder or bucket of the data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        scratch: Folder or bucket for checkpoints; empty for none.
        pruned: Package with less in it.
        page: The story of the package so far.
        report: What the stage found.
    """
    from pathlib import Path

    from filterpress import recording, reporting, stages

    found = stages.prune(
        Path(model.path),
        Path(pruned.path),
        max_size=max_size,
        seed=seed,
        preset=preset,
        config=config,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        task=task,
        scratch=scratch,
    )
    recording.record(found, report, pruned)
    reporting.write_html(Path(pruned.path), Path(page.path))
