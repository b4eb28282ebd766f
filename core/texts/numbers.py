"""Numbers in filters: in a query, they are strings of digits; in JSON, they are numbers."""

from __future__ import annotations

import re
from typing import Any

MAX_INTEGER = 2**63 - 1  # The maximum value of SQL's BIGINT.
MAX_DECIMAL = 10**15  # A double still represents every tenth up to this number.
MAX_DECIMAL_LENGTH = 100  # longer than any number that a program writes
_INTEGER = re.compile(r"^-?[0-9]{1,19}\Z")
_DECIMAL = re.compile(r"^-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?\Z")


def integer(raw: Any) -> int | None:
    """Return the integer, or None unless `raw` is an integer of at most MAX_INTEGER, or a string of its digits."""
    if isinstance(raw, str) and _INTEGER.match(raw):
        raw = int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) <= MAX_INTEGER:
        return raw
    return None


def decimal(raw: Any) -> float | None:
    """Return the number as a double, or None unless `raw` is a number of at most MAX_DECIMAL, or a string that writes
    one as JSON does.
    """
    if isinstance(raw, str) and len(raw) <= MAX_DECIMAL_LENGTH and _DECIMAL.match(raw):
        raw = float(raw)
    if isinstance(raw, int | float) and not isinstance(raw, bool) and abs(raw) <= MAX_DECIMAL:
        return float(raw) + 0.0  # turns -0.0 into 0.0, so that equal filters are equal in every form
    return None
