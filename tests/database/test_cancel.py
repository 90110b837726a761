"""Time-outs and cancels stop inserts, backfills, searches and index builds within a second.

In full: ``python -m tests.scenarios cancel``.
"""

from __future__ import annotations

import numpy as np
import psycopg
import pytest

from tests.conftest import Connect, Connection
from tests.scenarios.cancel import Cancel
from tests.scenarios.gallery import gallery, insert
from tests.support import one


@pytest.mark.law(5)
def test_long_statements_stop_within_a_second(connect: Connect) -> None:
    Cancel(connect, gallery(500), rows=15_000, vectors=12_000, moments=4, layers=15).run()


@pytest.mark.law(5)
def test_a_timeout_never_strikes_the_next_statement(db: Connection) -> None:
    images = gallery(500)
    insert(db, images.files[:300])
    db.execute("SELECT build_index()")
    random = np.random.default_rng(0)
    struck = 0
    for number in range(150):
        file = images.files[300 + number % 200]
        # From before the search begins until after it has ended.
        db.execute(
            "SELECT set_config('statement_timeout', %s, false)", (f"{random.integers(1, 6)}",)
        )
        try:
            db.execute("SELECT * FROM similar_images(%s, 10)", (file,))
        except psycopg.errors.QueryCanceled:
            struck += 1
        db.execute("SET statement_timeout = 0")
        db.execute("SELECT count(*) FROM siamese.images")
    assert one(db, "SELECT count(*) FROM siamese.images") == 300
    if not struck:
        pytest.skip("this machine is too quick for the time-outs tried")
