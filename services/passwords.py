"""Hashing and checking passwords with Argon2id, in a bounded pool of threads.

By design, one hash takes tens of milliseconds of CPU time. A separate pool keeps many concurrent sign-ins from delaying
writes. The bound on queued work keeps the latency of sign-ins low.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from passlib.context import CryptContext

from core.errors import FieldProblem, TooManyRequests
from core.password_rules import check_password
from core.settings import Settings
from core.texts.normal import nfkc

THREADS = 2
MAX_WAITING = 64  # at about 30 ms each, 64 hashes take two seconds of CPU time

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of checking a password. `new_hash` is set when the password is correct but its hash is outdated."""

    is_right: bool
    new_hash: str | None = None


class PasswordHasher:
    """An Argon2id hasher. Each method takes tens of milliseconds of CPU time, so call its methods in a thread."""

    def __init__(self, memory_kib: int, time_cost: int, parallelism: int) -> None:
        self._context = CryptContext(
            schemes=["argon2"],
            argon2__type="ID",
            argon2__memory_cost=memory_kib,
            argon2__time_cost=time_cost,
            argon2__parallelism=parallelism,
        )
        self._dummy_hash = self.hash(secrets.token_urlsafe())

    def hash(self, password: str) -> str:
        """Return the hash of the normal form of a password, because keyboards may encode the same text differently."""
        return str(self._context.hash(nfkc(password)))

    def verify(self, password: str, password_hash: str | None) -> Verdict:
        """Check a password. The work is the same for a user who does not exist (`password_hash` is None)."""
        normal = nfkc(password)
        is_right, new_hash = self._verify(normal, password_hash)
        if not is_right and password != normal:
            # Earlier versions hashed passwords without normalising them.
            is_right, _ = self._verify(password, password_hash)
            new_hash = self.hash(normal) if is_right else None
        return Verdict(is_right, new_hash)

    def _verify(self, password: str, password_hash: str | None) -> tuple[bool, str | None]:
        if password_hash is None:
            self._context.verify(password, self._dummy_hash)
            return False, None
        is_right, new_hash = self._context.verify_and_update(password, password_hash)
        return bool(is_right), new_hash


def hasher_for(settings: Settings) -> PasswordHasher:
    return PasswordHasher(settings.password_memory_kib, settings.password_time_cost, settings.password_parallelism)


class Passwords:
    """A pool of threads that hash and check passwords. Call `close` at the end."""

    def __init__(self, hasher: PasswordHasher, *, needs_mix: bool) -> None:
        self._hasher = hasher
        self._needs_mix = needs_mix
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="passwords")
        self._waiting = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def problems(self, password: str, *, username: str | None, email: str | None, field: str) -> list[FieldProblem]:
        """Return one problem for each rule that a new password breaks. `field` is the password's field in the body."""
        return check_password(password, username=username, email=email, needs_mix=self._needs_mix, loc=("body", field))

    async def hash(self, password: str) -> str:
        """Hash a password as `PasswordHasher.hash` does. Raises TooManyRequests."""
        return await self._run(lambda: self._hasher.hash(password))

    async def verify(self, password: str, password_hash: str | None) -> Verdict:
        """Check a password as `PasswordHasher.verify` does. Raises TooManyRequests."""
        return await self._run(lambda: self._hasher.verify(password, password_hash))

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= MAX_WAITING:
            raise TooManyRequests("Too many people are signing in; try again in a moment", 2)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1
