"""KFP component of the ``publish`` stage."""

from kfp import dsl

from components import stage


@stage
def publish(
    model: dsl.Input[dsl.Model],
    store: str,
    keys: str,
    name: str,
    channel: str,
    percent: float,
    run: str,
    max_size: str,
    min_accuracy: str,
    data: str,
    data_dir: str,
    image_size: int,
    task: str,
    release: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.Metrics],
):
    """Check both thresholds once more, then sign the evaluated bytes and publish them.

    Args:
        model: Evaluated package.
        store: Folder or bucket to publish to.
        keys: Folder of the signing keys, outside of the store.
        name: Name of the network in the store.
        channel: Kind of vehicle and channel, such as any/stable; empty for none.
        percent: Share of these vehicles that take part at once.
        run: Id of the run, for the channel's record.
        max_size: Largest file: bytes, 300KB, 300KiB or 12x.
        min_accuracy: Least accuracy: 0.92, or -1pp against the trained network.
        data: Data set.
        data_dir: Folder or bucket of the data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        release: Receipt: store, target, digest, release counter, bytes in full and as a delta.
        page: The story of the run.
        report: What the stage found.
    """
    from pathlib import Path

    from filterpress import recording, reporting, stages

    found = stages.publish(
        Path(model.path),
        Path(release.path),
        store=store,
        keys=keys,
        name=name,
        channel=channel,
        percent=percent,
        run=run,
        max_size=max_size,
        min_accuracy=min_accuracy,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        task=task,
    )
    release.metadata.update(found)
    recording.record(found, report, release)
    reporting.write_html(Path(model.path), Path(page.path), found)
