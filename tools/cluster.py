"""Run private PostgreSQL clusters: the project's own (``embedded.py``) and those of tests.

A cluster listens only on a Unix socket in a folder of mode 0700. Only the server's user and root
can enter that folder, and both are trusted. Nobody else can connect, so there is no password to
keep and no port to find.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from tools import overlay
from tools.installation import Installation
from tools.project import ROOT, TELEMETRY_OFF, server_user, version
from tools.report import SetupError, say, step

DATABASE = "siamese"
SUPERUSER = "postgres"
_PORT = 5432  # only names the socket file
_SOCKET_LIMIT = 107  # bytes of a Unix socket's path

# For a server that shares a laptop or CI machine with its clients. Each can be overridden.
SETTINGS: dict[str, str] = {
    "shared_buffers": "256MB",  # the default of 128MB is less than 70,000 images with vectors
    "maintenance_work_mem": "256MB",  # pgvector's HNSW build is far slower if it spills
    "max_wal_size": "4GB",  # at 1GB, bulk loads of images would checkpoint all the time
    "jit": "off",  # compiling costs more than it saves in queries of milliseconds
    "max_connections": "50",
    "log_line_prefix": "%m [%p] %u@%d %e ",
    "log_lock_waits": "on",
    "log_temp_files": "0",
}
# For clusters that live as long as a test, so nothing must survive a crash.
THROWAWAY: dict[str, str] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum_naptime": "5s",
}


class Cluster:
    """One PostgreSQL cluster in a folder of its own.

    ``folder`` holds ``data/``, ``log`` and the socket. ``settings`` are configuration settings in
    addition to ``SETTINGS``, and both are written at each start. If root starts it, the server
    runs as the folder's owner. If that is root, it runs as "postgres", who must be able to enter
    the folder's parents.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        installation: Installation | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder).resolve()
        self._installation = installation
        self.settings = SETTINGS | dict(settings or {})
        self.port = _PORT

    @classmethod
    @contextlib.contextmanager
    def temporary(
        cls,
        settings: Mapping[str, str] | None = None,
        installation: Installation | None = None,
    ) -> Iterator[Cluster]:
        """Make and start a temporary cluster, and remove it at the end.

        By default it doesn't wait for the disk (``THROWAWAY``). So it survives crashes of the
        server, but no power cut. pytest's ``tmp_path`` can't be its folder. If root runs the tests,
        the server's user can't enter it.
        """
        # Short, so that the socket's path fits, and not in a folder that is closed to others.
        folder = Path(tempfile.mkdtemp(prefix="pg_siamese-", dir="/tmp"))
        cluster = cls(folder, installation=installation, settings=THROWAWAY | dict(settings or {}))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.destroy()

    # --- where things are -----------------------------------------------------------------------

    @cached_property
    def installation(self) -> Installation:
        """The PostgreSQL that it runs. Raises ``SetupError`` if ``make deps`` hasn't run."""
        return self._installation or overlay.find(ROOT / "build" / "pg")

    @cached_property
    def user(self) -> pwd.struct_passwd | None:
        """The user that the server runs as, or None if that is the caller."""
        if os.geteuid() == 0 and self.folder.exists() and (owner := self.folder.stat().st_uid):
            with contextlib.suppress(KeyError):
                return pwd.getpwuid(owner)
        return server_user()

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.folder / "log"

    @property
    def socket_folder(self) -> Path:
        """The folder of the socket: the cluster's own, or a short one in /tmp."""
        name = f".s.PGSQL.{self.port}"
        own = self.folder / "socket"
        if len(os.fsencode(own / name)) <= _SOCKET_LIMIT:
            return own
        return Path("/tmp") / f"pg_siamese-{hashlib.sha256(bytes(self.folder)).hexdigest()[:12]}"

    def dsn(self, database: str = DATABASE, user: str = SUPERUSER) -> str:
        """Return a connection URI for libpq and everything built on it."""
        host = quote(str(self.socket_folder), safe="")
        return f"postgresql://{quote(user)}@/{quote(database)}?host={host}&port={self.port}"

    # --- its life -------------------------------------------------------------------------------

    def init(self) -> None:
        """Make the data folder if it is missing. Raises ``SetupError``."""
        if (self.data / "PG_VERSION").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._give_to_user(self.folder)
        command = ["--username", SUPERUSER, "--encoding", "UTF8", "--locale", "C.UTF-8"]
        command += ["--auth-local", "trust", "--auth-host", "reject", "--data-checksums"]
        if self.settings.get("fsync") == "off":
            command.append("--no-sync")
        # An incomplete folder from an interrupted run would stop initdb.
        temporary = self.folder / "data.new"
        shutil.rmtree(temporary, ignore_errors=True)
        self._run("initdb", "--no-instructions", "-D", temporary, *command)
        temporary.rename(self.data)

    def start(self) -> bool:
        """Start the server and wait until it accepts connections.

        Returns:
            False if it runs already.

        Raises:
            SetupError: it doesn't start.
        """
        self.init()
        if self.running():
            return False
        self._check_version()
        self._remove_stale_pid_file()
        self._write_configuration()
        self._check_socket()
        try:
            # -w waits until it accepts connections.
            self._run("pg_ctl", "start", "-w", "-t", "60", "-D", self.data, "-l", self.log)
        except SetupError as error:
            raise SetupError(f"{error}\n{self._log_tail()}") from None
        return True

    def stop(self, mode: str = "fast") -> bool:
        """Stop the server with pg_ctl's mode smart, fast or immediate.

        Returns:
            False if it doesn't run.

        Raises:
            SetupError: it doesn't stop.
        """
        if not self.running():
            return False
        self._run("pg_ctl", "stop", "-w", "-t", "120", "-D", self.data, "-m", mode)
        if self.socket_folder.parent != self.folder:
            shutil.rmtree(self.socket_folder, ignore_errors=True)
        return True

    def restart(self) -> None:
        """Stop and start, with changed settings."""
        self.stop()
        self.start()

    def copy(self, source: Cluster, *options: str) -> None:
        """Copy a running cluster's data folder by pg_basebackup. Raises ``SetupError``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._give_to_user(self.folder)
        where = ["-D", str(self.data), "-d", source.dsn("postgres")]
        self._run("pg_basebackup", *where, "--checkpoint=fast", *options)

    def promote(self) -> None:
        """Make a standby a server of its own, which accepts writes. Raises ``SetupError``."""
        self._run("pg_ctl", "promote", "-w", "-t", "60", "-D", self.data)

    def running(self) -> bool:
        """Return whether this cluster's server runs. A stale pid file doesn't count."""
        return self.pid() is not None

    def pid(self) -> int | None:
        """Return the postmaster's process ID, or None if it doesn't run."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split(maxsplit=1)[0])
        except PermissionError:
            raise SetupError(f"{self.folder} belongs to another user") from None
        except (OSError, ValueError, IndexError):
            return None
        # After a crash another program may have the number.
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        return pid if os.fsencode(self.data) in command else None

    def destroy(self) -> None:
        """Stop the server and remove the folder with everything in it."""
        with contextlib.suppress(SetupError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- SQL ------------------------------------------------------------------------------------

    def sql(self, statements: str, database: str = DATABASE) -> str:
        """Run statements through psql, each in a transaction of its own, and return the output.

        Rows are printed unaligned, without header. Raises ``SetupError`` at the first error.
        """
        done = subprocess.run(
            [*self.psql_command(database), "-XAtq", "-v", "ON_ERROR_STOP=1", "-f", "-"],
            input=statements,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SetupError(f"psql: {done.stderr.strip()}")
        return done.stdout.strip()

    def psql_command(self, database: str = DATABASE) -> list[str]:
        """Return the command that opens a database of this cluster."""
        return [str(self.installation.bin / "psql"), "-d", self.dsn(database)]

    # --- below ----------------------------------------------------------------------------------

    def _run(self, program: str, *arguments: str | Path) -> str:
        user = self.user
        path = self.installation.bin / program
        options: dict[str, object] = {}
        if user is not None:
            options = {"user": user.pw_uid, "group": user.pw_gid}
            options["extra_groups"] = os.getgrouplist(user.pw_name, user.pw_gid)
        # Output goes to a file, since the server would keep a pipe open.
        output = self.folder / f"{program}.out"
        with output.open("w") as file:
            try:
                done = subprocess.run(
                    [str(path), *map(str, arguments)],
                    cwd=self.folder,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    **options,  # type: ignore[call-overload]
                )
            except PermissionError:
                name = user.pw_name if user else "you"
                raise SetupError(f'the user "{name}" can\'t run {path} in {self.folder}') from None
        text = output.read_text(errors="replace")
        output.unlink()
        if done.returncode:
            last = "".join(f"\n  | {line}" for line in text.splitlines()[-8:])
            raise SetupError(f"{program} failed for the cluster in {self.folder}{last}")
        return text

    def _environment(self) -> dict[str, str]:
        """Return the server's environment, nearly empty, so that it is always the same.

        PL/Python would use PYTHONPATH, and libpq in extensions the PG* variables. What a library
        keeps in the user's home stays in the cluster's folder.
        """
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),
            # For functions that import ONNX Runtime without pg_siamese.
            TELEMETRY_OFF: "1",
        }

    def _give_to_user(self, path: Path, mode: int = 0o700) -> None:
        path.chmod(mode)
        if self.user is not None:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def _check_version(self) -> None:
        major = (self.data / "PG_VERSION").read_text().strip()
        if major != str(self.installation.major):
            raise SetupError(
                f"{self.data} was made by PostgreSQL {major}, but PostgreSQL "
                f"{self.installation.major} is used now: install {major} again, or dump and "
                "restore into a new folder"
            )

    def _remove_stale_pid_file(self) -> None:
        """Remove the pid file of a killed server, once none of its processes is left.

        PostgreSQL refuses to start if the number in the file belongs to any process of the same
        user. That may be another program by now, or a zombie in a container without an init.
        """
        file = self.data / "postmaster.pid"
        deadline = time.monotonic() + 5
        while file.exists() and time.monotonic() < deadline:
            if not _processes_in(self.data):
                file.unlink()
            else:  # they notice within moments that their parent is gone
                time.sleep(0.05)

    def _write_configuration(self) -> None:
        settings = self.settings | {
            "listen_addresses": "",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_folder),
            "unix_socket_permissions": "0700",
        }
        lines = ["# Written at each start; your own settings go into postgresql.conf, below it."]
        lines += [f"{name} = '{_quote(value)}'" for name, value in settings.items()]
        included = self.data / "pg_siamese.conf"
        included.write_text("\n".join(lines) + "\n")
        self._give_to_user(included, 0o600)
        main = self.data / "postgresql.conf"
        text = main.read_text()
        include = "include 'pg_siamese.conf'\n"
        if include not in text:
            main.write_text(f"{text}\n{include}")

    def _check_socket(self) -> None:
        """Make the socket's folder, and refuse to start if another server answers on the socket."""
        folder = self.socket_folder
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = self.user.pw_uid if self.user else os.geteuid()
        # Anyone can make a folder in /tmp, so don't use anyone else's.
        if folder.is_symlink() or folder.stat().st_uid not in (owner, os.geteuid()):
            raise SetupError(f"the socket's folder {folder} belongs to someone else: remove it")
        self._give_to_user(folder)
        path = folder / f".s.PGSQL.{self.port}"
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                # Nobody listens, so a killed server left it.
                path.unlink(missing_ok=True)
                path.with_name(path.name + ".lock").unlink(missing_ok=True)
                return
        raise SetupError(f"another server listens on {path}: stop it first")

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()[-10:]
            return f"the end of {self.log}:" + "".join(f"\n  | {line}" for line in lines)
        return f"there is no log file {self.log}"


