"""The Kubeflow pipeline: compress until the network fits, and its command line.

KFP has no loop, so the loop is unrolled when the pipeline is compiled, as a staircase of `dsl.If`:

```
train -> prune -> round-1 -+- publish            both thresholds hold
                           +- give-up            too big: retraining cannot mend it
                           +- retrain-loop-1 ----+- publish
                                                 +- round-2 ...      the same level again
                                                 +- give-up
round-n        = size_tries x (cluster, reduce) -> evaluate
retrain-loop-n = retrains x (retrain, evaluate)
```

A decision is one string. Whatever is neither "publish" nor has a branch of its own ends in give-up,
so that no run ends well with nothing published. A step with nothing left to do copies its package.
"""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from kfp import compiler, dsl
from kfp.dsl.graph_component import GraphComponent

from components._cluster import send
from components._ir import pin, settle_names
from components._lint import check
from components._local import on_this_machine, story, tell
from components._local import run as run_locally
from components.cluster import cluster
from components.evaluate import evaluate
from components.give_up import give_up
from components.prune import prune
from components.publish import publish
from components.reduce import reduce
from components.retrain import retrain
from components.train import train
from filterpress import terminal
from filterpress.flags import Debug, Json, with_flags_of

NAME = "filterpress"
ROUNDS, SIZE_TRIES, RETRAINS = 3, 2, 2


class Decided(NamedTuple):
    """What a sub-pipeline returns; kfp.local evaluates conditions on ``Output`` only."""

    Output: str
    model: dsl.Model


def make_round(number: int, size_tries: int, cache_evaluate: bool) -> GraphComponent:
    """Make the sub-pipeline of one round: smaller until it fits, then measured.

    Args:
        number: Number of the round, from 1.
        size_tries: Pairs of cluster and reduce; those after the first that fits are copies.
        cache_evaluate: Whether a measurement may be taken from the cache.
    """

    @dsl.pipeline(name=f"round-{number}")
    def one_round(
        model: dsl.Input[dsl.Model],
        max_size: str,
        min_accuracy: str,
        max_rounds: int,
        max_retrains: int,
        seed: int,
        cluster_config: str,
        reduce_config: str,
        data: str,
        data_dir: str,
        image_size: int,
        task: str,
    ) -> Decided:
        where = {"data": data, "data_dir": data_dir, "image_size": image_size, "task": task}
        state = "too-big"
        for _ in range(size_tries):
            clustered = cluster(
                model=model,
                state=state,
                max_size=max_size,
                seed=seed,
                config=cluster_config,
                **where,
            )
            reduced = reduce(
                model=clustered.outputs["clustered"],
                state=state,
                max_size=max_size,
                round=number,
                seed=seed,
                config=reduce_config,
                **where,
            )
            model, state = reduced.outputs["reduced"], reduced.outputs["Output"]
        measured = evaluate(
            model=model,
            state=state,
            max_size=max_size,
            min_accuracy=min_accuracy,
            round=number,
            retrains=0,
            max_rounds=max_rounds,
            max_retrains=max_retrains,
            **where,
        ).set_caching_options(cache_evaluate)
        return Decided(measured.outputs["Output"], measured.outputs["evaluated"])

    return one_round


