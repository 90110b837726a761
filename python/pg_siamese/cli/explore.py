"""The command that serves a page to look through collections."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.markup import escape

from pg_siamese.cli.failures import extra_packages
from pg_siamese.cli.options import Dsn
from pg_siamese.cli.terminal import errors, log_to, output
from pg_siamese.client.connection import CommandError, connect


def explore(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 8765,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Another one needs --certificate.")
    ] = "127.0.0.1",
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name that browsers reach the page by. Repeat it."),
    ] = None,
    login: Annotated[
        bool, typer.Option("--login", help="Let visitors log in with a role and its password.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Let the page change what the role may change.")
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate of the page, as PEM, for HTTPS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Private key of the certificate.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the browser.")] = False,
    dsn: Dsn = None,
) -> None:
    """Look through collections in a browser: search, look closer, check.

    The page only reads, without --write. It is for this machine, and for whoever has the link that
    is shown. With --login, it shows each visitor what their database role may see.
    """
    with extra_packages("explore"):
        from pg_siamese.explore.serving import LOOPBACK, Address, serve

    if (certificate is None) != (key is None):
        raise CommandError("--certificate and --key go together")
    if host not in LOOPBACK and certificate is None:
        raise CommandError(f"--host {host}: others could read along without --certificate")
    if open_browser and login:
        raise CommandError("--open shows the command's own connection, so leave out --login")
    for file in filter(None, (certificate, key)):
        file.open("rb").close()
    if not login:
        connect(dsn).close()
    address = Address(host, port, tuple(name or ()), certificate, key)

    def announce(link: str) -> None:
        output().print(f"open {escape(link)}", soft_wrap=True)

    def open_link(link: str) -> None:
        # All users see the arguments of a process. So the browser gets a file that has the link.
        file = Path(folder) / "open.html"
        file.write_text(f'<meta http-equiv="refresh" content="0; url={link}">', encoding="utf-8")
        webbrowser.open(file.as_uri())

    if login:
        announce(f"{address.url}/login")
    with log_to(errors()), TemporaryDirectory(prefix="pg_siamese-") as folder:
        serve(
            address,
            dsn=dsn,
            form=login,
            write=write,
            announce=announce,
            opened=open_link if open_browser else None,
        )
