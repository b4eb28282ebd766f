"""Times and dates as text of fixed width, so that they sort and compare alike in Python, SQL and JSON.

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
    """An aware time as text."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def utc_now() -> str:
    return utc_text(datetime.now(UTC))


def parse_date(text: str) -> str | None:
    """The text itself if it is a day of the calendar written `YYYY-MM-DD`, else None."""
    try:
        return text if _DATE.match(text) and date.fromisoformat(text) else None
    except ValueError:
        return None


def parse_time(text: str) -> str | None:
    """An RFC 3339 time as `utc_text`, or None. A space for the plus is a query string nobody quoted."""
    match = _TIME.match(text)
    if not match:
        return None
    day, clock, fraction, zone = match.groups()
    zone = "+00:00" if zone in "Zz" else zone.replace(" ", "+")
    try:
        return utc_text(datetime.fromisoformat(f"{day}T{clock}.{(fraction or '0')[:6].ljust(6, '0')}{zone}"))
    except (ValueError, OverflowError):
        return None
