"""Find pgvector: the system's, its package, or a private build of Debian's source package."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from tools import apt
from tools.installation import Installation
from tools.report import SetupError, run, step

_SUITE = "trixie"  # the first with pgvector, whose source package others build
OLDEST = "0.5"  # the first with HNSW


def new_enough(extensions: Path) -> bool:
    """Return whether a folder of control files has a pgvector that is new enough."""
    try:
        control = (extensions / "vector.control").read_text()
    except OSError:
        return False
    found = re.search(r"default_version\s*=\s*'(\d+)\.(\d+)", control)
    oldest = tuple(map(int, OLDEST.split(".")))
    return found is not None and (int(found[1]), int(found[2])) >= oldest


def package(system: Installation) -> str:
    """Return the name of pgvector's Debian package."""
    return f"postgresql-{system.major}-pgvector"


def is_packaged(name: str) -> bool:
    """Return whether apt has the package, or if it has no lists yet, whether Debian does."""
    with contextlib.suppress(SetupError):  # the network is down, so use what there is
        if apt.candidate(name):
            return True
    return not apt.has_lists() and apt.os_release().get("VERSION_CODENAME") != "bookworm"


def missing_packages(system: Installation, build: Path) -> list[str]:
    """Return the Debian packages to install for pgvector: its own, or what its build needs."""
    if new_enough(system.extensions) or _build_folder(build, system).exists():
        return []
    if apt.candidate(package(system)):
        return [package(system)]
    missing = [program for program in ("gcc", "make") if not shutil.which(program)]
    if not Path("/usr/include/stdio.h").exists():
        missing.append("libc6-dev")
    return missing


def _build_folder(build: Path, system: Installation) -> Path:
    return build / f"pgvector-{system.major}"


def ensure(system: Installation, build: Path) -> Path | None:
    """Return a folder with pgvector for ``overlay.sync``, or None if the system has it.

    It needs the packages of ``missing_packages``. Raises ``SetupError``.
    """
    if new_enough(system.extensions):
        return None
    built = _build_folder(build, system)
    if not built.exists():
        with step("Building pgvector from Debian's source package"):
            _build(system, built)
    return built


def _build(system: Installation, built: Path) -> None:
    archive = apt.main_archive()
    if archive is None or apt.os_release().get("ID") != "debian":
        raise SetupError(
            f"there is no package {package(system)}, and no Debian archive in "
            "apt's configuration to take its source from: install pgvector by hand"
        )
    failure = "pgvector's source package could not be fetched"
    with (
        apt.private_apt([archive.stanza("deb-src", [_SUITE])]) as private,
        tempfile.TemporaryDirectory(prefix="pg_siamese-pgvector-") as name,
    ):
        private.get("update", "-o", "APT::Update::Error-Mode=any", failure=failure)
        files = private.get("source", "--download-only", "pgvector", failure=failure)
        tarball = next(file for file in files if ".orig.tar." in file.name)
        source, tree = Path(name) / "source", Path(name) / "tree"
        source.mkdir()
        run(
            ["tar", "-xf", tarball, "-C", source, "--strip-components=1"],
            failure="pgvector's source package could not be unpacked",
        )
        # Without bitcode for the JIT, which would need clang.
        make: list[str | Path] = ["make", "-C", source]
        make += [f"PG_CONFIG={_pgxs(system, tree)}", "with_llvm=no"]
        run([*make, f"-j{os.cpu_count() or 1}", "all"], failure="pgvector could not be compiled")
        run([*make, "install"], failure="pgvector could not be installed into the build folder")
        # The tree's pg_config names the tree's folders, so it was installed there.
        result = Installation(system.major, tree / "usr")
        temporary = built.with_name(built.name + ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "lib").mkdir(parents=True)
        shutil.copy(result.lib / "vector.so", temporary / "lib")
        shutil.copytree(result.extensions, temporary / "extension")
        shutil.rmtree(built, ignore_errors=True)
        temporary.rename(built)


def _pgxs(system: Installation, tree: Path) -> Path:
    """Make a tree with pg_config, PGXS and the server's headers, and return its pg_config.

    The package with the headers depends on clang and LLVM (hundreds of MB), which this build
    doesn't need. If it isn't installed, it is only unpacked here.
    """
    result = Installation(system.major, tree / "usr")
    headers = Path("include") / "postgresql"
    if (system.prefix / headers / str(system.major) / "server" / "postgres.h").exists():
        (result.prefix / "include").mkdir(parents=True)
        (result.prefix / headers).symlink_to(system.prefix / headers)
    else:
        package = f"postgresql-server-dev-{system.major}"
        failure = f"the package {package} could not be fetched"
        with apt.private_apt([each.stanza("deb", each.suites) for each in apt.archives()]) as own:
            own.get("update", failure=failure)
            file = own.get("download", package, failure=failure)[0]
            run(["dpkg-deb", "-x", file, tree], failure=f"{package} could not be unpacked")
    # Relative to itself, pg_config finds the folders of this tree. PGXS comes with the clients.
    for folder in (result.bin, result.lib, result.share):
        folder.mkdir(parents=True, exist_ok=True)
    (result.lib / "pgxs").symlink_to(system.lib / "pgxs")
    shutil.copy2(system.bin / "pg_config", result.bin)
    return result.bin / "pg_config"
