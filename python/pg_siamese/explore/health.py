"""The state of the collections, what to do about it, and work in the background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg import sql
from psycopg.rows import dict_row
from starlette.responses import RedirectResponse, Response

from pg_siamese.explore import jobs
from pg_siamese.explore.failures import PageError
from pg_siamese.explore.jobs import Job
from pg_siamese.explore.sessions import Connection
from pg_siamese.explore.visits import Visit

# Searches slow down as these accumulate: see docs/operations.md.
MANY_PENDING, MUCH_DEAD = 20_000, 0.2
_MAY = """
    SELECT pg_catalog.has_function_privilege(f.sign::pg_catalog.regproc::oid, 'EXECUTE')
    FROM (VALUES (1, 'siamese.build_index'), (2, 'siamese.self_check')) AS f (place, sign)
    ORDER BY f.place
"""
Row = Mapping[str, Any]


def health(visit: Visit) -> Response:
    """Show the state of everything that the role may see."""
    connection = visit.connection
    (may_build,), (may_check,) = connection.execute(_MAY).fetchall()
    states = _rows(connection, "collection_status")
    return visit.render(
        "health.html",
        states=states,
        advice={row["collection"]: _advice(row) for row in states},
        work=_rows(connection, "progress"),
        generations=_rows(connection, "index_generations") if may_check else None,
        queues=_rows(connection, "embedding_queue_status") if may_check else None,
        failures=_rows(connection, "embedding_failures", 100) if may_check else None,
        checks=_checks(connection) if may_check else None,
        may_build=may_build and visit.may_write,
        jobs=[job for job in visit.session.jobs.values() if job.back == "/health"],
    )


def build(visit: Visit) -> Response:
    """Begin the build of an index."""
    if not visit.may_write:
        raise PageError(403, "The page was started without --write, so nothing can be changed.")
    name = visit.table().name
    started = jobs.start(
        visit.session,
        f"Building the index of {name}",
        "/health",
        lambda connection: _build(connection, name),
        writes=True,
    )
    return RedirectResponse(f"/job?id={started.name}", 303)


def job(visit: Visit) -> Response:
    """Show how far some work is."""
    found = _job(visit, visit.parameter("id"))
    is_part = "hx-request" in visit.request.headers
    if found.state != "done":
        return visit.render("_job.html" if is_part else "job.html", job=found)
    if is_part:
        return Response(headers={"HX-Redirect": found.back})
    return RedirectResponse(found.back, 303)


def cancel(visit: Visit) -> Response:
    """Stop some work."""
    found = _job(visit, visit.form.get("id", ""))
    found.cancel()
    return RedirectResponse(f"/job?id={found.name}", 303)


def _job(visit: Visit, name: str) -> Job:
    found = visit.session.jobs.get(name)
    if not isinstance(found, Job):
        raise PageError(404, "There is no such work.")
    return found


def _build(connection: Connection, name: str) -> int:
    row = connection.execute("SELECT siamese.build_index(%s)", (name,)).fetchone()
    return int(row[0]) if row else 0


def _rows(connection: Connection, view: str, most: int = 1000) -> list[Row]:
    statement = sql.SQL("SELECT * FROM siamese.{} ORDER BY collection LIMIT {}")
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(statement.format(sql.Identifier(view), sql.Literal(most)))
        return [*cursor.fetchall()]


def _checks(connection: Connection) -> Sequence[Row]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM siamese.self_check() ORDER BY ok, subject").fetchall()


def _advice(row: Row) -> list[str]:
    """Return what to do about a collection."""
    found = []
    if row["generation"] is None and row["rows_embedded"]:
        found.append("It has no index yet. Build one, and searches get faster.")
    elif row["generation"] is not None and row["generation_file"] != "present":
        file = f"The index file is {row['generation_file']}, so searches read every vector."
        found.append(f"{file} Call rebuild_file or build_index.")
    if (row["pending"] or 0) >= MANY_PENDING or (row["dead_share"] or 0) >= MUCH_DEAD:
        found.append("Many vectors are pending or dead. Build the index again.")
    if row["waiting"]:
        found.append(f"{row['waiting']:,} rows wait. Start pg_siamese worker.")
    if row["failures"]:
        found.append(f"{row['failures']:,} rows could not be embedded. Replace their images.")
    return found
