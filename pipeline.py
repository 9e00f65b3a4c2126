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
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from kfp import compiler, dsl, kubernetes
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_task import PipelineTask

from components import IMAGE
from components._cluster import Cluster, read_schedule, remove_schedule, send, set_schedule
from components._ir import check_image, pin, settle_names
from components._lint import check
from components._local import on_this_machine
from components._local import run as run_locally
from components._manifests import write
from components._placing import LOCAL, ON_A_CLUSTER, Policy, check_amounts
from components._placing import PARAMETERS as CLUSTER_ONLY
from components._rounds import call, make_retrain_loop, make_round
from components.check import check as check_settings
from components.give_up import give_up
from components.prune import prune
from components.publish import publish
from components.report import report
from components.search import search
from components.train import train
from filterpress import files, stages, terminal
from filterpress.budget import check_spelling
from filterpress.flags import Debug, Json, with_flags_of
from filterpress.release.keys import keys_for

NAME = "filterpress"
ROUNDS, SIZE_TRIES, RETRAINS = 3, 2, 2
#: Where a cluster shows the step that signs its keys, if it has any.
KEYS_SECRET, KEYS_FOLDER = "filterpress-publish-keys", "/etc/filterpress/keys"


class Stairs(NamedTuple):
    """The sub-pipelines of the rounds, from the first; KFP wants them made before the pipeline.

    ``size_tries`` is the number of pairs of cluster and reduce in each.
    """

    size_tries: int
    rounds: list[GraphComponent]
    retrain_loops: list[GraphComponent]  # empty without retrains


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
        max_size: str = "12x",
        min_accuracy: str = "-1pp",
        max_rounds: int = 2,
        max_retrains: int = 2,
        max_minutes: int = 60,
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
            max_size: Goal: storage threshold of the published file, as bytes, 300KB, 300KiB or
                12x; or smallest, for the smallest file that keeps the accuracy threshold.
            min_accuracy: Goal: accuracy threshold, a fraction (0.92), or percentage points below
                the trained network (-1pp).
            max_rounds: Goal: rounds allowed, up to what was compiled.
            max_retrains: Goal: retrains allowed in a round, up to what was compiled.
            max_minutes: Goal: time for finding the smallest file, where that is asked for.
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
            accelerators: Cluster: accelerators of each step that trains.
            accelerator: Cluster: their kind, as nodes offer it.
            node_selector: Cluster: JSON object of labels of the nodes that train.
            tolerations: Cluster: JSON list of taints that the steps which train tolerate.
        """
        given = {**locals(), "policy": policy, "size_tries": stairs.size_tries}
        with dsl.ExitHandler(call(report, given), name="run"):
            checked = call(check_settings, given)
            trained = call(train, given, config=train_config).after(checked).outputs["trained"]
            pruned = call(prune, given, model=trained, config=prune_config).outputs["pruned"]
            given["trained"] = trained
            found = call(search, given, model=pruned)
            add_level(given, stairs, found.outputs["found"], found.outputs["Output"], 1)

    return pipeline


def add_level(given: dict[str, Any], stairs: Stairs, package: Any, state: Any, number: int) -> None:
    """Add a round to the pipeline that is being defined, and all that may follow it.

    Args:
        given: Parameters of the pipeline, and the trained network.
        stairs: Sub-pipelines.
        package: Package that the round starts from.
        state: Whether its file fits.
        number: Number of the round, from 1.
    """
    smaller = call(stairs.rounds[number - 1], given, model=package, state=state)
    if not stairs.retrain_loops:
        add_outcomes(given, stairs, smaller, number)
        return
    add_publication(given, smaller)
    with dsl.If(smaller.outputs["Output"] == "retrain", name=f"retrain-{number}"):
        loop = stairs.retrain_loops[number - 1]
        accurate = call(loop, given, model=smaller.outputs["model"])
        add_outcomes(given, stairs, accurate, number)
    add_failure(given, smaller, unless="retrain")


def add_outcomes(given: dict[str, Any], stairs: Stairs, decided: PipelineTask, number: int) -> None:
    """Add what may follow the last measurement of a round: publish, the next round, or give up."""
    add_publication(given, decided)
    if number == len(stairs.rounds):
        with dsl.If(decided.outputs["Output"] != "publish", name="give-up"):
            call(give_up, given, model=decided.outputs["model"])
        return
    with dsl.If(decided.outputs["Output"] == "next", name=f"round-{number + 1}"):
        add_level(given, stairs, decided.outputs["model"], "too-big", number + 1)
    add_failure(given, decided, unless="next")


def add_publication(given: dict[str, Any], decided: PipelineTask) -> None:
    """Add the publication of what was decided to be published."""
    with dsl.If(decided.outputs["Output"] == "publish", name="publish"):
        model, run = decided.outputs["model"], dsl.PIPELINE_JOB_ID_PLACEHOLDER
        published = call(publish, given, model=model, run=run)
        kubernetes.use_secret_as_volume(published, KEYS_SECRET, KEYS_FOLDER, optional=True)


def add_failure(given: dict[str, Any], decided: PipelineTask, unless: str) -> None:
    """Add the end of a run in which neither publication nor the one other branch was decided."""
    decision = decided.outputs["Output"]
    with (
        dsl.If(decision != "publish", name="not-published"),
        dsl.If(decision != unless, name="give-up"),
    ):
        call(give_up, given, model=decided.outputs["model"])


app = typer.Typer(
    help=__doc__.partition("\n")[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Tries = Annotated[int, typer.Option(help="Pairs of cluster and reduce in a round.")]
COMPILED = Path(__file__).with_name("manifests") / "pipeline.yaml"
PARAMETERS = build(rounds=1, size_tries=1, retrains=0).pipeline_func


@app.command("compile")
def compile_(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = COMPILED,
    rounds: Annotated[int, typer.Option(help="Most rounds of a run.")] = ROUNDS,
    size_tries: Tries = SIZE_TRIES,
    retrains: Annotated[int, typer.Option(help="Most retrains in a round.")] = RETRAINS,
    image: Annotated[str, typer.Option(help="Image of every step, pinned by digest.")] = "",
    debug: Debug = False,
) -> None:
    """Compile the pipeline to one file, and check it."""
    with terminal.polite(debug):
        pipeline = build(rounds, size_tries, retrains)
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
@with_flags_of(PARAMETERS, without=CLUSTER_ONLY, grouped=True)
def run(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same one goes on with it.")],
    image: Annotated[
        str, typer.Option(help="Image of the containers that the steps run in; none: processes.")
    ] = "",
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


Host = Annotated[str, typer.Option(help="Address of the KFP API, http://…")]
Experiment = Annotated[str, typer.Option(help="Experiment of the runs.")]
Namespace = Annotated[str, typer.Option(help="Namespace, where there are users.")]
TokenFile = Annotated[
    Path | None, typer.Option(envvar="KF_PIPELINES_SA_TOKEN_PATH", help="File with a bearer token.")
]
Account = Annotated[str, typer.Option(help="Service account of the steps.")]
Image = Annotated[str, typer.Option(help="Image of every step, pinned by digest.")]


@app.command()
@with_flags_of(PARAMETERS, grouped=True)
def submit(
    *,
    host: Host,
    experiment: Experiment = NAME,
    namespace: Namespace = "kubeflow",
    token_file: TokenFile = None,
    service_account: Account = "",
    image: Image = IMAGE,
    size_tries: Tries = SIZE_TRIES,
    debug: Debug = False,
    **parameters: Any,
) -> None:
    """Submit a run to a cluster; steps that it has done before are reused."""
    with terminal.polite(debug):
        cluster = Cluster(host, experiment, namespace, read_token(token_file), service_account)
        address = send(build_for(parameters, size_tries, image), parameters, cluster)
    print(address)


@app.command()
@with_flags_of(PARAMETERS, grouped=True)
def schedule(
    *,
    cron: Annotated[str, typer.Option(help="When runs start from now on: '0 2 * * *'.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Start no more.")] = False,
    host: Host,
    experiment: Experiment = NAME,
    namespace: Namespace = "kubeflow",
    token_file: TokenFile = None,
    service_account: Account = "",
    image: Image = IMAGE,
    size_tries: Tries = SIZE_TRIES,
    json: Json = False,
    debug: Debug = False,
    **parameters: Any,
) -> None:
    """Show when a cluster starts runs; change it with --cron, end it with --remove."""
    with terminal.polite(debug):
        if cron and remove:
            raise ValueError(f"remove must go without cron, got {cron!r}")
        cluster = Cluster(host, experiment, namespace, read_token(token_file), service_account)
        if cron:
            set_schedule(build_for(parameters, size_tries, image), parameters, cron, cluster)
        if remove:
            remove_schedule(cluster)
        found = read_schedule(cluster)
        for row in found:
            row["parameters"] = settings(row["parameters"])
    if json or not found:
        terminal.show({"experiment": experiment, "schedules": found or "none"}, json)
    else:
        terminal.show_table(experiment, found)


def build_for(parameters: dict[str, Any], size_tries: int, image: str) -> GraphComponent:
    """Build the pipeline for a cluster: as many rounds as are asked for, in one image."""
    check_image(image)
    check_parameters(parameters)
    check_amounts(parameters)
    keys_for(parameters["store"], parameters["keys"])
    bounds = {"rounds": parameters["max_rounds"], "retrains": parameters["max_retrains"]}
    return pin(build(**bounds, size_tries=size_tries), image)


def check_parameters(parameters: dict[str, Any]) -> None:
    """Refuse parameters that a step would refuse, hours later perhaps."""
    check_spelling(parameters["max_size"], parameters["min_accuracy"])
    stages.check_configs(**{k: v for k, v in parameters.items() if k.endswith("_config")})


def settings(parameters: dict[str, Any]) -> str:
    """Write down what a run is told beyond the defaults."""
    known = inspect.signature(PARAMETERS).parameters
    told = [f"{k}={v}" for k, v in parameters.items() if k in known and v != known[k].default]
    return " ".join(told)


def read_token(file: Path | None) -> str:
    """Read a bearer token; without a file there is none."""
    token = file.read_text(encoding="utf-8").strip() if file else ""
    if not re.fullmatch("[!-~]*", token):  # as a header it would be refused, with its text
        raise ValueError(f"token_file must hold one token and nothing else, got {file}")
    return token


if __name__ == "__main__":
    app()
