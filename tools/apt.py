"""Install Debian packages as root, and fetch some without touching the system."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.report import SetupError, clean_environment, run, step

_LISTS = Path("/var/lib/apt/lists")
_CREATE_CLUSTER = Path("/etc/postgresql-common/createcluster.conf")
_RETRIES = ("-o", "Acquire::Retries=3")
_OPTIONS = {"signed-by": "Signed-By", "trusted": "Trusted"}  # of an archive, to be kept
_NETWORK = "check the network (and http_proxy, if there is a proxy), then run it again"


def _environment() -> dict[str, str]:
    return clean_environment({"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"})


def available() -> bool:
    """Return whether this machine has apt."""
    return shutil.which("apt-get") is not None


def has_lists() -> bool:
    """Return whether this machine's package lists have been fetched."""
    return any(_LISTS.glob("*_Packages*"))


def os_release() -> dict[str, str]:
    """Return /etc/os-release as a dictionary."""
    with contextlib.suppress(OSError):
        text = Path("/etc/os-release").read_text()
        return {k: v.strip("\"'") for k, v in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE)}
    return {}


def update() -> None:
    """Refresh the system's package lists. Raises ``SetupError``."""
    with step("Refreshing the package lists"):
        failure = f"apt-get update failed: {_NETWORK}"
        run(["apt-get", "update", "-qq", *_RETRIES], env=_environment(), failure=failure)
        # apt only warns of unreachable archives, and one of several may be dispensable.
        if not has_lists():
            raise SetupError(failure)


def candidate(package: str) -> str | None:
    """Return the version of a package that apt would install, or None.

    If the system has no package lists yet and the caller is root, they are fetched first.
    """
    if not available():
        return None
    if os.geteuid() == 0 and not has_lists():
        update()
    text = run(
        ["apt-cache", "policy", package], env=_environment(), failure="apt-cache policy failed"
    )
    found = re.search(r"Candidate: (\S+)", text)
    return found[1] if found and found[1] != "(none)" else None


def settings(name: str) -> list[str]:
    """Return lines of apt's configuration on this machine, those of ``name`` and below it."""
    text = run(["apt-config", "dump", name], env=_environment(), failure="apt-config dump failed")
    return [line for line in text.splitlines() if line.strip()]


def install(packages: Sequence[str], what: str) -> None:
    """Install packages as root. Refresh the lists only if it fails without.

    Raises ``SetupError`` with one line if the caller isn't root or installing fails.
    """
    names = " ".join(packages)
    if not available():
        raise SetupError(f"{what} is missing, and this machine has no apt: install it by hand")
    if os.geteuid() != 0:
        raise SetupError(
            f"missing packages: {names}\n"
            f"  ask an administrator to run: apt-get install --no-install-recommends {names}"
        )
    command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends"]
    command += ["-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120", *_RETRIES, *packages]
    failure = f"apt-get could not install {names}: {_NETWORK}"

    def attempt() -> None:
        with step(f"Installing {what} ({names})"):
            run(command, env=_environment(), failure=failure)

    if not has_lists():
        update()
        attempt()
        return
    try:
        attempt()
    except SetupError:
        # Old lists name versions that the mirror no longer has.
        update()
        attempt()


def unpack(packages: Sequence[str], folder: Path, what: str) -> None:
    """Unpack packages, and what they need beyond the system's own, into a new folder.

    Nothing is installed: no service starts, and any user may do it. Raises ``SetupError``.
    """
    if not available():
        raise SetupError(f"{what} is missing, and this machine has no apt")
    if not has_lists() and os.geteuid() == 0:
        update()
    failure = f"{what} could not be fetched: {_NETWORK}"
    with (
        step(f"Fetching {what} ({' '.join(packages)})"),
        tempfile.TemporaryDirectory(prefix="pg_siamese-apt-") as name,
    ):
        cache, temporary = Path(name), folder.with_name(folder.name + ".new")
        (cache / "archives" / "partial").mkdir(parents=True)
        cache.chmod(0o755)  # for apt's own user
        command: list[str | Path] = ["apt-get", "install", "--download-only", "-qq", "-y"]
        command += ["--no-install-recommends", "--reinstall", *_RETRIES]
        command += ["-o", f"Dir::Cache={cache}", "-o", "Debug::NoLocking=1", *packages]
        run(command, env=_environment(), failure=failure)
        shutil.rmtree(temporary, ignore_errors=True)
        for file in sorted((cache / "archives").glob("*.deb")):
            run(["dpkg-deb", "-x", file, temporary], failure=f"{file.name} could not be unpacked")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


@contextlib.contextmanager
def no_new_cluster() -> Iterator[None]:
    """Keep Debian's packages from creating and starting a system cluster meanwhile.

    It needs postgresql-common, and restores its settings at the end.
    """
    before = _CREATE_CLUSTER.read_bytes()
    _CREATE_CLUSTER.write_bytes(before + b"\ncreate_main_cluster = false\n")
    try:
        yield
    finally:
        _CREATE_CLUSTER.write_bytes(before)


