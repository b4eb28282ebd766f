"""Guessing passwords is slowed down, per account and per address, and no stranger can lock anybody out by it.

Attempts are counted before the password is looked at, so that guesses at once count, too, and whether the account
exists or not, so that a refusal says nothing. Three rates hold for signing in:

- of one name from one address, which a success sets back;
- of one address, whatever the names;
- of one name from all addresses. Addresses from which the account was signed in of late are free of it: many strangers
  who guess together shut out each other and whoever comes from somewhere new, but not the owner at home.
"""

from __future__ import annotations

import hashlib

from core.errors import TooManyRequests
from core.identity import name_key
from core.rates import Rate
from repository.accounts import sessions
from repository.engine.database import Database
from services.limits.clients import network_of
from services.limits.limiter import Limits

PAIR_RATE = Rate(10, 15 * 60)
ADDRESS_RATE = Rate(100, 15 * 60)
NAME_RATE = Rate(50, 60 * 60)


class Lockout:
    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._limits = limits

    async def try_to_sign_in(self, login: str, user_id: int | None, address: str | None) -> None:
        """Count an attempt; `user_id` is whose name it is, if it is anybody's. Raises TooManyRequests."""
        if not self._limits.is_on:
            return
        name, place = _digest(login), network_of(address or "")
        await self._count(f"password pair {name} {place}", PAIR_RATE)
        await self._count(f"password address {place}", ADDRESS_RATE)
        # Asked for nobody, too: a refusal takes the same work for names that do not exist.
        known = await sessions.recent_addresses(self._database, user_id or 0)
        if place not in {network_of(each) for each in known}:
            await self._count(f"password name {name}", NAME_RATE)

    async def signed_in(self, login: str, address: str | None) -> None:
        await self._limits.clear(f"password pair {_digest(login)} {network_of(address or '')}", PAIR_RATE)

    async def try_old_password(self, user_id: int, address: str | None) -> None:
        """Count an attempt of somebody who is signed in to show the password again. Raises TooManyRequests."""
        await self._count(f"password user {user_id} {network_of(address or '')}", PAIR_RATE)

    async def knew_old_password(self, user_id: int, address: str | None) -> None:
        await self._limits.clear(f"password user {user_id} {network_of(address or '')}", PAIR_RATE)

    async def _count(self, key: str, rate: Rate) -> None:
        outcome = await self._limits.hit(key, rate)
        if not outcome.is_allowed:
            raise TooManyRequests("Too many attempts; try again later", outcome.reset_seconds)


def _digest(login: str) -> str:
    """All spellings of a name are one; no name or address of anybody lies where the counters are."""
    return hashlib.blake2b(name_key(login).strip().encode(), digest_size=16).hexdigest()
