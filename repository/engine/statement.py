"""SQL text for both drivers, for the hot paths that bypass SQLAlchemy."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statement:
    """The SQL text for each database; values are passed by position."""

    sqlite: str
    postgresql: str


def statement(text: str) -> Statement:
    """Return the statement for SQL text with parameters `$1`, `$2`, and so on.

    Each parameter must appear once and in order, with a cast where PostgreSQL requires one.
    """
    return Statement(re.sub(r"\$[0-9]+(::[a-z]+)*", "?", text), text)
