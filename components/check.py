"""KFP component of the ``check`` stage."""

from components import stage


@stage
def check(
    model: str,
    data: str,
    image_size: int,
    task: str,
    max_size: str,
    sizes: list,
    min_accuracy: str,
    max_rounds: int,
    max_retrains: int,
    max_minutes: int,
    size_tries: int,
    rounds: int,
    retrains: int,
    scratch: str,
    nodes: int,
    accelerators: str,
    store: str,
    keys: str,
    channel: str,
    percent: float,
    preset: str,
    train_config: str,
    prune_config: str,
    cluster_config: str,
    reduce_config: str,
    retrain_config: str,
) -> str:
    """Refuse settings that cannot be used, before anything is spent on them.

    Args:
        model: Network: a built-in name, torchvision:NAME or package.module:function.
        data: Data set.
        image_size: Pixels a side; 0 keeps the data set's own.
        task: Your own task, as package.module:function.
        max_size: Largest file: bytes, 300KB, 300KiB or 12x; or smallest.
        sizes: Several such sizes, for a sweep.
        min_accuracy: Least accuracy: 0.92, or -1pp against the trained network.
        max_rounds: Rounds allowed.
        max_retrains: Retrains allowed in a round.
        max_minutes: Time for finding the smallest file.
        size_tries: Pairs of cluster and reduce in a round.
        rounds: Rounds that there are steps for.
        retrains: Retrains that there are steps for in a round.
        scratch: Folder or bucket for checkpoints.
        nodes: Machines to train on.
        accelerators: Accelerators of a step that trains.
        store: Folder or bucket to publish to.
        keys: Folder of the signing keys.
        channel: Kind of vehicle and channel; empty for none.
        percent: Share of these vehicles that take part at once.
        preset: Name of the methods and settings that those below go over.
        train_config: JSON: what overrides the training's config.
        prune_config: JSON: a method and what overrides its config.
        cluster_config: JSON: a method and what overrides its config.
        reduce_config: JSON: a method and what overrides its config.
        retrain_config: JSON: what overrides the retraining's config.

    Returns:
        Accelerators of a step that prunes or reduces.
    """
    from filterpress import stages

    outcome = stages.check(
        model=model,
        data=data,
        image_size=image_size,
        task=task,
        max_size=max_size,
        sizes=sizes,
        min_accuracy=min_accuracy,
        max_rounds=max_rounds,
        max_retrains=max_retrains,
        max_minutes=max_minutes,
        size_tries=size_tries,
        rounds=rounds,
        retrains=retrains,
        scratch=scratch,
        nodes=nodes,
        accelerators=accelerators,
        store=store,
        keys=keys,
        channel=channel,
        percent=percent,
        preset=preset,
        train_config=train_config,
        prune_config=prune_config,
        cluster_config=cluster_config,
        reduce_config=reduce_config,
        retrain_config=retrain_config,
    )
    return outcome["accelerators"]