def _processes_in(folder: Path) -> list[int]:
    """Return the processes with this working folder, which for a server is its data folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            if os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
    return found


def _quote(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")


def create_database(cluster: Cluster, database: str = DATABASE) -> None:
    """Make a database with the extension, with schema ``siamese`` on its search path.

    An older version of the extension is updated. Raises ``SetupError``.
    """
    name = database.replace('"', '""')
    text = database.replace("'", "''")
    if not cluster.sql(f"SELECT 1 FROM pg_database WHERE datname = '{text}'", "postgres"):
        cluster.sql(f'CREATE DATABASE "{name}"', "postgres")
    # After public, in which people expect what CREATE TABLE makes without a schema.
    cluster.sql(f'ALTER DATABASE "{name}" SET search_path = "$user", public, siamese', "postgres")
    there = cluster.sql(
        "SELECT extversion FROM pg_extension WHERE extname = 'pg_siamese'", database
    )
    note = cluster.folder / f"extension-{quote(database, safe='')}.sha256"
    script = cluster.installation.extensions / f"pg_siamese--{version()}.sql"
    current = hashlib.sha256(script.read_bytes()).hexdigest()
    if not there:
        with step(f'Creating the extension in database "{database}"'):
            cluster.sql("CREATE EXTENSION pg_siamese CASCADE", database)
        note.write_text(current)
    elif there != version():
        with step(f"Updating the extension from {there} to {version()}"):
            cluster.sql("ALTER EXTENSION pg_siamese UPDATE", database)
            cluster.sql("SELECT siamese.renew_grants()", database)
        note.write_text(current)
    elif not note.exists() or note.read_text() != current:
        say(
            f'The extension\'s SQL changed since database "{database}" was made, which keeps the '
            "old one. To take the new one: DROP EXTENSION pg_siamese CASCADE (its data are lost), "
            "then make up."
        )