def make_retrain_loop(number: int, retrains: int, cache_evaluate: bool) -> GraphComponent:
    """Make the sub-pipeline that retrains a round's network until it is accurate enough.

    Args:
        number: Number of the round, from 1.
        retrains: Pairs of retrain and evaluate; those after a decision are copies.
        cache_evaluate: Whether a measurement may be taken from the cache.
    """

    @dsl.pipeline(name=f"retrain-loop-{number}")
    def retrain_loop(
        model: dsl.Input[dsl.Model],
        trained: dsl.Input[dsl.Model],
        max_size: str,
        min_accuracy: str,
        max_rounds: int,
        max_retrains: int,
        seed: int,
        retrain_config: str,
        data: str,
        data_dir: str,
        image_size: int,
        task: str,
    ) -> Decided:
        where = {"data": data, "data_dir": data_dir, "image_size": image_size, "task": task}
        decision = "retrain"
        for done in range(1, retrains + 1):
            retrained = retrain(
                model=model,
                trained=trained,
                decision=decision,
                max_size=max_size,
                min_accuracy=min_accuracy,
                seed=seed,
                config=retrain_config,
                **where,
            )
            measured = evaluate(
                model=retrained.outputs["retrained"],
                state=decision,
                max_size=max_size,
                min_accuracy=min_accuracy,
                round=number,
                retrains=done,
                max_rounds=max_rounds,
                max_retrains=max_retrains,
                **where,
            ).set_caching_options(cache_evaluate)
            model, decision = measured.outputs["evaluated"], measured.outputs["Output"]
        return Decided(decision, model)

    return retrain_loop


