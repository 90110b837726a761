"""Install what is missing, for ``make deps``. A second run finds nothing to do.

Run it with Debian's python3, because PL/Python is linked to it: ``PYTHONPATH=. /usr/bin/python3 -m
tools.deps``.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools import apt, environments, extension, overlay, packages, pgvector, postgres
from tools.project import ROOT, Stamp, build_folder
from tools.report import SetupError, command, say

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CHROMIUM = Path("/usr/bin/chromium")


def ensure_fashion_mnist() -> Path:
    """Return the folder with Fashion-MNIST's four IDX files. As root, install the package.

    Raises ``SetupError`` with the command to run if the caller isn't root.
    """
    if not (FASHION_MNIST / "train-images-idx3-ubyte.gz").exists():
        apt.install(["dataset-fashion-mnist"], "Fashion-MNIST")
    return FASHION_MNIST


def ensure_chromium() -> None:
    """Install the browser of the page's tests. Raises ``SetupError`` if that can't be done."""
    if not CHROMIUM.exists():
        apt.install(["chromium", "fonts-dejavu-core"], "Chromium")


def ensure(extras: Collection[str] = (), *, small: bool = False) -> Path:
    """Install and build all that is missing, and return its folder. Raises ``SetupError``.

    ``small`` is that of ``environments.ensure_client``.
    """
    os.umask(0o022)  # the server's user must be able to read what root builds
    # First, because PostgreSQL brings the user that the build folder must be open to.
    system = postgres.ensure_installed(ROOT / "build")
    build = build_folder()
    if not os.access(build, os.W_OK):
        raise SetupError(f"{build} belongs to another user: work in a clone of your own")
    with _single_run(build):
        vector = pgvector.ensure(system, build)
        python = postgres.python_of(system.lib)
        environments.ensure_server(build / "server", python)
        environments.ensure_client(build / "client", extras, small=small)
        place = build / "packages"
        site = environments.site_packages(build / "server", python)
        packages.switch(packages.server_folder(place, python), site)
        packages.write_models(place)
        extension.write(build / "extension" / "extension", place, python)
        folders = [build / "extension"] if vector is None else [vector, build / "extension"]
        private = overlay.sync(system, build / "pg", folders)
        verified = Stamp(build, "overlay", str(private.bin), private.bin / "pg_config")
        if not verified.fresh():
            overlay.verify(private)
            verified.write()
    return build


def _has_medmnist(build: Path) -> bool:
    question = (
        "import sys; from pg_siamese import datasets as d;"
        " sys.exit(not any(map(d.find_medmnist, d.MEDICAL_SETS)))"
    )
    return subprocess.run([build / "client" / "bin" / "python", "-c", question]).returncode == 0


@contextmanager
def _single_run(build: Path) -> Iterator[None]:
    with (build / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another run of make deps to end …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="make deps", description=__doc__)
    parser.add_argument("--test", action="store_true", help="what the tests and linters need")
    parser.add_argument("--train", action="store_true", help="PyTorch and what training needs")
    parser.add_argument(
        "--train-if-small", action="store_true", help="the same, with a CPU build of PyTorch only"
    )
    parser.add_argument("--bench", action="store_true", help="Fashion-MNIST")
    parser.add_argument(
        "--demo", action="store_true", help="Fashion-MNIST, unless MedMNIST is on this machine"
    )
    chosen = parser.parse_args(arguments)
    train = chosen.train or chosen.train_if_small
    extras = ["dicomweb", "explore", "test"] if chosen.test else []
    extras += ["train"] if train else []
    build = ensure(extras, small=not chosen.train)
    if chosen.bench:
        ensure_fashion_mnist()
    elif chosen.test or (chosen.demo and not _has_medmnist(build)):
        try:
            ensure_fashion_mnist()
        except SetupError as error:
            prefix = "Without Fashion-MNIST some tests are skipped: " if chosen.test else ""
            say(f"{prefix}{error}")
    if chosen.test and not chosen.bench:
        try:
            ensure_chromium()
        except SetupError as error:
            say(f"Without Chromium the tests of the page in a browser are skipped: {error}")


if __name__ == "__main__":
    sys.exit(main())
