"""KFP component of the ``reduce`` stage."""

from kfp import dsl

from components import stage


@stage
def reduce(
    model: dsl.Input[dsl.Model],
    state: str,
    max_size: str,
    round: int,
    seed: int,
    preset: str,
    config: str,
    data: str,
    data_dir: str,
    image_size: int,
    task: str,
    scratch: str,
    reduced: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
) -> str:
    """Spend fewer bits on every weight, towards the storage threshold.

    Args:
        model: Package to compress.
        state: State of the round; "fits" passes the package on as it is.
        max_size: Largest file: bytes, 300KB, 300KiB or 12x.
        round: Number of this round, from 1.
        seed: Seed of everything random.
        preset: Name of the methods and settings that config goes over.
        config: JSON: a method and what overrides its config.
        data: Data set.
        data_dir: Folder or bucket of the data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        scratch: Folder or bucket for checkpoints; empty for none.
        reduced: Package with smaller weights.
        page: The story of the package so far.
        report: What the stage found.

    Returns:
        State of the round: "fits" or "too-big".
    """
    from pathlib import Path

    from filterpress import recording, reporting, stages

    found = stages.reduce(
        Path(model.path),
        Path(reduced.path),
        state=state,
        max_size=max_size,
        round=round,
        seed=seed,
        preset=preset,
        config=config,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        task=task,
        scratch=scratch,
    )
    recording.record(found, report, reduced)
    reporting.write_html(Path(reduced.path), Path(page.path), found)
    return found["state"]
