"""KFP component of the ``report`` stage, which ends every run."""

from kfp import dsl

from components import stage


@stage
def report(status: dsl.PipelineTaskFinalStatus, page: dsl.Output[dsl.HTML]):
    """Tell how the run ended, whatever happened.

    Args:
        status: How the steps before ended.
        page: The verdict, and the story of the run.
    """
    from pathlib import Path

    from filterpress import stages

    stages.report(page.uri, Path(page.path), state=status.state, error=status.error_message)
