"""The client of a vehicle behind the command line of the public suite tuf-conformance.

Reference:
    ``CLIENT-CLI.md`` in https://github.com/theupdateframework/tuf-conformance.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from tuf.api.exceptions import DownloadError, RepositoryError

from filterpress.release.device.client import DurableUpdater
from filterpress.release.device.source import HttpSource, Limits, MetadataFetcher

app = typer.Typer(help="What the suite tuf-conformance calls.", add_completion=False)

_TRUSTED = "trusted-root"  # without .json: the suite takes those for what the client trusts now


@app.callback()
def _options(
    context: typer.Context,
    metadata_dir: Annotated[Path, typer.Option(help="Trusted metadata.")],
    metadata_url: Annotated[str, typer.Option(help="Where metadata is.")] = "",
    target_name: Annotated[list[str] | None, typer.Option(help="What to download.")] = None,
    target_dir: Annotated[str, typer.Option(help="Where to put it.")] = "",
    target_base_url: Annotated[str, typer.Option(help="Where it is.")] = "",
) -> None:
    context.obj = (metadata_dir, metadata_url, target_name or [], target_dir, target_base_url)


@app.command()
def init(context: typer.Context, trusted_root: Path) -> None:
    """Trust a root."""
    folder = context.obj[0]
    for name in (_TRUSTED, "root.json"):
        shutil.copyfile(trusted_root, folder / name)


@app.command()
def refresh(context: typer.Context) -> None:
    """Update the top-level metadata."""
    _download(context, [])


@app.command()
def download(context: typer.Context) -> None:
    """Download targets that are not there yet."""
    _download(context, context.obj[2])


def _download(context: typer.Context, names: list[str]) -> None:
    folder, metadata_url, _, target_dir, target_base_url = context.obj
    limits = Limits()
    source = HttpSource("", limits)
    try:
        client = DurableUpdater(
            str(folder),
            metadata_url,
            target_dir,
            target_base_url,
            MetadataFetcher(source, limits),
            bootstrap=(folder / _TRUSTED).read_bytes(),
        )
        client.refresh()
        for name in names:
            info = client.get_targetinfo(name)
            if info is None:
                raise RepositoryError(f"{name} is not there")
            if not client.find_cached_target(info):
                client.download_target(info)
    except (DownloadError, RepositoryError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        source.close()
