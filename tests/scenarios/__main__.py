"""The bars in full, each by one command on a throw-away cluster of its own.

    build/client/bin/python -m tests.scenarios recall
    build/client/bin/python -m tests.scenarios mixed --seconds 120
    build/client/bin/python -m tests.scenarios lifecycle --seconds 120
    build/client/bin/python -m tests.scenarios cancel
    build/client/bin/python -m tests.scenarios images
    build/client/bin/python -m tests.scenarios memory
    build/client/bin/python -m tests.scenarios parity
    build/client/bin/python -m tests.scenarios all

The tests of the same names under tests/database/ run them in short.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg

from tests.scenarios.bad_images import BadImages
from tests.scenarios.cancel import Cancel
from tests.scenarios.gallery import MODELS, Connection, gallery
from tests.scenarios.lifecycle import Lifecycle
from tests.scenarios.memory import Memory
from tests.scenarios.mixed import Mixed
from tests.scenarios.parity import Parity
from tests.scenarios.recall import Recall
from tools.cluster import Cluster, create_database

DATABASE = "stress"


class Sessions:
    """Opens connections to one database and closes them all at the end."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.opened: list[Connection] = []

    def __call__(self) -> Connection:
        """Open one, in autocommit mode."""
        connection = psycopg.connect(self.dsn, autocommit=True)
        self.opened.append(connection)
        return connection

    def close(self) -> None:
        """Close all."""
        for connection in self.opened:
            connection.close()


@contextmanager
def database() -> Iterator[Sessions]:
    """A cluster with the medical model and the empty collection ``images``."""
    with Cluster.temporary() as cluster:
        create_database(cluster, DATABASE)
        sessions = Sessions(cluster.dsn(DATABASE))
        owner = sessions()
        onnx = (MODELS / "medical.onnx").read_bytes()
        owner.execute("SELECT register_model('medical', %s)", (onnx,))
        owner.execute("SELECT create_collection()")
        try:
            yield sessions
        finally:
            sessions.close()


def recall(options: argparse.Namespace) -> None:
    """Recall after each step, at 20,000 rows."""
    images = gallery(options.rows + 2500)
    rows = len(images) - 2000
    with database() as connect:
        Recall(connect, images, rows=rows, more=1000, queries=options.queries).run()


def mixed(options: argparse.Namespace) -> None:
    """Eight sessions beside index builds."""
    rows = min(options.rows, 12_000)
    with database() as connect:
        Mixed(connect, gallery(rows + 1000), rows, options.seconds, seed=options.seed).run()


def lifecycle(options: argparse.Namespace) -> None:
    """Collections that come and go beside everything else."""
    with database() as connect:
        Lifecycle(connect, connect.dsn, gallery(500), options.seconds, seed=options.seed).run()


def cancel(options: argparse.Namespace) -> None:
    """Time-outs and cancels, at 100,000 rows."""
    del options
    with database() as connect:
        Cancel(connect, gallery(500), moments=40, layers=200).run()


def images(options: argparse.Namespace) -> None:
    """Damaged files and bombs."""
    with database() as connect:
        BadImages(connect, options.count, options.seed).run()


def memory(options: argparse.Namespace) -> None:
    """Memory over thousands of statements."""
    rows = min(options.rows, 12_000)
    with database() as connect:
        Memory(connect, gallery(rows + 500), rows, statements=10_000).run()


def parity(options: argparse.Namespace) -> None:
    """Vectors inside and outside of PostgreSQL, both models, 500 images of each data set."""
    del options
    for model in ("medical", "fashion_mnist"):
        with database() as connect:
            Parity(connect, model=model).run()


FORMS: dict[str, Callable[[argparse.Namespace], None]] = {
    "recall": recall,
    "mixed": mixed,
    "lifecycle": lifecycle,
    "cancel": cancel,
    "images": images,
    "memory": memory,
    "parity": parity,
}


def main() -> None:
    """Run one form, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("form", choices=[*FORMS, "all"])
    parser.add_argument("--rows", type=int, default=20_000, help="recall: rows loaded")
    parser.add_argument("--queries", type=int, default=200, help="recall: searches after each step")
    parser.add_argument("--seconds", type=float, default=120, help="mixed, lifecycle: how long")
    parser.add_argument(
        "--seed", type=int, default=0, help="mixed, lifecycle, images: of what is random"
    )
    parser.add_argument("--count", type=int, default=2000, help="images: damaged files")
    options = parser.parse_args()
    for name in FORMS if options.form == "all" else [options.form]:
        started = time.monotonic()
        FORMS[name](options)
        print(f"{name}: passed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
