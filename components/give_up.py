"""KFP component of the ``give_up`` stage."""

from kfp import dsl

from components import stage


@stage
def give_up(
    model: dsl.Input[dsl.Model],
    max_size: str,
    min_accuracy: str,
    page: dsl.Output[dsl.HTML],
):
    """Fail the run with the numbers: nothing is published.

    Args:
        model: Evaluated package, the best that the run has.
        max_size: Largest file: bytes, 300KB, 300KiB or 12x.
        min_accuracy: Least accuracy: 0.92, or -1pp against the trained network.
        page: The story of the run.
    """
    from pathlib import Path

    from filterpress import reporting, stages

    reporting.write_html(Path(model.path), Path(page.path))
    stages.give_up(Path(model.path), max_size=max_size, min_accuracy=min_accuracy)