def build(
    rounds: int = ROUNDS,
    size_tries: int = SIZE_TRIES,
    retrains: int = RETRAINS,
    cache_evaluate: bool = False,
) -> GraphComponent:
    """Unroll the loop into a pipeline.

    Args:
        rounds: Most rounds of a run; ``max_rounds`` may ask for fewer.
        size_tries: Pairs of cluster and reduce in a round.
        retrains: Most retrains in a round; ``max_retrains`` may ask for fewer.
        cache_evaluate: Whether a measurement may be taken from the cache. On a cluster a
            sub-pipeline that ends in a cached step is shown as running forever; kfp.local shows
            nothing, and a run that was killed goes on after its last measurement.

    Raises:
        ValueError: A bound is below its least value.
    """
    for name, value, least in (
        ("rounds", rounds, 1),
        ("size_tries", size_tries, 1),
        ("retrains", retrains, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    numbers = range(1, rounds + 1)
    make_smaller = {n: make_round(n, size_tries, cache_evaluate) for n in numbers}
    make_accurate = {n: make_retrain_loop(n, retrains, cache_evaluate) for n in numbers if retrains}

    @dsl.pipeline(name=NAME)
    def pipeline(
        model: str = "small",
        weights: str = "",
        data: str = "digits",
        data_dir: str = "",
        image_size: int = 0,
        task: str = "",
        seed: int = 0,
        max_size: str = "12x",
        min_accuracy: str = "-1pp",
        max_rounds: int = 2,
        max_retrains: int = 2,
        train_config: str = "{}",
        prune_config: str = "{}",
        cluster_config: str = "{}",
        reduce_config: str = "{}",
        retrain_config: str = "{}",
        store: str = "",
        name: str = NAME,
    ):
        """Compress a trained CNN to a storage budget and an accuracy floor, and publish it signed.

        Args:
            model: Network: a built-in name, torchvision:NAME or package.module:function.
            weights: File of trained weights; empty trains from scratch.
            data: Data set.
            data_dir: Folder or bucket that holds the data set.
            image_size: Height and width in pixels; 0 keeps the data set's own.
            task: package.module:function of a task of your own.
            seed: Seed of everything random.
            max_size: Storage threshold of the published file: bytes, 300KB, 300KiB or 12x.
            min_accuracy: Accuracy threshold: a fraction (0.92), or percentage points below the
                trained network (-1pp).
            max_rounds: Rounds allowed, up to what was compiled.
            max_retrains: Retrains allowed in a round, up to what was compiled.
            train_config: JSON object that overrides fields of the training's config.
            prune_config: JSON object that names a pruning method and overrides its config.
            cluster_config: JSON object that names a clustering method and overrides its config.
            reduce_config: JSON object that names a reduction method and overrides its config.
            retrain_config: JSON object that overrides fields of the retraining's config.
            store: Folder or bucket to publish to.
            name: Name of the network in the store.
        """
        where = {"data": data, "data_dir": data_dir, "image_size": image_size, "task": task}
        thresholds = {"max_size": max_size, "min_accuracy": min_accuracy}
        common = {"max_rounds": max_rounds, "max_retrains": max_retrains, "seed": seed}
        common |= {**thresholds, **where}

        def stop(package):
            give_up(model=package, **thresholds).set_caching_options(False)

        def publish_if_good(decided):
            with dsl.If(decided.outputs["Output"] == "publish", name="publish"):
                publish(
                    model=decided.outputs["model"], store=store, name=name, **thresholds, **where
                ).set_caching_options(False)

        def otherwise_stop(decided, branch):
            decision = decided.outputs["Output"]
            with (
                dsl.If(decision != "publish", name="not-published"),
                dsl.If(decision != branch, name="give-up"),
            ):
                stop(decided.outputs["model"])

        def settle(decided, number):
            publish_if_good(decided)
            if number < rounds:
                with dsl.If(decided.outputs["Output"] == "next", name=f"round-{number + 1}"):
                    level(decided.outputs["model"], number + 1)
                otherwise_stop(decided, "next")
            else:
                with dsl.If(decided.outputs["Output"] != "publish", name="give-up"):
                    stop(decided.outputs["model"])

        def level(package, number):
            smaller = make_smaller[number](
                model=package,
                cluster_config=cluster_config,
                reduce_config=reduce_config,
                **common,
            )
            if not retrains:
                settle(smaller, number)
                return
            publish_if_good(smaller)
            with dsl.If(smaller.outputs["Output"] == "retrain", name=f"retrain-{number}"):
                accurate = make_accurate[number](
                    model=smaller.outputs["model"],
                    trained=trained.outputs["trained"],
                    retrain_config=retrain_config,
                    **common,
                )
                settle(accurate, number)
            otherwise_stop(smaller, "retrain")

        trained = train(model=model, weights=weights, seed=seed, config=train_config, **where)
        pruned = prune(model=trained.outputs["trained"], seed=seed, config=prune_config, **where)
        level(pruned.outputs["pruned"], 1)

    return settle_names(pipeline)


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
            pin(pipeline, image)
        output.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(pipeline, str(output))
        check(output, pinned=bool(image))


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
@with_flags_of(PARAMETERS)
def run(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same one goes on with it.")],
    size_tries: Tries = SIZE_TRIES,
    json: Json = False,
    debug: Debug = False,
    **parameters: Any,
) -> None:
    """Run the pipeline on this machine, one process a step; what did not change is reused."""
    with terminal.polite(debug):
        out = out.resolve()
        arguments = on_this_machine(parameters, out)
        bounds = {"rounds": arguments["max_rounds"], "retrains": arguments["max_retrains"]}
        pipeline = build(**bounds, size_tries=size_tries, cache_evaluate=True)
        steps = run_locally(pipeline, arguments, out, tell)
        report = story(steps, out)
    terminal.show(report, json)


@app.command()
@with_flags_of(PARAMETERS)
def submit(
    *,
    host: Annotated[str, typer.Option(help="Address of the KFP API, http://…")],
    experiment: Annotated[str, typer.Option(help="Experiment of the run.")] = NAME,
    namespace: Annotated[str, typer.Option(help="Namespace, where there are users.")] = "kubeflow",
    token: Annotated[str, typer.Option(envvar="KFP_TOKEN", help="Bearer token.")] = "",
    image: Annotated[str, typer.Option(help="Image of every step.")] = "",
    size_tries: Tries = SIZE_TRIES,
    debug: Debug = False,
    **parameters: Any,
) -> None:
    """Submit a run to a cluster; steps that it has done before are reused."""
    with terminal.polite(debug):
        bounds = {"rounds": parameters["max_rounds"], "retrains": parameters["max_retrains"]}
        pipeline = build(**bounds, size_tries=size_tries)
        if image:
            pin(pipeline, image)
        address = send(
            pipeline,
            parameters,
            host=host,
            experiment=experiment,
            namespace=namespace,
            token=token,
        )
    print(address)


if __name__ == "__main__":
    app()
