"""Choose every package's version for ``make lock``, and write it with hashes to requirements/.

The hashes are those of all files of a version in the package index. So the locks hold for every
Python from 3.11 on and every kind of machine. A locked version stays if the pyproject.toml files
allow it. ARGS=--upgrade chooses again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from tools import environments
from tools.environments import LOCKS, NAMES, lock
from tools.project import ROOT, build_folder
from tools.report import SetupError, clean_environment, command, run, step

TOOL = "uv==0.13.9"
_PINNED = re.compile(r"^([\w.-]+)===?(\S+)(?: ; [^\\\n]+?)?(?= \\?$|$)", re.MULTILINE)
# Packages of PyTorch's CUDA build only, and what medmnist declares without using it.
_LARGE = re.compile(r"^(torch|triton|cuda-.*|nvidia-.*)$")
_OWN = "pg_siamese_server"


def pins(text: str) -> dict[str, str]:
    """Return the packages of a lock, each with its line: name, version and marker."""
    return {found[1]: found[0].replace("===", "==") for found in _PINNED.finditer(text)}


class Compiler:
    """Runs uv, with the package index and settings that uv finds by itself."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._uv = scratch / "bin" / "uv"

    def compile(self, roots: Iterable[str], *options: str | Path, hashes: bool = True) -> str:
        """Return the lock of ``roots`` and their dependencies. Raises ``SetupError``."""
        wanted = self._scratch / "wanted.in"
        wanted.write_text("\n".join(roots) + "\n")
        words: list[str | Path] = [self._uv, "pip", "compile", "--quiet", "--universal"]
        words += ["--python-version", "3.11", "--only-binary", ":all:", "--no-annotate"]
        words += ["--no-header", "--cache-dir", self._scratch / "cache"]
        words += ["--constraint", LOCKS / "known-bad.txt"]
        if hashes:
            words.append("--generate-hashes")
        return run(
            [*words, *options, wanted],
            cwd=ROOT,
            env=clean_environment(),
            failure="uv could not choose the packages' versions",
        )


def _requirements() -> dict[str, list[str]]:
    """Return the requirements of the pyproject.toml files, by lock."""
    server, client = environments.project("plpython"), environments.project("python")
    extras = client["project"]["optional-dependencies"]
    backend = {*server["build-system"]["requires"], *client["build-system"]["requires"]}
    servers = [*server["project"]["dependencies"], *sorted(backend)]
    clients = [*client["project"]["dependencies"], *servers]
    return {
        "tool": [TOOL],
        "server": servers,
        "client": [each for each in clients if not each.startswith(_OWN)],
        "dicomweb": extras["dicomweb"],
        "explore": extras["explore"],
        "test": extras["test"],
        "train": extras["train"],
        "alone": client["dependency-groups"]["without-dependencies"],
    }


def _check_cpu_build(versions: dict[str, str]) -> None:
    ours = pins(lock("torch-cpu").read_text())["torch"].split(" ;")[0]
    if ours != f"{versions['torch'].split(' ;')[0]}+cpu":
        raise SetupError(
            f"{lock('torch-cpu')} has {ours}: write the version of torch there, and the hashes"
            " that PyTorch's CPU index has of it"
        )


def write(upgrade: bool = False) -> None:
    """Write all locks. Raises ``SetupError``."""
    scratch = build_folder() / "lock"
    environments.ensure_tool(scratch)
    uv = Compiler(scratch)
    wanted = _requirements()
    known: dict[str, str] = {}
    for name in NAMES:
        if name != "torch-cpu" and lock(name).exists():
            known |= pins(lock(name).read_text())
    # One choice for all, so that environments with several locks have no conflict. uv prefers the
    # versions in the output file.
    every = scratch / "all.txt"
    every.write_text("".join(f"{line}\n" for line in known.values()))
    parts = ("server", "client", "dicomweb", "explore", "test", "train")
    roots = [each for name in parts for each in wanted[name]]
    options = ["--upgrade"] if upgrade else []
    uv.compile(roots, "--output-file", every, *options, hashes=False)
    chosen = pins(every.read_text())
    _check_cpu_build(chosen)
    large = [name for name in chosen if _LARGE.match(name)]

    def locked(roots: Sequence[str], without: Collection[str] = (), *more: str | Path) -> str:
        left_out = [word for name in without for word in ("--no-emit-package", name)]
        return uv.compile(roots, "--constraint", every, *left_out, *more)

    texts = {"tool": uv.compile(wanted["tool"]), "server": locked(wanted["server"])}
    texts["client"] = locked(wanted["client"])
    # Installed in addition to the client's packages. What those have on every system isn't
    # repeated.
    base = [name for name, line in pins(texts["client"]).items() if ";" not in line]
    texts["dicomweb"] = locked(wanted["dicomweb"], base)
    texts["explore"] = locked(wanted["explore"], base)
    texts["test"] = locked(wanted["test"], base)
    texts["train"] = locked(wanted["train"], [*base, *large])
    small = [name for name in chosen if name not in large]
    torch = [each for each in wanted["train"] if each.startswith("torch==")]
    # "==" would accept 2.13.0+cpu for 2.13.0, and prefer it as the newer one.
    texts["torch"] = locked(torch, small).replace("torch==", "torch===", 1)
    texts["client"] += uv.compile(wanted["alone"], "--no-deps")
    for name, text in texts.items():
        lock(name).write_text(f"# {_ABOUT[name]}\n# Written by `make lock`: don't edit.\n{text}")


_ABOUT = {
    "tool": "What `make lock` itself uses.",
    "server": "What the server package needs, and what builds it.",
    "client": "What the client needs, with the server package's own needs.",
    "dicomweb": "What loading from a PACS needs besides the client's packages.",
    "explore": "What the page needs besides the client's packages.",
    "test": "What the tests and linters need besides the client's packages.",
    "train": "What training needs besides the client's packages and torch.",
    "torch": "The package index's build of torch: on Linux with CUDA, several GB.",
}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="make lock", description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest that is allowed")
    chosen = parser.parse_args(arguments)
    with step("Choosing versions and hashes"):
        write(chosen.upgrade)


if __name__ == "__main__":
    sys.exit(main())
