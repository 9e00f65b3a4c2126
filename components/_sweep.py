"""The sweep: one network at several sizes, side by side, and the curve that they give.

```
check -> train -> for each size: prune -> round-1 -> retrain-loop-1 -> curve
```

There is no condition in it: retrains pass on what was decided before them. KFP gathers the packages
of all sizes from 2.14 on.
"""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from components._ir import settle_names
from components._placing import ON_A_CLUSTER, Policy
from components._rounds import call, make_retrain_loop, make_round
from components.check import check
from components.curve import curve
from components.prune import prune
from components.train import train
from filterpress.presets import DEFAULT

NAME = "filterpress-sweep"


def build_sweep(
    size_tries: int = 2, retrains: int = 1, policy: Policy = ON_A_CLUSTER
) -> GraphComponent:
    """Make the pipeline.

    Args:
        size_tries: Pairs of cluster and reduce for each size.
        retrains: Most retrains for each size; ``max_retrains`` may ask for fewer.
        policy: How steps are run.

    Raises:
        ValueError: A bound is below its least value.
    """
    for bound, value in (("size_tries", size_tries), ("retrains", retrains)):
        if value < 1:
            raise ValueError(f"{bound} must be at least 1, got {value}")
    one_round = make_round(1, size_tries, policy)
    retrain_loop = make_retrain_loop(1, retrains, policy)

    @dsl.pipeline(name=NAME)
    def sweep(
        model: str = "small",
        weights: str = "",
        train_config: str = "{}",
        data: str = "digits",
        data_dir: str = "",
        image_size: int = 0,
        task: str = "",
        seed: int = 0,
        scratch: str = "",
        nodes: int = 1,
        runtime: str = "filterpress",
        sizes: list = ["10x", "20x", "40x"],  # noqa: B006 (KFP copies it into the form)
        min_accuracy: str = "-1pp",
        max_retrains: int = 1,
        preset: str = DEFAULT,
        prune_config: str = "{}",
        cluster_config: str = "{}",
        reduce_config: str = "{}",
        retrain_config: str = "{}",
        cpu: str = "1",
        memory: str = "4Gi",
        accelerators: str = "0",
        accelerator: str = "nvidia.com/gpu",
        node_selector: dict = {},  # noqa: B006
        tolerations: list = [],  # noqa: B006
    ):
        """Compress a trained CNN to several sizes, and draw accuracy against size.

        Args:
            model: Train: network, a built-in name, torchvision:NAME or package.module:function.
            weights: Train: file of trained weights; empty trains from scratch.
            train_config: Train: JSON object that overrides fields of the training's config.
            data: Data: data set, digits, fashion-mnist, cifar10 or image-folder:PATH.
            data_dir: Data: folder or bucket that holds the data set.
            image_size: Data: height and width in pixels; 0 keeps the data set's own.
            task: Data: package.module:function of a task of your own.
            seed: Data: seed of everything random.
            scratch: Machines: folder or bucket for checkpoints, from which a training that was
                stopped goes on; empty for none.
            nodes: Machines: how many train; more than one needs Kubeflow Trainer and a scratch in
                a bucket, and the step itself no accelerators.
            runtime: Machines: TrainingRuntime of them, where there are several.
            sizes: Goal: JSON list of sizes of the file, each as bytes, 300KB, 300KiB or 12x.
            min_accuracy: Goal: accuracy up to which a network is retrained, a fraction (0.92), or
                percentage points below the trained network (-1pp).
            max_retrains: Goal: retrains allowed for each size, up to what was compiled.
            preset: Methods: name of a system of methods and settings, such as patent-loop or
                post-training, which the four below go over.
            prune_config: Methods: JSON object that names a pruning method and overrides its config.
            cluster_config: Methods: JSON object that names a clustering method and overrides its
                config.
            reduce_config: Methods: JSON object that names a reduction method and overrides its
                config.
            retrain_config: Methods: JSON object that overrides fields of the retraining's config.
            cpu: Cluster: CPUs that a step asks for.
            memory: Cluster: memory of a step; one that needs more is ended.
            accelerators: Cluster: accelerators of a step that trains; of prune and reduce, one.
            accelerator: Cluster: their kind, as nodes offer it.
            node_selector: Cluster: JSON object of labels of the nodes that train.
            tolerations: Cluster: JSON list of taints that the steps which train tolerate.
        """
        given = {**locals(), "policy": policy, "size_tries": size_tries, "max_rounds": 1}
        bounds = {"rounds": 1, "retrains": retrains}
        unused = {"max_size": "smallest", "max_minutes": 0, "store": "", "keys": ""}
        checked = call(check, given, **unused, **bounds, channel="", percent=100.0)
        given["shrink_accelerators"] = checked.output
        given["trained"] = call(train, given, config=train_config).after(checked).outputs["trained"]
        with dsl.ParallelFor(sizes, parallelism=policy.parallel) as size:
            given["max_size"] = size
            pruned = call(prune, given, model=given["trained"], config=prune_config)
            start = {"model": pruned.outputs["pruned"], "state": "too-big"}
            smaller = call(one_round, given, **start)
            decided = {"model": smaller.outputs["model"], "decision": smaller.outputs["Output"]}
            accurate = call(retrain_loop, given, **decided)
        call(curve, given, packages=dsl.Collected(accurate.outputs["model"]))

    return settle_names(sweep)
