"""Lockout: slows down password guessing per account and per address, without letting strangers lock an owner out.

Attempts are counted before the password is checked, so that concurrent guesses count too. They are counted even if the
account does not exist, so that a rejection does not reveal whether it does. Three rates limit signing in:

- per name and address; a successful sign-in resets the count;
- per address, for all names together;
- per name, for all addresses together. This rate does not apply to addresses from which the account has recently signed
  in, so a distributed attack locks out attackers and new devices, but not the owner at a known address.

Failed sign-ins, rejected sign-ins and lockouts are logged with the address and, from the logging context, the
request id. Names are logged and counted by their HMAC. Lines about the same name can be matched, but a reader of the
log or of Redis cannot discover names by hashing likely ones, because the HMAC needs a key.
"""

from __future__ import annotations

import hmac

import structlog

from core.errors import TooManyRequests
from core.identity import name_key
from core.network.addresses import network_of
from core.rates import Rate
from repository.accounts import sessions
from repository.engine.database import Database
from services.limits.limiter import Limits

PAIR_RATE = Rate(10, 15 * 60)
ADDRESS_RATE = Rate(100, 15 * 60)
NAME_RATE = Rate(50, 60 * 60)
DIGEST_SIZE = 16

log = structlog.get_logger("sign-in")


class Lockout:
    """Protection against password guessing. Logged names are HMAC digests; their key is derived from `secret_key`."""

    def __init__(self, database: Database, limits: Limits, secret_key: str) -> None:
        self._database = database
        self._limits = limits
        self._key = hmac.digest(secret_key.encode(), b"marquee names", "sha256")

    async def try_to_sign_in(self, login: str, user_id: int | None, address: str | None) -> None:
        """Count an attempt to sign in. `user_id` is None when no account has this login. Raises TooManyRequests."""
        if not self._limits.is_on:
            return
        name, place = self.digest(login), network_of(address or "")
        line = log.bind(name=name, address=address)
        await self._count(f"password pair {name} {place}", PAIR_RATE, line)
        await self._count(f"password address {place}", ADDRESS_RATE, line)
        # This query runs for unknown names too, so that the amount of work does not reveal whether an account exists.
        known = await sessions.recent_addresses(self._database, user_id or 0)
        if place not in {network_of(each) for each in known}:
            await self._count(f"password name {name}", NAME_RATE, line)

    async def signed_in(self, login: str, address: str | None) -> None:
        """Reset the count per name and address after a successful sign-in or a password reset."""
        await self._limits.clear(f"password pair {self.digest(login)} {network_of(address or '')}", PAIR_RATE)

    def failed(self, login: str, address: str | None) -> None:
        """Log a sign-in with a wrong password or an unknown name, without revealing which of the two it was."""
        log.info("sign-in failed", name=self.digest(login), address=address)

    def refused(self, login: str, address: str | None, reason: str) -> None:
        """Log a sign-in that was rejected for a reason other than a wrong name or password."""
        log.info("sign-in rejected", name=self.digest(login), address=address, reason=reason)

    async def try_old_password(self, user_id: int, login: str | None, address: str | None) -> None:
        """Count an attempt by a signed-in user to enter the current password. Raises TooManyRequests.

        The rate per address applies to all accounts together, because one client can register many accounts.
        """
        line, place = self._line(user_id, login, address), network_of(address or "")
        await self._count(f"password user {user_id} {place}", PAIR_RATE, line)
        await self._count(f"password users {place}", ADDRESS_RATE, line)

    async def knew_old_password(self, user_id: int, address: str | None) -> None:
        """Reset the count after a signed-in user has entered the correct current password."""
        await self._limits.clear(f"password user {user_id} {network_of(address or '')}", PAIR_RATE)

    def failed_old_password(self, user_id: int, login: str | None, address: str | None) -> None:
        """Log that a signed-in user entered a wrong current password."""
        self._line(user_id, login, address).info("password check failed")

    def refused_old_password(self, user_id: int, login: str | None, address: str | None, reason: str) -> None:
        """Log that the current password, entered by a signed-in user, was rejected without being checked."""
        self._line(user_id, login, address).info("password check rejected", reason=reason)

    def _line(self, user_id: int, login: str | None, address: str | None) -> structlog.stdlib.BoundLogger:
        name = self.digest(login) if login is not None else None
        line: structlog.stdlib.BoundLogger = log.bind(user_id=user_id, name=name, address=address)
        return line

    async def _count(self, key: str, rate: Rate, line: structlog.stdlib.BoundLogger) -> None:
        outcome = await self._limits.hit(key, rate)
        if not outcome.is_allowed:
            line.warning("password attempts locked out", seconds=outcome.reset_seconds)
            raise TooManyRequests("Too many attempts; try again later", outcome.reset_seconds)

    def digest(self, login: str) -> str:
        """Return the digest of a login. All equivalent spellings have the same digest."""
        return hmac.digest(self._key, name_key(login).strip().encode(), "sha256")[:DIGEST_SIZE].hex()
