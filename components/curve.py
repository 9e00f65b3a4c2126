"""KFP component of the ``curve`` stage, which ends a sweep."""

from kfp import dsl

from components import stage


@stage
def curve(
    packages: dsl.Input[list[dsl.Model]],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
):
    """Set several sizes of one network side by side.

    Args:
        packages: Evaluated packages.
        page: Accuracy against size.
        report: The points, and the numbers of the smallest that keeps the floor.
    """
    from pathlib import Path

    from filterpress import recording, stages

    found = stages.curve([Path(package.path) for package in packages], Path(page.path))
    recording.record(found, report, page)
