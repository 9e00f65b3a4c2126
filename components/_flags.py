"""What the commands of the pipeline share: flags, and checks before a cluster is asked."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from components._cluster import Cluster
from components._ir import check_image
from components._placing import check_amounts
from filterpress import stages
from filterpress.budget import check_spelling

Out = Annotated[Path, typer.Option(help="Folder of the run; the same one goes on with it.")]
Here = Annotated[
    str, typer.Option(help="Image of the containers that the steps run in; none: processes.")
]
Image = Annotated[str, typer.Option(help="Image of every step, pinned by digest.")]
Tries = Annotated[int, typer.Option(help="Pairs of cluster and reduce in a round.")]
TokenFile = Annotated[
    Path | None, typer.Option(envvar="KF_PIPELINES_SA_TOKEN_PATH", help="File with a bearer token.")
]


def connect(
    *,
    host: str,
    experiment: str = "filterpress",
    namespace: str = "kubeflow",
    token_file: TokenFile = None,
    service_account: str = "",
) -> Cluster:
    """Name a cluster.

    Args:
        host: Address of the KFP API, http://…
        experiment: Experiment of the runs.
        namespace: Namespace, where there are users.
        token_file: File with a bearer token.
        service_account: Service account of the steps.
    """
    return Cluster(host, experiment, namespace, read_token(token_file), service_account)


def split(given: dict[str, Any], *functions: Callable[..., Any]) -> list[dict[str, Any]]:
    """Take apart what a command got, into the parameters of each function."""
    known = [inspect.signature(function).parameters for function in functions]
    return [{name: value for name, value in given.items() if name in own} for own in known]


def check_parameters(parameters: dict[str, Any]) -> None:
    """Refuse parameters, of a run or of a sweep, that a step would refuse, hours later perhaps."""
    sizes = parameters["sizes"] if "sizes" in parameters else [parameters["max_size"]]
    if not sizes:
        raise ValueError("sizes must be at least one, got []")
    for size in sizes:
        check_spelling(size, parameters["min_accuracy"])
    configs = {k: v for k, v in parameters.items() if k.endswith("_config")}
    stages.check_configs(parameters["preset"], **configs)


def check_for_cluster(parameters: dict[str, Any], image: str) -> None:
    """Refuse what a cluster would refuse, before it is asked."""
    check_image(image)
    check_parameters(parameters)
    check_amounts(parameters)


def read_token(file: Path | None) -> str:
    """Read a bearer token; without a file there is none."""
    token = file.read_text(encoding="utf-8").strip() if file else ""
    if not re.fullmatch("[!-~]*", token):  # as a header it would be refused, with its text
        raise ValueError(f"token_file must hold one token and nothing else, got {file}")
    return token
