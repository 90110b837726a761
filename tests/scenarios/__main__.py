"""The bars in full, each by one command on a throw-away cluster of its own.

    build/client/bin/python -m tests.scenarios mixed --seconds 120

The tests of the same names under tests/database/ run them in short.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psycopg

from tests.conftest import MODELS, Connection, make_template
from tests.scenarios.bad_dicom import BadDicom
from tests.scenarios.bad_images import BadImages
from tests.scenarios.cancel import Cancel
from tests.scenarios.gallery import gallery
from tests.scenarios.lifecycle import Lifecycle
from tests.scenarios.memory import Memory
from tests.scenarios.mixed import Mixed
from tests.scenarios.parity import Parity
from tests.scenarios.recall import Recall
from tools.cluster import Cluster


@contextmanager
def database() -> Iterator[Callable[[], Connection]]:
    """A cluster with the medical model and the empty collection ``images``; opens connections."""
    with Cluster.temporary() as cluster, ExitStack() as opened:
        dsn = cluster.dsn(make_template(cluster, (MODELS / "medical.onnx").read_bytes()))
        yield lambda: opened.enter_context(psycopg.connect(dsn, autocommit=True))


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
        dsn = connect().info.dsn
        Lifecycle(connect, dsn, gallery(500), options.seconds, seed=options.seed).run()


def cancel(options: argparse.Namespace) -> None:
    """Time-outs and cancels, at 100,000 rows."""
    with database() as connect:
        Cancel(connect, gallery(500), moments=40, layers=200).run()


def images(options: argparse.Namespace) -> None:
    """Damaged files and bombs."""
    with database() as connect:
        BadImages(connect, options.count, options.seed).run()


def dicom(options: argparse.Namespace) -> None:
    """Damaged DICOM files and bombs, by statements and by a worker."""
    with database() as connect:
        BadDicom(connect, options.count, options.seed, dsn=connect().info.dsn).run()


def memory(options: argparse.Namespace) -> None:
    """Memory over thousands of statements."""
    rows = min(options.rows, 12_000)
    with database() as connect:
        Memory(connect, gallery(rows + 500), rows, statements=10_000).run()


def parity(options: argparse.Namespace) -> None:
    """Vectors inside and outside of PostgreSQL, all models, 500 images of each data set."""
    for model in ("medical", "clinical", "fashion_mnist"):
        with database() as connect:
            Parity(connect, model=model).run()


FORMS = {
    form.__name__: form
    for form in (recall, mixed, lifecycle, cancel, images, dicom, memory, parity)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("form", choices=[*FORMS, "all"])
    parser.add_argument("--rows", type=int, default=20_000, help="recall: rows loaded")
    parser.add_argument("--queries", type=int, default=200, help="recall: searches after each step")
    parser.add_argument("--seconds", type=float, default=120, help="mixed, lifecycle: how long")
    parser.add_argument(
        "--seed", type=int, default=0, help="mixed, lifecycle, images, dicom: of what is random"
    )
    parser.add_argument("--count", type=int, default=5000, help="images, dicom: damaged files")
    options = parser.parse_args()
    for name in FORMS if options.form == "all" else [options.form]:
        started = time.monotonic()
        FORMS[name](options)
        print(f"{name}: passed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
