"""The commands below ``filterpress release``: keys, releases, channels and roots."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from filterpress import root_commands, terminal
from filterpress.errors import ReleaseError
from filterpress.flags import Debug, Json
from filterpress.root_commands import Keys, Root, Store, read_root

if TYPE_CHECKING:
    from filterpress.release.channel import Channel

app = typer.Typer(
    name="release",
    help="""Release networks signed, and say which vehicles shall run them.

    \b
    A first try, in folders:
      filterpress release publish model.fpk --store try/store --name demo --percent 10
      filterpress release ramp 50 --store try/store
      filterpress release verify --store try/store --root try/keys/root.json

    For vehicles, make keys with `init`, or off line by several people with `root`, and run
    `refresh` every few hours: a timestamp lives a day.
    """,
    no_args_is_help=True,
)
app.add_typer(root_commands.app)

Hardware = Annotated[str, typer.Option(help="Kind of vehicle; any for all.")]
ChannelName = Annotated[str, typer.Option("--channel", help="Name of the channel.")]
Percent = Annotated[float, typer.Option(help="Share of the vehicles, 0 to 100.")]


@app.command()
def init(
    keys: Annotated[Path, typer.Argument(help="Folder to make.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the keys of a new publisher, as files that only you can read.

    Give root.json to the vehicles. Move root.pem and targets.pem to a place that is not on line.
    signers.json says where the other keys are; write URIs of a key management service there
    (gcpkms:, awskms:, hsm: ...) to sign with keys that are no files.
    """
    with terminal.polite(debug):
        from filterpress.release import create_keys

        create_keys(keys)
    terminal.show({"keys": str(keys), "root": str(keys / "root.json")}, json)


