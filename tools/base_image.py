"""Make the base image from Debian's archive for ``make docker-base``, without a registry.

The archive is the machine's own, as its apt is configured.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import apt
from tools.apt import Archive
from tools.engine import Engine
from tools.report import SetupError, clean_environment, run, step

_TESTING = "forky"  # without updates and security fixes in suites of their own
# As in the official slim image: no manuals, and only the licences of the documentation.
_LEFT_OUT = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
)


def tag(suite: str) -> str:
    """Return the name of the base image of one of Debian's suites."""
    return f"pg_siamese-base:{suite}"


def stanzas(main: Archive, all_of_them: Sequence[Archive], codename: str, suite: str) -> list[str]:
    """Return sources of a suite, with updates and security if the machine has them.

    ``main`` is the archive of the machine's own release, whose name is ``codename``.
    """
    plain = [suite]
    same = [each for each in all_of_them if each.uris == main.uris]
    if suite != _TESTING and any(f"{codename}-updates" in each.suites for each in same):
        plain.append(f"{suite}-updates")
    result = [Archive(main.uris, tuple(plain), ("main",), main.options)]
    for each in all_of_them:
        wanted = f"{codename}-security" in each.suites and "main" in each.components
        if wanted and suite != _TESTING:
            result.append(Archive(each.uris, (f"{suite}-security",), ("main",), each.options))
            break
    return [each.stanza("deb", each.suites) for each in result]


def make(engine: Engine, scratch: Path, suite: str) -> str:
    """Make a base image and return its name. ``scratch`` is a folder for some hundred MB.

    Raises ``SetupError`` if this isn't Debian, or the archive can't be reached.
    """
    main = apt.main_archive()
    system = apt.os_release()
    if main is None or system.get("ID") != "debian":
        raise SetupError("the base image is made from Debian's archive: that needs Debian with apt")
    if not shutil.which("mmdebstrap"):
        apt.install(["mmdebstrap"], "mmdebstrap")
    sources = stanzas(main, apt.archives(), system.get("VERSION_CODENAME", ""), suite)
    with (
        step(f"Making the base image {tag(suite)}"),
        tempfile.TemporaryDirectory(prefix="base-", dir=scratch) as name,
    ):
        listed, archive = Path(name) / "debian.sources", Path(name) / "base.tar"
        listed.write_text("\n".join(sources))
        command: list[str | Path] = ["mmdebstrap", "--quiet", "--variant=minbase"]
        command += [f"--dpkgopt={option}" for option in _LEFT_OUT]
        # It stays in the image, since packages to come have the same mirror.
        command += [f"--aptopt={line}" for line in apt.settings("Acquire::Check-Valid-Until")]
        if any(uri.startswith("https:") for each in sources for uri in each.split()):
            command.append("--include=ca-certificates")
        run(
            [*command, suite, archive, listed],
            env=clean_environment({"LC_ALL": "C.UTF-8"}),
            failure="mmdebstrap could not make the base image: check the network",
        )
        engine.run("import", "--change", 'CMD ["bash"]', archive, tag(suite))
    return tag(suite)
