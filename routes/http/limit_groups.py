"""Rate limits of routes: the groups that are counted together, and the rule of each route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import structlog
from starlette.requests import Request

from core import metrics, scope_keys
from core.errors import SettingsError, TooManyRequests
from core.identity import Identity
from core.network.addresses import network_of
from core.rates import Rate, RateLimits, nameless
from services.limits.limiter import Limits, Outcome


class LimitGroup(StrEnum):
    """Routes that share one limit."""

    READ = "read"
    WRITE = "write"
    BULK = "bulk"
    UPLOAD = "upload"
    SIGN_IN = "sign_in"
    REGISTER = "register"
    MAIL = "mail"
    UNLIMITED = "unlimited"  # for routes that machines poll or that pages load


MINUTE = 60
log = structlog.get_logger("limits")
RATES: Mapping[LimitGroup, Rate] = {
    LimitGroup.READ: Rate(6_000, MINUTE),
    LimitGroup.WRITE: Rate(1_200, MINUTE),
    LimitGroup.BULK: Rate(120, MINUTE),
    LimitGroup.UPLOAD: Rate(30, MINUTE),
    LimitGroup.SIGN_IN: Rate(60, MINUTE),
    LimitGroup.REGISTER: Rate(20, MINUTE),
    LimitGroup.MAIL: Rate(10, MINUTE),
}
# Counted by address even with a token: a client with many accounts is still one client.
BY_ADDRESS = frozenset({LimitGroup.SIGN_IN, LimitGroup.REGISTER, LimitGroup.MAIL})


@dataclass(frozen=True, slots=True)
class Rule:
    """The rate limit of a route. `name` is the route's group, or the route itself when it has its own limit."""

    name: str
    rate: Rate
    by_address: bool


Rules = Mapping[tuple[str, str], Rule]


def rules(groups: Mapping[tuple[str, str], LimitGroup], limits: RateLimits) -> Rules:
    """Return the rule of each (method, path) that has one. Raises SettingsError for unknown routes in `limits`."""
    if not limits.is_on:
        return {}
    known = {(method, nameless(path)) for method, path in groups}
    for each in limits.routes:
        if each.route not in known:
            raise SettingsError(f"RATE_LIMITS: there is no route {each.method} {each.path}.")
    rates = {each.route: each.rate for each in limits.routes}
    found = {}
    for (method, path), group in groups.items():
        by_address = group in BY_ADDRESS
        if (rate := rates.get((method, nameless(path)))) is not None:
            found[method, path] = Rule(f"{method} {path}", rate, by_address)
        elif group in RATES:
            found[method, path] = Rule(group.value, RATES[group], by_address)
    return found


async def count(request: Request, limits: Limits, rule: Rule | None, identity: Identity | None) -> None:
    """Count a request for its user, or for its address if there is no identity or the rule says so.

    Raises TooManyRequests.
    """
    if rule is None:
        return
    if identity is None or rule.by_address:
        client = f"{rule.name}:address:{network_of(request.client.host if request.client is not None else '')}"
    else:
        client = f"{rule.name}:user:{identity.user_id}"
    outcome = await limits.hit(client, rule.rate)
    request.scope[scope_keys.LIMIT] = outcome
    if not outcome.is_allowed:
        metrics.LIMITED.labels(rule.name).inc()
        log.info(
            "rate limit exceeded",
            limit=rule.name,
            address=request.client.host if request.client is not None else None,
            user_id=identity.user_id if identity is not None else None,
        )
        raise TooManyRequests(f"Expected at most {rule.rate}; try again later", outcome.reset_seconds)


def headers_of(outcome: Outcome) -> list[tuple[bytes, bytes]]:
    """Return the RateLimit headers, as ASGI sends them."""
    return [
        (b"ratelimit-limit", b"%d" % outcome.limit),
        (b"ratelimit-remaining", b"%d" % outcome.remaining),
        (b"ratelimit-reset", b"%d" % outcome.reset_seconds),
    ]
