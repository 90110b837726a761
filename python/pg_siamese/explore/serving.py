"""Serving the page with uvicorn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import socket

import uvicorn

from pg_siamese.client.connection import CommandError
from pg_siamese.explore.app import LOOPBACK, Settings, create_app

__all__ = ["LOOPBACK", "Address", "serve"]


@dataclass(frozen=True)
class Address:
    """Where the page is.

    Attributes:
        host, port: to listen on.
        names: that browsers use besides the host's own.
        certificate, key: files for HTTPS, or None.
    """

    host: str
    port: int
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        """The address to open, without a path."""
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{self.names[0] if self.names else self.host}:{self.port}"


def serve(
    address: Address,
    *,
    dsn: str | None,
    form: bool,
    write: bool,
    announce: Callable[[str], object],
    opened: Callable[[str], object] | None = None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        address: where.
        dsn: connection string, as for each command.
        form: whether visitors log in by a form. If not, a link opens each session.
        write: whether the page may change the database.
        announce: called with each link.
        opened: called with the first link, to open it.

    Raises:
        CommandError: the port is taken.
    """
    links: list[str] = []

    def invite(token: str) -> None:
        link = f"{address.url}/start?token={token}"
        links.append(link)
        announce(link)

    settings = Settings(
        dsn=dsn,
        form=form,
        write=write,
        hosts=(*LOOPBACK, address.host, *address.names),
        port=address.port,
        announce=invite if not form else lambda token: None,
    )
    config = uvicorn.Config(
        create_app(settings),
        host=address.host,
        port=address.port,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
        # Addresses name keys and values of rows, so no log keeps them.
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
    )
    server = _Server(config, opened=lambda: opened(links[0]) if opened else None)
    try:
        # uvicorn raises it again when all is closed. Ctrl-C is how the page ends.
        with suppress(KeyboardInterrupt):
            server.run()
    except SystemExit:
        raise CommandError(f"port {address.port} of {address.host} is not free") from None


class _Server(uvicorn.Server):
    """Calls back when it listens."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[], object]) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self._opened()
