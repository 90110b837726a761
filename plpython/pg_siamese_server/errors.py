"""Errors that carry what a PostgreSQL report needs: message, SQLSTATE, DETAIL and HINT."""

from __future__ import annotations

import errno
import re

INVALID_PARAMETER_VALUE = "22023"
NULL_VALUE_NOT_ALLOWED = "22004"
INVALID_BINARY_REPRESENTATION = "22P03"
UNDEFINED_OBJECT = "42704"
UNDEFINED_COLUMN = "42703"
DUPLICATE_OBJECT = "42710"
OBJECT_NOT_IN_PREREQUISITE_STATE = "55000"
FEATURE_NOT_SUPPORTED = "0A000"
PROGRAM_LIMIT_EXCEEDED = "54000"
READ_ONLY_SQL_TRANSACTION = "25006"
NO_DATA_FOUND = "P0002"
DATA_CORRUPTED = "XX001"
DISK_FULL = "53100"
INSUFFICIENT_PRIVILEGE = "42501"
UNDEFINED_FILE = "58P01"
IO_ERROR = "58030"
UNDEFINED_FUNCTION = "42883"
OUT_OF_MEMORY = "53200"
# A cancelled statement, a terminated session.
CANCELLED = ("57014", "57P01")

# Texts may quote a file. This is what PostgreSQL's text cannot hold.
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")


class SiameseError(Exception):
    """An error to report to the client as it is.

    Attributes:
        message: primary message, lower case, without a full stop.
        sqlstate: five-character SQLSTATE.
        detail, hint: further sentences, or None.
    """

    sqlstate = INVALID_PARAMETER_VALUE

    def __init__(
        self,
        message: str,
        *,
        sqlstate: str | None = None,
        detail: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = _NO_TEXT.sub("?", message)
        super().__init__(self.message)
        self.sqlstate = sqlstate or type(self).sqlstate
        self.detail = detail and _NO_TEXT.sub("?", detail)
        self.hint = hint


class ImageError(SiameseError):
    """One image can't be decoded or embedded. Other rows are not affected."""

    sqlstate = INVALID_BINARY_REPRESENTATION


def check_bytes(size: int, max_bytes: int) -> None:
    """Refuse an image file over a limit of bytes. Raises ``ImageError``."""
    if size > max_bytes:
        raise ImageError(
            f"image file of {size} bytes is too large",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The limit is {max_bytes} bytes.",
            hint="Raise max_bytes with alter_collection, or reduce the image.",
        )


class ImageSizeError(ImageError):
    """An image over a collection's limit of pixels."""

    sqlstate = PROGRAM_LIMIT_EXCEEDED

    def __init__(self, message: str, max_pixels: int, max_side: int) -> None:
        super().__init__(
            message,
            detail=f"The limit is {max_pixels} pixels, {max_side} on a side.",
            hint="Raise max_pixels with alter_collection, or reduce the image.",
        )


class ModelError(SiameseError):
    """An ONNX file that can't serve as an encoder."""


class IndexFileError(SiameseError):
    """An index file that is missing, damaged, or not the one that the catalog names."""

    sqlstate = OBJECT_NOT_IN_PREREQUISITE_STATE


MAKE_ROOM = "Make room in the data directory, then call build_index again."
CHANGE_OWNER = (
    "Give the directory pg_siamese in the data directory, with all that is in it, to the server's"
    " user (chown -R, chmod -R u+rwX), then call build_index again."
)
MOUNT = "Mount what the link leads to, or remove the link, then call build_index again."
# As PostgreSQL's own errcode_for_file_access does.
FILE_ERRORS = {
    errno.ENOSPC: (DISK_FULL, MAKE_ROOM),
    errno.EDQUOT: (DISK_FULL, MAKE_ROOM),
    errno.EACCES: (INSUFFICIENT_PRIVILEGE, CHANGE_OWNER),
    errno.EPERM: (INSUFFICIENT_PRIVILEGE, CHANGE_OWNER),
    errno.EROFS: (INSUFFICIENT_PRIVILEGE, CHANGE_OWNER),
    errno.ENOENT: (UNDEFINED_FILE, MOUNT),
}


def is_database_error(error: Exception) -> bool:
    """Whether an error is PostgreSQL's, such as a cancel, and must pass untouched."""
    return hasattr(error, "sqlstate") or type(error).__module__ in ("plpy", "plpy.spiexceptions")


def counted(number: int, thing: str) -> str:
    """Return a number with what it counts, such as "1 row" or "2,000 rows"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def file_error(error: OSError) -> SiameseError:
    """Return the error of an index file that can't be written. Nothing else writes files."""
    sqlstate, hint = FILE_ERRORS.get(error.errno or 0, (IO_ERROR, None))
    return SiameseError(
        f'could not write index file "{error.filename or ""}": {error.strerror}',
        sqlstate=sqlstate,
        detail="No table is affected, and searches go on without the file.",
        hint=hint,
    )


def package_error(error: ImportError) -> SiameseError:
    """Return the error of a package that is missing or broken in the server's environment."""
    return SiameseError(
        f'Python package "{error.name or "unknown"}" cannot be imported by the server',
        sqlstate=UNDEFINED_FILE,
        detail=f"{error}.",
        hint="Install the server's Python environment anew (make install), then start a new"
        " session; self_check() lists the packages.",
    )
