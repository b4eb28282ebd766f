"""Rate limits as operators write them: a rate such as `3/minute`, and the setting RATE_LIMITS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import got

MAX_AMOUNT = 1_000_000
UNIT_SECONDS: Mapping[str, int] = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}
_RATE = re.compile(r"([0-9]{1,7})\s*/\s*(second|minute|min|hour|day)s?", re.IGNORECASE)
_ROUTE = re.compile(r"(GET|POST|PUT|PATCH|DELETE)\s+(/\S*)", re.IGNORECASE)
_PARAMETER = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `amount` requests in any interval of `seconds`."""

    amount: int
    seconds: int

    def __str__(self) -> str:
        """Return the rate in words, such as `3 requests per minute`."""
        unit = next((name for name, seconds in UNIT_SECONDS.items() if seconds == self.seconds), None)
        return f"{self.amount} request{'s' * (self.amount != 1)} per {unit or f'{self.seconds} seconds'}"


@dataclass(frozen=True, slots=True)
class RouteRate:
    """One entry of RATE_LIMITS. `path` is the path as written in the setting."""

    method: str
    path: str
    rate: Rate

    @property
    def route(self) -> tuple[str, str]:
        return self.method, nameless(self.path)


@dataclass(frozen=True, slots=True)
class RateLimits:
    """The setting RATE_LIMITS: whether clients are limited at all, and the limits for individual routes."""

    is_on: bool
    routes: tuple[RouteRate, ...]


def nameless(path: str) -> str:
    """Return a path template without its parameter names, because these names do not distinguish routes."""
    return _PARAMETER.sub("{}", path)


def parse_rate(text: str) -> Rate:
    """Parse a rate such as `3/minute`. Raises ValueError, whose message states what was expected."""
    match = _RATE.fullmatch(text.strip())
    if match is None or not 1 <= int(match[1]) <= MAX_AMOUNT:
        raise ValueError(f"expected a rate such as 3/minute (second, minute, hour or day){got(text.strip())}")
    unit = match[2].lower()
    return Rate(int(match[1]), UNIT_SECONDS["minute" if unit == "min" else unit])


def parse_rate_limits(text: str) -> RateLimits:
    """Parse the setting RATE_LIMITS, without checking whether its routes exist. Raises ValueError."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    switches = [part.lower() for part in parts if part.lower() in ("on", "off")]
    found = tuple(_entry(part) for part in parts if part.lower() not in ("on", "off"))
    if "off" in switches and len(parts) > 1:
        raise ValueError("expected either off or limits for routes, not both")
    if len({each.route for each in found}) < len(found):
        raise ValueError("expected each route at most once")
    return RateLimits("off" not in switches, found)


def _entry(text: str) -> RouteRate:
    route, equals, rate = text.rpartition("=")
    match = _ROUTE.fullmatch(route.strip())
    if not equals or match is None:
        raise ValueError(
            f"expected on, off, or entries such as POST /users=3/minute separated by semicolons{got(text)}"
        )
    return RouteRate(match[1].upper(), match[2], parse_rate(rate))
