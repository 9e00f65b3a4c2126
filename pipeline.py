"""The Kubeflow pipeline: compress until the network fits, and its command line.

KFP has no loop, so the loop is unrolled when the pipeline is compiled, as a staircase of `dsl.If`:

```
check -> train -> prune -> search -> round-1 -+- publish            both thresholds hold
                                              +- give-up            too big to be mended
                                              +- retrain-loop-1 ----+- publish
                                                                    +- round-2 ...  once more
                                                                    +- give-up
round-n        = size_tries x (cluster, reduce) -> evaluate
retrain-loop-n = retrains x (retrain, evaluate)
```

All of it is inside of an exit handler, report, which tells how it ended. search passes its package
on, unless max_size is "smallest". A decision is one string. Whatever is neither "publish" nor has a
branch of its own ends in give-up, so that no run ends well with nothing published. A step with
nothing left to do copies its package.
"""

import inspect
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from kfp import compiler, dsl
from kfp.dsl.graph_component import GraphComponent

from components import IMAGE
from components._cluster import read_schedule, remove_schedule, send, set_schedule
from components._flags import (
    Here,
    Image,
    Out,
    Tries,
    check_for_cluster,
    check_parameters,
    connect,
    split,
)
from components._ir import check_image, pin, settle_names
from components._lint import check
from components._local import on_this_machine
from components._local import run as run_locally
from components._local import sweep as sweep_locally
from components._manifests import write
from components._placing import LOCAL, ON_A_CLUSTER, Policy, policy_of
from components._placing import PARAMETERS as CLUSTER_ONLY
from components._rounds import call, make_retrain_loop, make_round
from components._stairs import Stairs, add_level
from components._sweep import build_sweep
from components.check import check as check_settings
from components.prune import prune
from components.report import report
from components.search import search
from components.train import train
from filterpress import files, terminal
from filterpress.flags import Debug, Json, with_flags_of
from filterpress.presets import DEFAULT
from filterpress.release.keys import keys_for
from filterpress.reporting import tried

NAME = "filterpress"
ROUNDS, SIZE_TRIES, RETRAINS = 3, 2, 2


def build(
    rounds: int = ROUNDS,
    size_tries: int = SIZE_TRIES,
    retrains: int = RETRAINS,
    policy: Policy = ON_A_CLUSTER,
) -> GraphComponent:
    """Unroll the loop into a pipeline.

    Args:
        rounds: Most rounds of a run; ``max_rounds`` may ask for fewer.
        size_tries: Pairs of cluster and reduce in a round.
        retrains: Most retrains in a round; ``max_retrains`` may ask for fewer.
        policy: How steps are run.

    Raises:
        ValueError: A bound is below its least value.
    """
    bounds = {"rounds": (rounds, 1), "size_tries": (size_tries, 1), "retrains": (retrains, 0)}
    for bound, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"{bound} must be at least {least}, got {value}")
    numbers = range(1, rounds + 1)
    stairs = Stairs(
        size_tries=size_tries,
        rounds=[make_round(n, size_tries, policy) for n in numbers],
        retrain_loops=[make_retrain_loop(n, retrains, policy) for n in numbers if retrains],
        retrains=retrains,
    )
    return settle_names(define(stairs, policy))


