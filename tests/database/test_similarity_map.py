"""PNG files that show which parts of an image make it similar to another one."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import psycopg
import pytest
from PIL import Image

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database import test_frames
from tests.database.tables import make_collection, register_grid
from tests.support import Array, encode, one, sql_error


def shown(db: Connection, arguments: str, *values: Any) -> Array:
    file = one(db, f"SELECT siamese.similarity_map({arguments})", *values)
    image = Image.open(io.BytesIO(file))
    assert image.format == "PNG" and image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["bigint", "text", "uuid"])
def test_by_image_and_by_key(db: Connection, pictures: Pictures, kind: str) -> None:
    """The same picture, however the two are given."""
    make_collection(db, "scans", kind)
    keys = [
        {"bigint": f"{n}", "text": f"it's {n}", "uuid": f"0A000000-0000-4000-8000-00000000000{n}"}[
            kind
        ]
        for n in range(2)
    ]
    for key, file in zip(keys, pictures.files, strict=False):
        db.execute(f"INSERT INTO public.scans VALUES (%s::text::{kind}, %s)", (key, file))
    a, b = pictures.files[:2]
    wanted = shown(db, "%s, %s, masks => 20", a, b)
    assert wanted.shape[0] > wanted.shape[1] == 512
    for arguments, *values in (
        ("image_id => %s, neighbour_id => %s", *keys),
        ("%s, neighbour_id => %s", a, keys[1]),
        ("neighbour => %s, image_id => %s", b, keys[0]),
    ):
        found = shown(db, f"{arguments}, collection => 'scans', masks => 20", *values)
        assert np.array_equal(found, wanted)
    other = shown(db, "%s, %s, masks => 20", b, a)
    assert not np.array_equal(other, wanted)


def test_the_part_that_is_shared_is_hot(db: Connection) -> None:
    """The encoder gives the mean of each block of pixels, so that the place is known."""
    register_grid(db)
    query, neighbour = np.full((28, 28), 90, np.uint8), np.full((28, 28), 90, np.uint8)
    query[14:21, 7:14] = neighbour[14:21, 7:14] = 255
    arguments = "%s, %s, model => 'grid', legend => false, side => 280, masks => 500"
    found = shown(db, arguments, encode(query), encode(neighbour)).astype(int)
    assert found.shape == (280, 280, 3)
    colour = found.max(axis=2) - found.min(axis=2)
    assert colour[155:195, 85:125].mean() > 2 * colour[:, 210:].mean()


def test_options(db: Connection, pictures: Pictures) -> None:
    a, b = pictures.files[:2]
    plain = shown(db, "%s, %s, masks => 20, legend => false, side => 100", a, b)
    assert plain.shape == (100, 100, 3)
    below = shown(db, "%s, %s, masks => 20, side => 100", a, b)
    assert below.shape[0] > 100 and np.array_equal(below[:100], plain)
    finer = shown(db, "%s, %s, masks => 80, legend => false, side => 100", a, b)
    assert not np.array_equal(finer, plain)
    wide = encode(np.repeat(pictures.pixels[0], 3, axis=1))
    assert shown(db, "%s, %s, masks => 20, legend => false", wide, b).shape == (171, 512, 3)


def test_one_frame(db: Connection) -> None:
    make_collection(db, "scans", "bigint", frames="all")
    file = test_frames.file(1, 3)
    db.execute("INSERT INTO public.scans VALUES (1, %s)", (file,))
    call = "image_id => 1, neighbour => %s, collection => 'scans', masks => 20, query_frame => {}"
    first, last = (shown(db, call.format(frame), file) for frame in (1, 3))
    assert not np.array_equal(first, last)
    nearer = shown(db, call.format(3) + ", neighbour_frame => 3", file)
    assert not np.array_equal(nearer, last)
    with sql_error("22023", "frame 4"):
        shown(db, call.format(4), file)


@pytest.mark.law(4)
def test_rows_that_the_caller_may_not_see(
    db: Connection, pictures: Pictures, connect: Connect, new_role: NewRole
) -> None:
    """They are as rows that do not exist."""
    make_collection(db, "scans")
    with db.cursor() as cursor:
        rows = list(enumerate(pictures.files[:4]))
        cursor.executemany("INSERT INTO public.scans VALUES (%s, %s)", rows)
    role = new_role()
    db.execute(f"SELECT grant_usage('{role}')")
    db.execute(f"GRANT SELECT ON scans TO {role}")
    db.execute("ALTER TABLE scans ENABLE ROW LEVEL SECURITY")
    db.execute(f"CREATE POLICY seen ON scans TO {role} USING (id < 2)")
    reader = connect(user=role)
    pair = "image_id => {}, neighbour_id => {}"
    call = f"SELECT siamese.similarity_map({pair}, collection => 'scans')"
    assert one(reader, call.format(0, 1)).startswith(b"\x89PNG")
    for ids, missing in (((0, 2), 2), ((3, 1), 3), ((0, 9), 9)):
        with sql_error("P0002", f'image {missing} is not in collection "scans"', "not visible"):
            reader.execute(call.format(*ids))


def test_limits_of_the_collection(db: Connection, pictures: Pictures) -> None:
    make_collection(db, "scans", max_pixels=500)
    arguments = "%s, %s, masks => 20"
    with sql_error("54000", "28 x 28"):
        shown(db, f"{arguments}, collection => 'scans'", *pictures.files[:2])
    shown(db, f"{arguments}, model => 'medical'", *pictures.files[:2])


@pytest.mark.law(5)
def test_it_stops(db: Connection, pictures: Pictures) -> None:
    db.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        shown(db, "%s, %s, masks => 5000", *pictures.files[:2])
    db.execute("RESET statement_timeout")
    assert shown(db, "%s, %s, masks => 20", *pictures.files[:2]).any()


def test_refused(db: Connection, pictures: Pictures) -> None:
    a, b = pictures.files[:2]
    for given, *error in (
        ("masks => 19", "22023", "masks must be between 20 and 5000"),
        ("masks => 5001", "22023", "masks must be between 20 and 5000"),
        ("side => 63", "22023", "side must be between 64 and 1024"),
        ("side => 1025", "22023", "side must be between 64 and 1024"),
        ("collection => 'scans'", "42704", 'collection "scans" does not exist'),
        ("model => 'other'", "42704", 'model "other" does not exist'),
    ):
        with sql_error(*error):
            shown(db, f"%s, %s, {given}", a, b)
    with sql_error("22P03", "image cannot be decoded"):
        shown(db, "%s, %s", a, b"no image")
    with sql_error("22P02", '"a"'):
        shown(db, "%s, neighbour_id => 'a'", a)
    make_collection(db, "scans")
    db.execute("INSERT INTO public.scans VALUES (1, NULL)")
    with sql_error("22004", "image is null"):
        shown(db, "%s, neighbour_id => 1, collection => 'scans'", a)
