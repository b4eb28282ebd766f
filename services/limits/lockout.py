"""Lockout: slows down password guessing per account and per address, without letting strangers lock an owner out.

Attempts are counted before the password is checked, so that concurrent guesses count too. They are counted whether the
account exists or not, so that a rejection reveals nothing. Three rates limit signing in:

- per name and address; a successful sign-in resets it;
- per address, for all names together;
- per name, for all addresses together. It does not apply to addresses that the account has recently signed in from, so
  a distributed attack locks out attackers and new devices, but not the owner at a known address.
"""

from __future__ import annotations

import hashlib

from core.addresses import network_of
from core.errors import TooManyRequests
from core.identity import name_key
from core.rates import Rate
from repository.accounts import sessions
from repository.engine.database import Database
from services.limits.limiter import Limits

PAIR_RATE = Rate(10, 15 * 60)
ADDRESS_RATE = Rate(100, 15 * 60)
NAME_RATE = Rate(50, 60 * 60)


class Lockout:
    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._limits = limits

    async def try_to_sign_in(self, login: str, user_id: int | None, address: str | None) -> None:
        """Count an attempt to sign in. `user_id` is None when no account has this login. Raises TooManyRequests."""
        if not self._limits.is_on:
            return
        name, place = _digest(login), network_of(address or "")
        await self._count(f"password pair {name} {place}", PAIR_RATE)
        await self._count(f"password address {place}", ADDRESS_RATE)
        # Run for unknown names too, so that the work does not reveal whether an account exists.
        known = await sessions.recent_addresses(self._database, user_id or 0)
        if place not in {network_of(each) for each in known}:
            await self._count(f"password name {name}", NAME_RATE)

    async def signed_in(self, login: str, address: str | None) -> None:
        """Reset the rate per name and address after a successful sign-in or a password reset."""
        await self._limits.clear(f"password pair {_digest(login)} {network_of(address or '')}", PAIR_RATE)

    async def try_old_password(self, user_id: int, address: str | None) -> None:
        """Count an attempt by a signed-in user to prove the current password. Raises TooManyRequests."""
        await self._count(f"password user {user_id} {network_of(address or '')}", PAIR_RATE)

    async def knew_old_password(self, user_id: int, address: str | None) -> None:
        """Reset the count after the user has proven the current password."""
        await self._limits.clear(f"password user {user_id} {network_of(address or '')}", PAIR_RATE)

    async def _count(self, key: str, rate: Rate) -> None:
        outcome = await self._limits.hit(key, rate)
        if not outcome.is_allowed:
            raise TooManyRequests("Too many attempts; try again later", outcome.reset_seconds)


def _digest(login: str) -> str:
    """Return one digest for all spellings of a login, so that the counters store no user names or emails."""
    return hashlib.blake2b(name_key(login).strip().encode(), digest_size=16).hexdigest()
