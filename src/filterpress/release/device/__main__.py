"""Command line of a vehicle: set it up, update it, boot it, look at it, run it.

Exit codes: 0 done, 2 anything that went wrong; the reason is one line on standard error.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from filterpress import terminal
from filterpress.errors import ReleaseError
from filterpress.flags import Debug, Json
from filterpress.release.device import conformance, identity, service
from filterpress.release.device.identity import Identity
from filterpress.release.device.vehicle import Vehicle

app = typer.Typer(
    name="filterpress-device",
    help="Keep a vehicle on the newest release that is meant for it and works on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(conformance.app, name="conformance-client", hidden=True)

Home = Annotated[Path, typer.Argument(help="Folder of the vehicle.")]


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def init(
    home: Annotated[Path, typer.Argument(help="Folder to make.")],
    store: Annotated[str, typer.Option(help="URL of the store, or path of a directory or tar.")],
    root: Annotated[Path, typer.Option(help="root.json to trust, got by a way that is trusted.")],
    hardware: Annotated[str, typer.Option(help="Which releases fit the vehicle.")] = "any",
    channel: Annotated[str, typer.Option(help="Which of them it follows.")] = "stable",
    device_id: Annotated[str, typer.Option(help="Random if not given.")] = "",
    cohort: Annotated[list[str] | None, typer.Option(help="Group; may be repeated.")] = None,
    development: Annotated[
        bool, typer.Option("--development", help="Trust a root for development too.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the folder of a vehicle, with a key of its own."""
    with terminal.polite(debug):
        address = store if "://" in store else str(Path(store).resolve())
        made = identity.create(
            home,
            Identity(
                store=address,
                hardware=hardware,
                channel=channel,
                device_id=device_id,
                cohorts=tuple(cohort or ()),
            ),
            root.read_bytes(),
            development=development,
        )
    terminal.show({"home": str(home), "store": made.store, "device_id": made.device_id}, json)


@app.command()
def update(
    home: Home,
    source: Annotated[
        str | None, typer.Option("--from", help="Bundle, directory or URL in place of the store.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch what the channel says into the slot that does not run, to be tried at the next boot."""
    with terminal.polite(debug):
        outcome = Vehicle(home).update(source)
    terminal.show({"outcome": str(outcome)}, json)


@app.command()
def boot(home: Home, json: Json = False, debug: Debug = False) -> None:
    """Try a new release if there is one, and say which model to run."""
    with terminal.polite(debug):
        running = Vehicle(home).boot()
        if running is None:
            raise ReleaseError("no release has passed its trial here yet: update, then boot again")
    manifest = running.manifest
    terminal.show(
        {
            "model": str(running.path),
            "slot": running.slot,
            "release_counter": manifest.release_counter,
            "sha256": manifest.sha256,
        },
        json,
    )


@app.command()
def status(home: Home, json: Json = False, debug: Debug = False) -> None:
    """Say what runs and what happened last; with --json as a signed report."""
    with terminal.polite(debug):
        report = Vehicle(home).status()
    terminal.show(report if json else report["signed"], json)


@app.command()
def run(
    home: Home,
    port: Annotated[int, typer.Option(help="On loopback; 0 for any.")] = 8080,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the store.")] = 3600,
    debug: Debug = False,
) -> None:
    """Answer requests with the newest good model, and update on the way: an example of a service.

    POST a picture to /infer, as little-endian float32 in the order of memory; GET / is the status.
    """
    # Process 1 of a container ignores this signal otherwise; to be stopped is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with terminal.polite(debug):
        service.run(Vehicle(home), port=port, every_s=every)


if __name__ == "__main__":
    main()