@app.command()
def publish(
    file: Annotated[Path, typer.Argument(help="Encoded file, model.fpk.")],
    store: Store,
    keys: Keys = "",
    name: Annotated[str, typer.Option(help="Name of the network.")] = "filterpress",
    made_for: Annotated[
        list[str] | None, typer.Option(help="Kind of vehicle the file is made for; repeat it.")
    ] = None,
    hardware: Hardware = "any",
    channel: ChannelName = "stable",
    percent: Percent = 100,
    cohort: Annotated[
        list[str] | None, typer.Option(help="Group that takes part whatever the share; repeat it.")
    ] = None,
    not_before: Annotated[
        str, typer.Option(help="When vehicles begin, 2027-01-31T06:00:00Z; empty for now.")
    ] = "",
    max_ms: Annotated[
        int, typer.Option(help="Longest median time of one image on a vehicle; 0 for no bound.")
    ] = 0,
    max_mb: Annotated[
        int, typer.Option(help="Most memory of the network on a vehicle; 0 for no bound.")
    ] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Release a file, and let a channel name it.

    The file is signed with the key of `release`, the channel with that of `rollout`; both happen or
    neither does. What is there already is left as it is, so that a retry does no harm. With
    --channel "" no channel changes.
    """
    with terminal.polite(debug):
        from filterpress import release
        from filterpress.release import rollout
        from filterpress.release.channel import Check, path_of
        from filterpress.release.keys import keys_for

        name_it = None
        if channel:
            name_it = rollout.naming(
                hardware=hardware,
                channel=channel,
                percent=percent,
                cohorts=cohort or [],
                not_before=not_before,
                check=Check(max_ms=max_ms, max_mb=max_mb),
            )
        issued = release.publish_network(
            file.read_bytes(),
            name=name,
            custom={},
            store=store,
            keys=keys_for(store, keys),
            hardware=made_for or ["any"],
            then=name_it,
        )
        report = asdict(issued)
        if channel:
            report |= {"channel": path_of(hardware, channel)}
    terminal.show(report, json)


@app.command()
def ramp(
    percent: Annotated[float, typer.Argument(help="New share of the vehicles, 0 to 100.")],
    store: Store,
    keys: Keys = "",
    hardware: Hardware = "any",
    channel: ChannelName = "stable",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Change the share of the vehicles that take part in a channel.

    Who takes part at 10 % still does at 50 %. A smaller share calls nobody back: see recall.
    """
    with terminal.polite(debug):
        from filterpress.release import rollout

        given = _place(store, keys, hardware, channel)
        changed = rollout.ramp(percent, **given)
    _show_channel(changed, json)


@app.command()
def halt(
    store: Store,
    keys: Keys = "",
    hardware: Hardware = "any",
    channel: ChannelName = "stable",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Stop a channel: no further vehicle takes its release. Those that have it keep it.

    Releases that are published meanwhile wait too, until resume.
    """
    with terminal.polite(debug):
        from filterpress.release import rollout

        changed = rollout.halt(**_place(store, keys, hardware, channel))
    _show_channel(changed, json)


@app.command()
def resume(
    store: Store,
    keys: Keys = "",
    hardware: Hardware = "any",
    channel: ChannelName = "stable",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a halted channel go on at the share it had."""
    with terminal.polite(debug):
        from filterpress.release import rollout

        changed = rollout.resume(**_place(store, keys, hardware, channel))
    _show_channel(changed, json)


@app.command()
def recall(
    to: Annotated[int, typer.Option(help="Counter of the release to go back to; see verify.")],
    store: Store,
    keys: Keys = "",
    hardware: Hardware = "any",
    channel: ChannelName = "stable",
    percent: Percent = 100,
    max_ms: Annotated[
        int | None, typer.Option(help="As for publish; without it that of the channel.")
    ] = None,
    max_mb: Annotated[
        int | None, typer.Option(help="As for publish; without it that of the channel.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Send vehicles back to an earlier release: its bytes, under a new and higher counter.

    It takes the keys of both `release` and `rollout`. A halt ends. If a bound of the
    channel was the mistake, name a better one here, or the old release has to keep it too.
    """
    with terminal.polite(debug):
        from filterpress.release import rollout

        given = _place(store, keys, hardware, channel)
        changed = rollout.recall(to, percent=percent, max_ms=max_ms, max_mb=max_mb, **given)
    _show_channel(changed, json)


@app.command()
def refresh(store: Store, keys: Keys = "", json: Json = False, debug: Debug = False) -> None:
    """Renew the timestamp, and what else nears its end, with the keys that are at hand.

    Run it every few hours on a schedule: vehicles believe a timestamp for one day. Its own keys and
    those of the snapshot are enough; lists of files need their own in their last quarter.
    """
    with terminal.polite(debug):
        from filterpress import release
        from filterpress.release.keys import keys_for

        release.refresh(store=store, keys=keys_for(store, keys))
    terminal.show({"store": store}, json)


@app.command()
def verify(store: Store, root: Root, json: Json = False, debug: Debug = False) -> None:
    """Read a whole store as a vehicle does, and say what is in it and what ends when.

    The exit code is 2 if a file is lost or altered, a channel leads nowhere, or anything ends
    within hours.
    """
    with terminal.polite(debug):
        from filterpress.release import audit

        found = audit.verify(store, root=read_root(root))
    if json:
        terminal.show(found, as_json=True)
    else:
        for title in ("roles", "releases", "channels"):
            terminal.show_table(title, found[title])
    with terminal.polite(debug):
        if problems := found["problems"]:
            raise ReleaseError(f"{len(problems)} problems in {store}: {'; '.join(problems)}")


@app.command()
def bundle(
    out: Annotated[Path, typer.Argument(help="Tar file to write; it must not exist.")],
    store: Store,
    root: Root,
    hardware: Hardware = "any",
    channel: ChannelName = "stable",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write all that a vehicle without a network needs of one channel.

    Unpacked it is a store. It is believed until its first metadata ends, one day after the last
    refresh.
    """
    with terminal.polite(debug):
        from filterpress.release import audit

        made = audit.bundle(
            out, store=store, root=read_root(root), hardware=hardware, channel=channel
        )
    terminal.show(made, json)


def _place(store: str, keys: str, hardware: str, channel: str) -> dict[str, Any]:
    from filterpress.release.keys import keys_for

    folder = keys_for(store, keys)
    return {"store": store, "keys": folder, "hardware": hardware, "channel": channel}


def _show_channel(channel: Channel, json: bool) -> None:
    content = channel.content
    rollout = {name: value for name, value in content["rollout"].items() if name != "salt"}
    names = ("release_counter", "target", "sha256", "n_bytes")
    shown = {name: content[name] for name in names}
    terminal.show({"channel": channel.path, **shown, **rollout, "changed": channel.changed}, json)
