"""Times and dates as strings of fixed width, so that they sort and compare the same way in Python, SQL and JSON.

A time is RFC 3339 in UTC with microseconds, `YYYY-MM-DDTHH:MM:SS.ffffffZ`; a date is `YYYY-MM-DD`.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

_DATE = re.compile(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", re.ASCII)
_TIME = re.compile(
    r"^([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?([Zz]|[+ -][0-9]{2}:[0-9]{2})\Z"
)


def utc_text(moment: datetime) -> str:
    """Return an aware datetime as a string such as 1999-12-31T23:59:59.000000Z."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def utc_now() -> str:
    return utc_text(datetime.now(UTC))


def parse_date(text: str) -> str | None:
    """Return `text` itself if it is a calendar date written as `YYYY-MM-DD`, else None."""
    try:
        return text if _DATE.match(text) and date.fromisoformat(text) else None
    except ValueError:
        return None


def parse_time(text: str) -> str | None:
    """Return an RFC 3339 time in the format of `utc_text`, or None if it is invalid.

    A space in place of the plus sign is accepted: an unquoted `+` in a query string decodes to a space.
    """
    match = _TIME.match(text)
    if not match:
        return None
    day, clock, fraction, zone = match.groups()
    zone = "+00:00" if zone in "Zz" else zone.replace(" ", "+")
    try:
        return utc_text(datetime.fromisoformat(f"{day}T{clock}.{(fraction or '0')[:6].ljust(6, '0')}{zone}"))
    except (ValueError, OverflowError):
        return None