def define(stairs: Stairs, policy: Policy) -> GraphComponent:
    """Define the pipeline on its sub-pipelines."""

    @dsl.pipeline(name=NAME)
    def pipeline(
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
        max_size: str = "12x",
        min_accuracy: str = "-1pp",
        max_rounds: int = 2,
        max_retrains: int = 2,
        max_minutes: int = 60,
        preset: str = DEFAULT,
        prune_config: str = "{}",
        cluster_config: str = "{}",
        reduce_config: str = "{}",
        retrain_config: str = "{}",
        store: str = "",
        keys: str = "",
        name: str = NAME,
        channel: str = "any/stable",
        percent: float = 100.0,
        cpu: str = "1",
        memory: str = "4Gi",
        accelerators: str = "0",
        accelerator: str = "nvidia.com/gpu",
        node_selector: dict = {},  # noqa: B006 (KFP copies it into the form)
        tolerations: list = [],  # noqa: B006
    ):
        """Compress a trained CNN to a storage budget and an accuracy floor, and publish it signed.

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
            max_size: Goal: storage threshold of the published file, as bytes, 300KB, 300KiB or
                12x; or smallest, for the smallest file that keeps the accuracy threshold.
            min_accuracy: Goal: accuracy threshold, a fraction (0.92), or percentage points below
                the trained network (-1pp).
            max_rounds: Goal: rounds allowed, up to what was compiled.
            max_retrains: Goal: retrains allowed in a round, up to what was compiled.
            max_minutes: Goal: time for finding the smallest file, where that is asked for.
            preset: Methods: name of a system of methods and settings, such as patent-loop or
                post-training, which the four below go over.
            prune_config: Methods: JSON object that names a pruning method and overrides its config.
            cluster_config: Methods: JSON object that names a clustering method and overrides its
                config.
            reduce_config: Methods: JSON object that names a reduction method and overrides its
                config.
            retrain_config: Methods: JSON object that overrides fields of the retraining's config.
            store: Publish: folder or bucket to publish to.
            keys: Publish: folder of the signing keys, outside of the store; empty makes
                development keys beside a store that is a folder.
            name: Publish: name of the network in the store.
            channel: Publish: kind of vehicle and channel, such as any/stable; empty for none.
            percent: Publish: share of these vehicles that take part at once.
            cpu: Cluster: CPUs that a step asks for.
            memory: Cluster: memory of a step; one that needs more is ended.
            accelerators: Cluster: accelerators of a step that trains; of prune and reduce, one.
            accelerator: Cluster: their kind, as nodes offer it.
            node_selector: Cluster: JSON object of labels of the nodes that train.
            tolerations: Cluster: JSON list of taints that the steps which train tolerate.
        """
        given = {**locals(), "policy": policy, "size_tries": stairs.size_tries}
        with dsl.ExitHandler(call(report, given), name="run"):
            checked = call(check_settings, given, **stairs.bounds(), sizes=[])
            trained = call(train, given, config=train_config).after(checked).outputs["trained"]
            given |= {"trained": trained, "shrink_accelerators": checked.output}
            pruned = call(prune, given, model=trained, config=prune_config).outputs["pruned"]
            found = call(search, given, model=pruned)
            add_level(given, stairs, found.outputs["found"], found.outputs["Output"], 1)

    return pipeline


app = typer.Typer(
    help=__doc__.partition("\n")[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMPILED = Path(__file__).with_name("manifests") / "pipeline.yaml"
PARAMETERS = build(rounds=1, size_tries=1, retrains=0).pipeline_func
SWEEP = build_sweep(size_tries=1).pipeline_func


@app.command("compile")
@with_flags_of(policy_of)
def compile_(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = COMPILED,
    sweep: Annotated[bool, typer.Option("--sweep", help="The sweep over several sizes.")] = False,
    rounds: Annotated[int, typer.Option(help="Most rounds of a run.")] = ROUNDS,
    size_tries: Tries = SIZE_TRIES,
    retrains: Annotated[int, typer.Option(help="Most retrains in a round.")] = RETRAINS,
    image: Annotated[str, typer.Option(help="Image of every step, pinned by digest.")] = "",
    debug: Debug = False,
    **given: Any,
) -> None:
    """Compile the pipeline to one file, and check it."""
    with terminal.polite(debug):
        policy = policy_of(**given)
        if sweep and output == COMPILED:
            raise ValueError(f"output must be another file for the sweep, got {output}")
        if sweep:
            pipeline = build_sweep(size_tries, retrains, policy)
        else:
            pipeline = build(rounds, size_tries, retrains, policy)
        if image:
            check_image(image)
            pin(pipeline, image)
        with tempfile.TemporaryDirectory() as made:
            compiled = Path(made) / output.name
            compiler.Compiler().compile(pipeline, str(compiled))
            check(compiled, pinned=bool(image))
            files.write(output, compiled.read_bytes())


@app.command()
def manifests(
    folder: Annotated[Path, typer.Argument(help="Folder of manifests.")] = COMPILED.parent,
    debug: Debug = False,
) -> None:
    """Compile the pipeline, and write its Kubernetes resources for every overlay."""
    with terminal.polite(debug), tempfile.TemporaryDirectory() as made:
        compiled = Path(made) / COMPILED.name
        compiler.Compiler().compile(build(), str(compiled))
        check(compiled)
        write(folder, compiled)


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="Compiled pipeline.")] = COMPILED,
    pinned: Annotated[bool, typer.Option(help="Whether images must be pinned.")] = False,
    debug: Debug = False,
) -> None:
    """Check that a compiled pipeline runs alike on one machine and on a cluster."""
    with terminal.polite(debug):
        check(file, pinned=pinned)


