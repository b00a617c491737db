"""The command ``fs-fwdllm certificates make``: an authority and certificates for a trial of ``fwdllm.tls``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fs_fwdllm.host.certificates import AUTHORITY, make_certificates
from fs_fwdllm.host.tls import name_of
from fs_fwdllm.report.terminal import say

__all__ = ["certificates_app"]

certificates_app = typer.Typer(
    name="certificates", help="Make certificates for runs over TLS (fwdllm.tls).", no_args_is_help=True
)


@certificates_app.callback()
def _group() -> None:
    """Keeps the name of the one command there is."""


@certificates_app.command()
def make(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.")],
    clients: Annotated[int, typer.Option(min=1, metavar="N", help="Clients of the run.")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME_OR_IP", help="By which clients reach the server; may be given several times."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, metavar="N", help="How long they are valid.")] = 365,
) -> None:
    """Write an authority (CA), and certificates and keys of a server and its clients, for a trial.

    Example: fs-fwdllm certificates make certificates --clients 3 --host 192.0.2.7 --host fed.example.org

    Nothing is overwritten. Without --host the server's is for 127.0.0.1, ::1 and localhost.
    """
    hosts = host or ["127.0.0.1", "::1", "localhost"]
    made = make_certificates(folder, clients, hosts, days)
    console, place = Console(highlight=False), folder.resolve()
    reached = ", ".join(hosts)
    say(console, f"wrote {len(made)} files into {folder}, valid for {days} days; the server's is for {reached}")
    say(console, "copy to each participant ca.pem and its own two files, and name them in its configuration:")
    for number in (0, 1):
        name = name_of(number)
        others = f"; the others likewise, to {name_of(clients)}" if number and clients > 1 else ""
        typer.echo(f"\n# {name}{others}\nfwdllm:\n  tls:")
        for key, file in (("ca", f"{AUTHORITY}.pem"), ("certificate", f"{name}.pem"), ("key", f"{name}.key")):
            typer.echo(f"    {key}: {place / file}")
    typer.echo()
    kept = place / f"{AUTHORITY}.key"
    say(console, f"keep {kept} off the devices and in a safe place: whoever has it can pose as anybody")
