"""Golden lists: what the extension consists of, and who may do what with it.

A change that is meant: ``build/client/bin/python -m pytest tests/database/test_golden.py
--renew-golden``, and the difference goes into the same commit.
"""

from __future__ import annotations

import pytest

from tests.catalog import check_golden, objects, privileges
from tests.conftest import Connection, NewRole
from tests.database.tables import make_collection


@pytest.fixture
def renew(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--renew-golden"))


def test_objects(db: Connection, renew: bool) -> None:
    """With one collection of each kind: 1 is sync, 2 is deferred."""
    make_collection(db, key="uuid", embed="deferred")
    check_golden("objects", objects(db), renew)


def test_privileges(db: Connection, new_role: NewRole, renew: bool) -> None:
    make_collection(db, key="uuid", embed="deferred")
    reader, admin, worker = new_role(), new_role(), new_role()
    db.execute("SELECT grant_usage(%s), grant_admin(%s), grant_worker(%s)", (reader, admin, worker))
    labels = {reader: "reader", admin: "administrator", worker: "worker"}
    check_golden("privileges", privileges(db, labels), renew)
