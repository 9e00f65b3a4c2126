"""Containers for the steps of a run on this machine, instead of processes.

A path means the same inside as outside: the folder of the run and what the parameters name are
mounted where they are. Nothing else of a container can be written but its ``/tmp``.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from kfp import local

from filterpress.errors import FilterpressError
from filterpress.release.keys import keys_for

#: Parameters that name what lies outside of the steps.
PLACES = ("weights", "data_dir", "scratch", "store", "keys")
_READ_ONLY = {"weights", "data"}


class Image(NamedTuple):
    """An image that the engine has."""

    name: str  # as the engine lists it: kfp.local tries to pull what it does not find there
    digest: str


def find(image: str) -> Image:
    """Look an image up.

    Args:
        image: Name with tag or digest.

    Raises:
        FilterpressError: There is no such image here, it can be none, or no engine or no package to
            ask one with is there.
    """
    try:
        import docker
    except ImportError:
        raise FilterpressError("an image needs the package docker: pip install docker") from None
    try:
        with contextlib.closing(docker.from_env()) as client:
            found = client.images.get(image)
    except docker.errors.ImageNotFound:
        raise FilterpressError(f"image {image} is not here: build or pull it first") from None
    except docker.errors.APIError as error:
        raise FilterpressError(f"the engine refuses image {image!r}: {error.explanation}") from None
    except docker.errors.DockerException as error:
        raise FilterpressError(f"no container engine answers: {error}") from None
    listed = [*found.tags, *found.attrs["RepoDigests"]]
    return Image(image if image in listed else min(listed, default=image), found.id)


def runner(arguments: dict[str, Any], out: Path) -> local.DockerRunner:
    """Make what runs a step in a container, as the user who runs the pipeline.

    Args:
        arguments: Parameters of the run; paths must be absolute.
        out: Folder of the run.

    Raises:
        ValueError: A path is missing, so that it cannot be mounted.
    """
    from docker.types import Mount

    environment = {name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"}
    environment |= {
        "XDG_CACHE_HOME": str(out / "cache"),
        "NUMBA_CACHE_DIR": str(out / "cache" / "numba"),
        "PYTHONUNBUFFERED": "",  # kfp.local indents whatever is written at once: let it be lines
    }
    mounted = {"out": out, **outside(arguments, out)}
    return local.DockerRunner(
        user=f"{os.getuid()}:{os.getgid()}",
        environment=environment,
        mounts=[
            Mount(str(path), str(path), type="bind", read_only=name in _READ_ONLY)
            for name, path in mounted.items()
        ],
        tmpfs={"/tmp": ""},
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )


def outside(arguments: dict[str, Any], out: Path) -> dict[str, Path]:
    """Find what the steps read and write outside of the folder of the run.

    Args:
        arguments: Parameters of the run.
        out: Folder of the run.

    Returns:
        Paths by the parameter that names them.

    Raises:
        ValueError: One is relative, or missing: an engine mounts only what is there.
    """
    given = {
        name: arguments.get(name, "")
        for name in ("weights", "data_dir", "scratch", "store", "keys")
    }
    if given["store"]:
        given["keys"] = str(keys_for(given["store"], given["keys"]))
    kind, _, folder = arguments.get("data", "").partition(":")
    if kind == "image-folder" and "://" not in folder:
        given["data"] = str(Path(given["data_dir"], folder))
    paths = {name: Path(path) for name, path in given.items() if path and "://" not in path}
    found = {name: path for name, path in paths.items() if not path.is_relative_to(out)}
    for name, path in found.items():
        if not path.is_absolute() or not path.exists():
            rule = "be an absolute path that exists, or be in the folder of the run"
            raise ValueError(f"{name} must {rule}, for a step in a container, got {path}")
    return found
