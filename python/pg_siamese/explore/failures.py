"""Failures as a visitor of the page may see them: a status, a sentence, and what to do."""

from __future__ import annotations

import logging
import secrets

import psycopg

from pg_siamese.client.connection import CommandError, one_line
from pg_siamese_server.errors import SiameseError

LOGGER = logging.getLogger("pg_siamese.explore")
# How SQLSTATEs begin whose messages are about what the visitor asked for: values, limits, features.
_OF_THE_REQUEST = ("0A", "22", "42704", "54", "55", "P0002")
_NAMED = {
    "25006": (403, "The page was started without --write, so nothing can be changed."),
    "40001": (409, "The data changed meanwhile. Try again."),
    "42501": (403, "Your role has no permission for this."),
    "42703": (410, "A column no longer exists, or your role has no permission for it."),
    "42883": (403, "This database has another version of pg_siamese."),
    "42P01": (410, "This table no longer exists, or your role has no permission for it."),
    "3F000": (403, "Your role has no permission for pg_siamese."),
    "57014": (504, "The database took too long. Choose stricter filters, or fewer rows."),
    "57P01": (503, "The database has ended the connection. Try again."),
}


class PageError(Exception):
    """What the page shows instead of an answer.

    Attributes:
        status: of HTTP.
        message: one sentence.
        hint: what to do, or nothing.
    """

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.hint = hint


def explain(error: Exception) -> PageError:
    """Return what to show for an error. The log has the rest, under a number that is shown."""
    if isinstance(error, PageError):
        return error
    if isinstance(error, CommandError):
        return PageError(400, _sentence(str(error)))
    if isinstance(error, SiameseError):
        hint = " ".join(filter(None, (error.detail, error.hint)))
        return PageError(400, _sentence(error.message), hint)
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        status, message = _NAMED.get(error.sqlstate, (500, ""))
        if message:
            return PageError(status, message)
        if error.sqlstate.startswith(_OF_THE_REQUEST):
            given = filter(None, (error.diag.message_detail, error.diag.message_hint))
            hint = " ".join(map(one_line, given))
            return PageError(400, _sentence(error.diag.message_primary or ""), hint)
    elif isinstance(error, psycopg.DataError):
        return PageError(400, "A value has a character that the database does not accept.")
    elif isinstance(error, psycopg.OperationalError):
        return PageError(503, "The connection to the database was lost. Try again.")
    number = secrets.token_hex(4)
    LOGGER.error("error %s", number, exc_info=error)
    return PageError(500, "Something went wrong.", f"The log of the command has error {number}.")


def whole_number(name: str, text: str, least: int, most: int) -> int:
    """Read a number of an address. Raises ``PageError``."""
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and least <= int(text) <= most):
        raise PageError(400, f"{name} is not a whole number from {least} to {most}.")
    return int(text)


def _sentence(text: str) -> str:
    text = one_line(text)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
