"""Hashing and checking passwords in threads of their own, with a bound on those who wait.

Argon2 takes tens of milliseconds of a core on purpose. In the threads that everything else uses, a crowd that signs in
would hold up writes; without a bound it would wait for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from core.errors import FieldProblem, TooManyRequests
from core.password_rules import check_password
from core.settings import Settings
from services.password_hasher import PasswordHasher, Verdict

THREADS = 2
MAX_WAITING = 64  # at about 30 ms each, two seconds

T = TypeVar("T")


def hasher_for(settings: Settings) -> PasswordHasher:
    return PasswordHasher(settings.password_memory_kib, settings.password_time_cost, settings.password_parallelism)


class Passwords:
    """One per process. `close` when done."""

    def __init__(self, hasher: PasswordHasher, *, needs_mix: bool) -> None:
        self._hasher = hasher
        self._needs_mix = needs_mix
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="passwords")
        self._waiting = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def problems(self, password: str, *, username: str | None, email: str | None, field: str) -> list[FieldProblem]:
        """What keeps this from being the new password of such an account; `field` is where the body named it."""
        return check_password(password, username=username, email=email, needs_mix=self._needs_mix, loc=("body", field))

    async def hash(self, password: str) -> str:
        """Raises TooManyRequests."""
        return await self._run(lambda: self._hasher.hash(password))

    async def verify(self, password: str, password_hash: str | None) -> Verdict:
        """Raises TooManyRequests. The same work whether there is a hash or not."""
        return await self._run(lambda: self._hasher.verify(password, password_hash))

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= MAX_WAITING:
            raise TooManyRequests("Too many people are signing in; try again in a moment", 2)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1