@app.command()
@with_flags_of(SWEEP, without=CLUSTER_ONLY, grouped=True)
def sweep(
    *,
    out: Out,
    image: Here = "",
    size_tries: Tries = SIZE_TRIES,
    json: Json = False,
    debug: Debug = False,
    **parameters: Any,
) -> None:
    """Compress to several sizes on this machine, and draw accuracy against size."""
    with terminal.polite(debug):
        check_parameters(parameters)
        arguments = on_this_machine(parameters, out.resolve())
        pipeline = build_sweep(size_tries, arguments["max_retrains"], LOCAL)
        found = sweep_locally(pipeline, arguments, out.resolve(), image)
    if json:
        terminal.show(found, json)
    else:
        terminal.show_table(found["html"], [tried(entry) for entry in found["tries"]])


@app.command()
@with_flags_of(PARAMETERS, without=CLUSTER_ONLY, grouped=True)
def run(
    *,
    out: Out,
    image: Here = "",
    size_tries: Tries = SIZE_TRIES,
    json: Json = False,
    debug: Debug = False,
    **parameters: Any,
) -> None:
    """Run the pipeline on this machine, step by step; what did not change is reused."""
    with terminal.polite(debug):
        check_parameters(parameters)
        out = out.resolve()
        arguments = on_this_machine(parameters, out)
        bounds = {"rounds": arguments["max_rounds"], "retrains": arguments["max_retrains"]}
        pipeline = build(**bounds, size_tries=size_tries, policy=LOCAL)
        found = run_locally(pipeline, arguments, out, image)
    terminal.show(found, json)


@app.command()
@with_flags_of(PARAMETERS, grouped=True)
@with_flags_of(policy_of)
@with_flags_of(connect)
def submit(
    *, image: Image = IMAGE, size_tries: Tries = SIZE_TRIES, debug: Debug = False, **given: Any
) -> None:
    """Submit a run to a cluster; steps that it has done before are reused."""
    parameters, how, where = split(given, PARAMETERS, policy_of, connect)
    with terminal.polite(debug):
        pipeline = build_for(parameters, size_tries, policy_of(**how), image)
        address = send(pipeline, parameters, connect(**where))
    print(address)


@app.command()
@with_flags_of(SWEEP, grouped=True)
@with_flags_of(policy_of)
@with_flags_of(connect)
def submit_sweep(
    *, image: Image = IMAGE, size_tries: Tries = SIZE_TRIES, debug: Debug = False, **given: Any
) -> None:
    """Submit a sweep to a cluster: several sizes in one run, and their curve."""
    parameters, how, where = split(given, SWEEP, policy_of, connect)
    with terminal.polite(debug):
        check_for_cluster(parameters, image)
        pipeline = build_sweep(size_tries, parameters["max_retrains"], policy_of(**how))
        address = send(pin(pipeline, image), parameters, connect(**where))
    print(address)


@app.command()
@with_flags_of(PARAMETERS, grouped=True)
@with_flags_of(policy_of)
@with_flags_of(connect)
def schedule(
    *,
    image: Image = IMAGE,
    size_tries: Tries = SIZE_TRIES,
    cron: Annotated[str, typer.Option(help="When runs start from now on: '0 2 * * *'.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Start no more.")] = False,
    json: Json = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Show when a cluster starts runs; change it with --cron, end it with --remove."""
    parameters, how, where = split(given, PARAMETERS, policy_of, connect)
    with terminal.polite(debug):
        if cron and remove:
            raise ValueError(f"remove must go without cron, got {cron!r}")
        cluster = connect(**where)
        if cron:
            pipeline = build_for(parameters, size_tries, policy_of(**how), image)
            set_schedule(pipeline, parameters, cron, cluster)
        if remove:
            remove_schedule(cluster)
        found = read_schedule(cluster)
        for row in found:
            row["parameters"] = settings(row["parameters"])
    if json or not found:
        terminal.show({"experiment": cluster.experiment, "schedules": found or "none"}, json)
    else:
        terminal.show_table(cluster.experiment, found)


def build_for(
    parameters: dict[str, Any], size_tries: int, policy: Policy, image: str
) -> GraphComponent:
    """Build the pipeline for a cluster: as many rounds as are asked for, in one image."""
    check_for_cluster(parameters, image)
    keys_for(parameters["store"], parameters["keys"])
    bounds = {"rounds": parameters["max_rounds"], "retrains": parameters["max_retrains"]}
    return pin(build(**bounds, size_tries=size_tries, policy=policy), image)


def settings(parameters: dict[str, Any]) -> str:
    """Write down what a run is told beyond the defaults."""
    known = inspect.signature(PARAMETERS).parameters
    told = [f"{k}={v}" for k, v in parameters.items() if k in known and v != known[k].default]
    return " ".join(told)


if __name__ == "__main__":
    app()
