"""A database for the page, whose roles log in with passwords, and browsers without JavaScript."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
import pytest
from PIL import Image
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from starlette.testclient import TestClient

from pg_siamese.explore.app import Settings, create_app
from pg_siamese.explore.sessions import Sessions
from tests import dicom_files, server
from tests.conftest import Connection, Pictures, copied_database, make_template
from tests.server import ExternalServer
from tools.cluster import Cluster

PORT = 8765
ORIGIN = f"http://127.0.0.1:{PORT}"
ROWS = 40
# A name that would do harm where it is not escaped.
EVIL = "<script>alert(1)</script>"
EVIL_VALUE = '"><img src=x onerror=alert(1)>'
HTML = b"<html><body><script>alert(1)</script></body></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
# Rows that are no pictures to search for.
DICOM, DEEP, SVG_ROW, HTML_ROW, HUGE = 1001, 1002, 1003, 1004, 1005
PASSWORD = "not a secret: it is for a test"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster | ExternalServer]:
    """A throw-away cluster that wants passwords, or the server that the environment names."""
    if server.DSN:
        yield ExternalServer()
        return
    with Cluster.temporary() as running:
        rules = "local all postgres trust\nlocal all all scram-sha-256\n"
        (running.data / "pg_hba.conf").write_text(rules)
        with psycopg.connect(running.dsn("postgres"), autocommit=True) as admin:
            admin.execute("SELECT pg_reload_conf()")
        yield running


@pytest.fixture(scope="session")
def template(cluster: Cluster | ExternalServer, onnx: bytes) -> str:
    """Name of a database to copy, of this cluster and not of the one of other tests."""
    return make_template(cluster, onnx)


@dataclass
class Ward:
    """Database with collection ``scans``, of which two roles see half of the rows each.

    Attributes:
        dsn: of the superuser.
        db: a connection of the superuser.
        password: of every role.
    """

    dsn: str
    db: Connection
    password: str

    def role(self, name: str, *grants: str) -> str:
        """Make a login role with these grants, unless it is there."""
        known = self.db.execute("SELECT FROM pg_roles WHERE rolname = %s", (name,)).fetchone()
        if known is None:
            create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
            self.db.execute(create.format(sql.Identifier(name), sql.Literal(self.password)))
        for grant in grants:
            self.db.execute(sql.SQL(grant).format(sql.Identifier(name)))
        return name


def deep_png() -> bytes:
    """A picture of 16 bits per sample."""
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)).save(
        file, "PNG"
    )
    return file.getvalue()


def huge_png() -> bytes:
    """The head of a picture of 50,000 x 50,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (16, 16)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    # The checksum of the head.
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture(scope="module")
def ward(cluster: Cluster | ExternalServer, template: str, pictures: Pictures) -> Iterator[Ward]:
    """Collection ``scans`` of a table with row-level security."""
    with copied_database(cluster, template) as dsn, psycopg.connect(dsn, autocommit=True) as db:
        password = str(conninfo_to_dict(server.DSN).get("password") or PASSWORD)
        found = Ward(dsn, db, password)
        db.execute(
            sql.SQL(
                "CREATE TABLE public.scans (id bigint PRIMARY KEY, image bytea, label text,"
                " patient text, taken date, score real, ward text, {} text, data jsonb,"
                " hidden text)"
            ).format(sql.Identifier(EVIL))
        )
        db.execute(
            "SELECT siamese.create_collection('scans', 'public.scans', on_error => 'quarantine',"
            " group_column => 'patient')"
        )
        for number in range(ROWS):
            db.execute(
                "INSERT INTO scans VALUES (%s, %s, %s, %s, %s, %s, %s, %s, '{}', 'secret')",
                (
                    number,
                    pictures.files[number],
                    None if number == 3 else pictures.labels[number],
                    f"p{number // 2}",
                    f"2024-01-{number % 28 + 1:02}",
                    number / 4,
                    "alice" if number % 2 else "bob",
                    EVIL_VALUE if number == 1 else "=1+1",
                ),
            )
        stack = np.arange(3 * 32 * 32, dtype=np.uint16).reshape(3, 32, 32)
        others = {
            DICOM: dicom_files.frames(
                stack, PatientName="Doe^Jane", Modality="CT", BitsStored=12, NumberOfFrames=3
            ),
            DEEP: deep_png(),
            SVG_ROW: SVG,
            HTML_ROW: HTML,
            HUGE: huge_png(),
        }
        for key, image in others.items():
            values = (key, image, "odd", "odd", "alice")
            db.execute(
                "INSERT INTO scans (id, image, label, patient, ward) VALUES (%s, %s, %s, %s, %s)",
                values,
            )
        db.execute("SELECT siamese.build_index('scans')")
        db.execute("ALTER TABLE scans ENABLE ROW LEVEL SECURITY")
        db.execute("CREATE POLICY own ON scans FOR SELECT USING (ward = current_user)")
        for name in ("alice", "bob"):
            found.role(name, "SELECT siamese.grant_usage({}::text)".replace("{}", f"'{name}'"))
            db.execute(
                sql.SQL(
                    "GRANT SELECT (id, image, label, patient, taken, score, ward, {}, data)"
                    " ON scans TO {}"
                ).format(sql.Identifier(EVIL), sql.Identifier(name))
            )
        yield found


Open = Callable[..., TestClient]


@pytest.fixture
def browse(ward: Ward) -> Iterator[Open]:
    """Open pages with a session: of the superuser by a link, or of a role by the form."""
    opened: list[TestClient] = []

    def open_page(
        role: str | None = None, *, write: bool = False, sessions: Sessions | None = None
    ) -> TestClient:
        tokens: list[str] = []
        app = create_app(
            Settings(dsn=ward.dsn, form=role is not None, write=write, announce=tokens.append),
            sessions,
        )
        app.state.seconds_per_failure = 0.0
        client = TestClient(app, base_url=ORIGIN, follow_redirects=False)
        client.__enter__()
        opened.append(client)
        if role is None:
            assert client.get("/start", params={"token": tokens[0]}).status_code == 200
        else:
            assert log_in(client, role, ward.password).status_code == 303
        return client

    yield open_page
    for client in opened:
        client.__exit__(None, None, None)


def log_in(client: TestClient, role: str, password: str) -> Any:
    """Send the form of a login."""
    page = client.get("/login").text
    # Not that of the button to log out, if there is a session.
    token = hidden(page[page.index("<main") :], "csrf")
    form = {"csrf": token, "role": role, "password": password}
    return client.post("/login", data=form)


def hidden(page: str, name: str) -> str:
    """Return the value of the first hidden field of a name."""
    start = page.index(f'name="{name}" value="') + len(f'name="{name}" value="')
    return page[start : page.index('"', start)]
