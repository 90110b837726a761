"""Errors that carry what a PostgreSQL report needs: message, SQLSTATE, DETAIL and HINT."""

from __future__ import annotations

INVALID_PARAMETER_VALUE = "22023"
NULL_VALUE_NOT_ALLOWED = "22004"
INVALID_BINARY_REPRESENTATION = "22P03"
DATA_EXCEPTION = "22000"
UNDEFINED_OBJECT = "42704"
UNDEFINED_COLUMN = "42703"
DUPLICATE_OBJECT = "42710"
OBJECT_IN_USE = "55006"
OBJECT_NOT_IN_PREREQUISITE_STATE = "55000"
FEATURE_NOT_SUPPORTED = "0A000"
PROGRAM_LIMIT_EXCEEDED = "54000"
READ_ONLY_SQL_TRANSACTION = "25006"
NO_DATA_FOUND = "P0002"
DATA_CORRUPTED = "XX001"


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
        super().__init__(message)
        self.message = message
        self.sqlstate = sqlstate or type(self).sqlstate
        self.detail = detail
        self.hint = hint


class ImageError(SiameseError):
    """One image can't be decoded or embedded; other rows are not concerned."""

    sqlstate = INVALID_BINARY_REPRESENTATION


class ModelError(SiameseError):
    """An ONNX file that can't serve as an encoder."""


class IndexFileError(SiameseError):
    """A FAISS generation that is missing, torn, or not the one that the catalog names."""

    sqlstate = OBJECT_NOT_IN_PREREQUISITE_STATE
