"""A statement in the drivers' own words, for the hot paths."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statement:
    """One text for each database; values are given by position."""

    sqlite: str
    postgresql: str


def statement(text: str) -> Statement:
    """From a text with `$1`, `$2`, … each once and in order, and the casts that PostgreSQL wants (`$1::bigint`)."""
    return Statement(re.sub(r"\$[0-9]+(::[a-z]+)*", "?", text), text)
