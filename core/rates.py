"""Limits of rate as an operator writes them: `3/minute`, and what RATE_LIMITS says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_AMOUNT = 1_000_000
UNIT_SECONDS: Mapping[str, int] = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}
_RATE = re.compile(r"([0-9]{1,7})\s*/\s*(second|minute|min|hour|day)s?", re.IGNORECASE)
_ROUTE = re.compile(r"(GET|POST|PUT|PATCH|DELETE)\s+(/\S*)", re.IGNORECASE)
_PARAMETER = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `amount` in any `seconds` in a row."""

    amount: int
    seconds: int

    def __str__(self) -> str:
        """In words: `3 requests per minute`."""
        unit = next((name for name, seconds in UNIT_SECONDS.items() if seconds == self.seconds), None)
        return f"{self.amount} request{'s' * (self.amount != 1)} per {unit or f'{self.seconds} seconds'}"


@dataclass(frozen=True, slots=True)
class RouteRate:
    """One entry of RATE_LIMITS, as it was written."""

    method: str
    path: str
    rate: Rate

    @property
    def route(self) -> tuple[str, str]:
        return self.method, nameless(self.path)


def nameless(path: str) -> str:
    """A template without the names of its parameters, which do not tell two routes apart."""
    return _PARAMETER.sub("{}", path)


def parse_rate(text: str) -> Rate:
    """Raises ValueError with what was expected."""
    match = _RATE.fullmatch(text.strip())
    if match is None or not 1 <= int(match[1]) <= MAX_AMOUNT:
        raise ValueError(f"expected a rate such as 3/minute (second, minute, hour or day), got {text.strip()!r}")
    unit = match[2].lower()
    return Rate(int(match[1]), UNIT_SECONDS["minute" if unit == "min" else unit])


def parse_rate_limits(text: str) -> tuple[bool, tuple[RouteRate, ...]]:
    """Whether there are limits at all, and those of single routes. Raises ValueError with what was expected.

    Whether the routes exist, only the table of routes knows.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    switches = [part.lower() for part in parts if part.lower() in ("on", "off")]
    found = tuple(_entry(part) for part in parts if part.lower() not in ("on", "off"))
    if "off" in switches and len(parts) > 1:
        raise ValueError("expected off alone, or limits without it")
    if len({each.route for each in found}) < len(found):
        raise ValueError("expected each route once")
    return "off" not in switches, found


def _entry(text: str) -> RouteRate:
    route, equals, rate = text.rpartition("=")
    match = _ROUTE.fullmatch(route.strip())
    if not equals or match is None:
        raise ValueError(
            f"expected on, off, or entries such as POST /users=3/minute parted by semicolons, got {text!r}"
        )
    return RouteRate(match[1].upper(), match[2], parse_rate(rate))
