"""Rate limits of routes: the groups that are counted together, and the rule of each route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import structlog
from starlette.requests import HTTPConnection

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
# Requests of these groups are counted by address even with a token, because one client may have many accounts.
BY_ADDRESS = frozenset({LimitGroup.SIGN_IN, LimitGroup.REGISTER, LimitGroup.MAIL})


@dataclass(frozen=True)
class Rule:
    """The rate limit of a route. `name` is the route's group, or the route itself when it has its own limit."""

    name: str
    rate: Rate
    by_address: bool
    address_rate: Rate | None = None  # the joint rate of all signed-in users from one address; None if `by_address`

    @cached_property
    def item(self) -> bytes:
        """The name as an item of a structured field."""
        return f'"{self.name}"'.encode()

    @cached_property
    def shared_item(self) -> bytes:
        """The name of the joint rate as an item of a structured field."""
        return f'"{self.name} by all users of an address"'.encode()

    @cached_property
    def policy(self) -> bytes:
        """The value of `RateLimit-Policy` for a request that counts for its address alone."""
        return _policy(self.item, self.rate)

    @cached_property
    def policies_of_user(self) -> bytes:
        """The value of `RateLimit-Policy` for a request that counts for its user."""
        if self.address_rate is None:
            return self.policy
        return self.policy + b", " + _policy(self.shared_item, self.address_rate)


def _policy(item: bytes, rate: Rate) -> bytes:
    return b"%b;q=%d;w=%d" % (item, rate.amount, rate.seconds)


@dataclass(frozen=True, slots=True)
class Counted:
    """A counted request: the outcome, the item that names the rate it is about, and all policies that apply."""

    outcome: Outcome
    item: bytes
    policies: bytes


Rules = Mapping[tuple[str, str], Rule]
UNMATCHED = ("", "")  # the key of the rule for requests that no operation handles: unknown paths and methods


def rules(groups: Mapping[tuple[str, str], LimitGroup], limits: RateLimits, users_per_address: int) -> Rules:
    """Return the rule of each (method, path) with a rate limit. Raises SettingsError for unknown routes in `limits`.

    All users from one address together have `users_per_address` times the rate of one user.
    """
    if not limits.is_on:
        return {}
    known = {(method, nameless(path)) for method, path in groups}
    for each in limits.routes:
        if each.route not in known:
            raise SettingsError(f"RATE_LIMITS: there is no route {each.method} {each.path}.")
    rates = {each.route: each.rate for each in limits.routes}
    # Requests for unknown paths count towards the limit for anonymous reads, so that such requests cannot evade it.
    found = {UNMATCHED: Rule(LimitGroup.READ.value, RATES[LimitGroup.READ], by_address=True)}
    for (method, path), group in groups.items():
        own = rates.get((method, nameless(path)))
        rate = own or RATES.get(group)
        if rate is not None:
            by_address = group in BY_ADDRESS
            shared = None if by_address else Rate(rate.amount * users_per_address, rate.seconds)
            found[method, path] = Rule(f"{method} {path}" if own else group.value, rate, by_address, shared)
    return found


async def count(request: HTTPConnection, limits: Limits, rule: Rule | None, identity: Identity | None) -> None:
    """Count a request for its user and for all users from the user's address. Raises TooManyRequests.

    If there is no identity, or the rule is `by_address`, count the request for the address alone.
    """
    if rule is None:
        return
    network = network_of(request.client.host if request.client is not None else "")
    if identity is None or rule.by_address:
        policies = rule.policy
        outcome = await limits.hit(f"{rule.name}:address:{network}", rule.rate)
    else:
        policies = rule.policies_of_user
        outcome = await limits.hit(f"{rule.name}:user:{identity.user_id}", rule.rate)
        if outcome.is_allowed and rule.address_rate is not None and network:
            shared = await limits.hit(f"{rule.name}:users of:{network}", rule.address_rate)
            if not shared.is_allowed:
                request.scope[scope_keys.LIMIT] = Counted(shared, rule.shared_item, policies)
                metrics.LIMITED.labels(rule.name).inc()
                message = f"Expected at most {rule.address_rate} from all users of {network}; try again later"
                raise TooManyRequests(message, shared.reset_seconds)
    request.scope[scope_keys.LIMIT] = Counted(outcome, rule.item, policies)
    if not outcome.is_allowed:
        metrics.LIMITED.labels(rule.name).inc()
        log.info(
            "rate limit exceeded",
            limit=rule.name,
            address=request.client.host if request.client is not None else None,
            user_id=identity.user_id if identity is not None else None,
        )
        raise TooManyRequests(f"Expected at most {rule.rate}; try again later", outcome.reset_seconds)


def headers_of(counted: Counted) -> list[tuple[bytes, bytes]]:
    """Return the RateLimit headers in the form that ASGI sends: three of an early draft of the standard, which many
    clients know, and the two structured fields of the current draft (draft-ietf-httpapi-ratelimit-headers).
    """
    outcome = counted.outcome
    return [
        (b"ratelimit-limit", b"%d" % outcome.limit),
        (b"ratelimit-remaining", b"%d" % outcome.remaining),
        (b"ratelimit-reset", b"%d" % outcome.reset_seconds),
        (b"ratelimit-policy", counted.policies),
        (b"ratelimit", b"%b;r=%d;t=%d" % (counted.item, outcome.remaining, outcome.reset_seconds)),
    ]