# --- The machine's own archive, as apt is configured here ---------------------------------------


@dataclass(frozen=True)
class Archive:
    """One entry of the machine's apt configuration, which names the source of packages."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)  # deb822 names: Signed-By, Trusted

    def stanza(self, kind: str, suites: Sequence[str]) -> str:
        """Return it in deb822 format for other suites. ``kind`` is deb or deb-src."""
        lines = [
            f"Types: {kind}",
            f"URIs: {' '.join(self.uris)}",
            f"Suites: {' '.join(suites)}",
            f"Components: {' '.join(self.components)}",
            *(f"{name}: {value}" for name, value in self.options.items()),
        ]
        return "\n".join(lines) + "\n"


def parse_deb822(text: str) -> list[Archive]:
    """Return the enabled ``deb`` entries of a .sources file. Signed-By may hold a whole key."""
    archives = []
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                fields[name] = fields.get(name, "") + "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0", "off"):
            continue
        if "deb" not in fields.get("types", "").split():
            continue
        names = ("uris", "suites", "components")
        uris, suites, components = (tuple(fields.get(k, "").split()) for k in names)
        options = {_OPTIONS[k]: v for k, v in fields.items() if k in _OPTIONS}
        archives.append(Archive(uris, suites, components, options))
    return archives


def parse_one_line(text: str) -> list[Archive]:
    """Return the ``deb`` entries of a sources.list file."""
    archives = []
    for line in text.splitlines():
        found = re.match(r"deb\s+(?:\[([^]]*)\]\s*)?(\S+)\s+(\S+)\s*([^#]*)", line.strip())
        if not found:
            continue
        options: dict[str, str] = {}
        for word in (found[1] or "").split():
            name, _, value = word.partition("=")
            if name in _OPTIONS:
                options[_OPTIONS[name]] = value.replace(",", " ")
        archives.append(Archive((found[2],), (found[3],), tuple((found[4] or "").split()), options))
    return archives


def archives(etc: Path = Path("/etc/apt")) -> list[Archive]:
    """Return the machine's own archives, from both formats of apt's configuration."""
    result = []
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    for file in files:
        with contextlib.suppress(OSError):
            if file.suffix == ".sources":
                result += parse_deb822(file.read_text())
            elif file.suffix == ".list":
                result += parse_one_line(file.read_text())
    return result


def main_archive() -> Archive | None:
    """Return the archive of this machine's own release of the distribution."""
    codename = os_release().get("VERSION_CODENAME", "")
    whole = [each for each in archives() if "main" in each.components]
    exact = [each for each in whole if codename in each.suites]
    # A release may have another name (stable). Updates and security have their own archives.
    plain = [each for each in whole if any(suite.isalpha() for suite in each.suites)]
    return next(iter(exact + plain), None)


class PrivateApt:
    """apt with its own sources, lists and cache, which leaves the system's unchanged.

    It works for any user, and checks signatures with the keys of the stanzas. Everything is kept in
    ``folder``, which must exist.
    """

    def __init__(self, folder: Path, stanzas: Sequence[str]) -> None:
        self.folder = folder
        for name in ("state/lists/partial", "cache/archives/partial", "sources.d", "download"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "sources.d" / "private.sources").write_text("\n".join(stanzas))
        self._config = folder / "apt.conf"
        # Hooks of the system's configuration clean the system's cache, so they are left out here.
        hooks = "Pre-Invoke", "Post-Invoke", "Post-Invoke-Success"
        self._config.write_text(
            f'Dir::State "{folder}/state";\n'
            'Dir::State::status "/var/lib/dpkg/status";\n'
            f'Dir::Cache "{folder}/cache";\n'
            'Dir::Etc::SourceList "/dev/null";\n'
            f'Dir::Etc::SourceParts "{folder}/sources.d";\n'
            'Acquire::Languages "none";\n' + "".join(f"#clear APT::Update::{h};\n" for h in hooks)
        )
        if os.geteuid() == 0:
            # apt downloads as its own unprivileged user, which must be able to write here.
            with contextlib.suppress(LookupError):
                for name in ("state/lists/partial", "cache/archives/partial", "download"):
                    shutil.chown(folder / name, user="_apt")

    def get(self, *arguments: str, failure: str) -> list[Path]:
        """Run apt-get and return the files in the download folder. Raises ``SetupError``."""
        run(
            ["apt-get", "-c", self._config, "-qq", *_RETRIES, *arguments],
            cwd=self.folder / "download",
            env=_environment(),
            failure=f"{failure}: {_NETWORK}",
        )
        return sorted((self.folder / "download").iterdir())


@contextlib.contextmanager
def private_apt(stanzas: Sequence[str]) -> Iterator[PrivateApt]:
    """Make a ``PrivateApt`` in a temporary folder, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="pg_siamese-apt-") as name:
        Path(name).chmod(0o755)  # for apt's own user
        yield PrivateApt(Path(name), stanzas)
