"""Run the project's own cluster in ``build/cluster``, for ``make up``, ``down`` and others.

Run it as ``PYTHONPATH=. /usr/bin/python3 -m tools.embedded up|down|dsn|env|psql|status``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from tools.cluster import DATABASE, SUPERUSER, Cluster, create_database
from tools.project import build_folder
from tools.report import SetupError, command, say, step


def embedded() -> Cluster:
    """Return the project's own cluster, in ``build/cluster``."""
    return Cluster(build_folder() / "cluster")


def up() -> Cluster:
    """Start the embedded cluster and make its database, unless that is done.

    Data are never destroyed. If the extension's SQL changed under the same version, the database
    keeps the old one, and a line says so.
    """
    cluster = embedded()
    if not cluster.running():
        with step("Starting the embedded cluster"):
            cluster.start()
    create_database(cluster)
    return cluster


def status(cluster: Cluster) -> str:
    """Return one line on whether the embedded cluster runs, with its connection string."""
    if not cluster.running():
        return "The embedded cluster is down: make up starts it."
    return f"The embedded cluster runs (process {cluster.pid()}): {cluster.dsn()}"


def environment(cluster: Cluster) -> str:
    """Return shell commands that make the embedded cluster every client's default."""
    values = {
        "PGHOST": str(cluster.socket_folder),
        "PGPORT": str(cluster.port),
        "PGUSER": SUPERUSER,
        "PGDATABASE": DATABASE,
    }
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())


def _psql(cluster: Cluster, arguments: Sequence[str]) -> None:
    if not cluster.running():
        raise SetupError('the embedded cluster is down: run "make up"')
    words = [*cluster.psql_command(), *arguments]
    sys.stdout.flush()
    os.execv(words[0], words)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="tools.embedded", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("up", "start the embedded cluster and make the database"),
        ("down", "stop it"),
        ("dsn", "print its connection string"),
        ("env", "print shell commands that make it the default, if it runs"),
        ("status", "say whether it runs"),
    ):
        commands.add_parser(name, help=text)
    commands.add_parser("psql", help="open it with psql; what follows are psql's arguments")
    # Not argparse.REMAINDER, which accepts no first argument with a dash.
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(words[:1] if words[:1] == ["psql"] else words)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.umask(0o022)
    cluster = up() if chosen.command == "up" else embedded()
    if chosen.command == "psql":
        _psql(cluster, words[1:])
    elif chosen.command == "down":
        say("Stopped." if cluster.stop() else "The embedded cluster is down already.")
    elif chosen.command == "dsn":
        print(cluster.dsn())
    elif chosen.command == "env":
        if cluster.running():
            print(environment(cluster))
    else:
        say(status(cluster))


if __name__ == "__main__":
    sys.exit(main())
