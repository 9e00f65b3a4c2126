"""The commands below ``filterpress release root``: who may sign what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from filterpress import terminal
from filterpress.flags import Debug, Json

app = typer.Typer(
    name="root",
    help="""Say who may sign what: drawn up off line, signed by one holder after the other.

    \b
    A first root with three holders, any two of whom sign:
      new draft --threshold root=2 --key root=ann.pub --key root=bob.pub
        --key root=cy.pub --key targets=ann.pub --key release=release.pub
        --key rollout=... --key snapshot=... --key timestamp=...
      sign draft --with file2:ann.pem        (and so each other holder)
      publish draft --store gs://bucket/ota --keys keys

    \b
    To exchange an online key without a moment in which readers fail:
      add-key, sign, publish
      put the new key into keys/signers.json, and refresh
      drop-key, sign, publish

    The folder holds no private key; carry it from one holder to the next. A public key is a file of
    PEM (`openssl pkey -pubout`) or of JSON as securesystemslib writes it.
    """,
    no_args_is_help=True,
)

Store = Annotated[str, typer.Option(help="Folder or gs://bucket/prefix of the signed repository.")]
Keys = Annotated[
    str,
    typer.Option(help="Folder of signing keys; empty for the folder keys beside a local store."),
]
Root = Annotated[Path, typer.Option(help="The trusted root, root.json of the publisher's keys.")]
Folder = Annotated[Path, typer.Argument(help="Folder of the ceremony; it holds no private key.")]
Roles = "root, targets, release, rollout, snapshot or timestamp"
Role = Annotated[str, typer.Argument(help=f"Role: {Roles}.")]


@app.command("new")
def new_root(
    folder: Folder,
    key: Annotated[
        list[str], typer.Option(help=f"ROLE=FILE of a public key; repeat it. Roles: {Roles}.")
    ],
    threshold: Annotated[
        list[str] | None, typer.Option(help="ROLE=NUMBER of keys that must sign; 1 without it.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw up the first root, for its holders to sign."""
    with terminal.polite(debug):
        from filterpress.release import ceremony

        keys: dict[str, list[Path]] = {}
        for role, file in (_pair("key", text) for text in key):
            keys.setdefault(role, []).append(Path(file))
        thresholds = {
            role: _number(number)
            for role, number in (_pair("threshold", text) for text in threshold or [])
        }
        found = ceremony.new(folder, keys, thresholds)
    _show_ceremony(found, json)


@app.command("begin")
def begin_root(
    folder: Folder, store: Store, root: Root, json: Json = False, debug: Debug = False
) -> None:
    """Copy root and targets of a store into a folder, verified, to change them there."""
    with terminal.polite(debug):
        from filterpress.release import roots

        found = roots.begin(folder, store=store, root=read_root(root))
    _show_ceremony(found, json)


@app.command("add-key")
def add_key(
    folder: Folder,
    role: Role,
    public: Annotated[Path, typer.Argument(help="File of the public key.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Let one more key sign for a role, in the next version."""
    with terminal.polite(debug):
        from filterpress.release import ceremony

        found = ceremony.add_key(folder, role, public)
    _show_ceremony(found, json)


@app.command("drop-key")
def drop_key(
    folder: Folder,
    role: Role,
    keyid: Annotated[str, typer.Argument(help="The key, as status writes it.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a key no longer sign for a role, from the next version on."""
    with terminal.polite(debug):
        from filterpress.release import ceremony

        found = ceremony.drop_key(folder, role, keyid)
    _show_ceremony(found, json)


@app.command("renew")
def renew_root(folder: Folder, json: Json = False, debug: Debug = False) -> None:
    """Begin versions of root and targets that only live longer: a year from now."""
    with terminal.polite(debug):
        from filterpress.release import ceremony

        found = ceremony.renew(folder)
    _show_ceremony(found, json)


@app.command("sign")
def sign_root(
    folder: Folder,
    key: Annotated[
        str, typer.Option("--with", help="Your private key: file2:PATH, hsm:, gcpkms:... .")
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Add your signature to the versions that still miss some."""
    with terminal.polite(debug):
        from filterpress.release import ceremony

        found = ceremony.sign(folder, key)
    _show_ceremony(found, json)


@app.command("status")
def status_of_root(folder: Folder, json: Json = False, debug: Debug = False) -> None:
    """Say who may sign what, and which signatures are missing."""
    with terminal.polite(debug):
        from filterpress.release import ceremony

        found = ceremony.status(folder)
    _show_ceremony(found, json)


@app.command("publish")
def publish_root(
    folder: Folder, store: Store, keys: Keys = "", json: Json = False, debug: Debug = False
) -> None:
    """Publish root and targets, and sign anew what their keys no longer cover.

    The folder of keys holds root.json, a root that is trusted already (copy 1.root.json for a new
    store), and signers.json with keys of at least snapshot and timestamp.
    """
    with terminal.polite(debug):
        from filterpress.release import roots
        from filterpress.release.keys import keys_for

        found = roots.publish(folder, store=store, keys=keys_for(store, keys))
    _show_ceremony(found, json)


def read_root(root: Path) -> bytes:
    """Read the file of a trusted root."""
    from filterpress.release.keys import read

    return read(root)


def _pair(flag: str, text: str) -> tuple[str, str]:
    role, equals, value = text.partition("=")
    if not (role and equals and value):
        raise ValueError(f"{flag} must be ROLE=VALUE, got {text!r}")
    return role, value


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"threshold must be ROLE=NUMBER, got the number {text!r}")
    return int(text)


def _show_ceremony(found: dict[str, Any], json: bool) -> None:
    if json:
        terminal.show(found, as_json=True)
        return
    parts = [{"file": kind, **found[kind]} for kind in ("root", "targets")]
    terminal.show_table("newest versions, and signatures that are missing", parts)
    rows = [
        {"role": role, "threshold": held["threshold"], "key": key}
        for role, held in found["keys"].items()
        for key in held["keys"]
    ]
    terminal.show_table("who may sign what", rows)
