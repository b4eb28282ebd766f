"""Argon2id hashes of passwords."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from passlib.context import CryptContext


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a password that somebody typed. `new_hash` is set where a right one is stored with other parameters."""

    is_right: bool
    new_hash: str | None = None


class PasswordHasher:
    """Argon2id. Each call takes tens of milliseconds of CPU: call them in a thread."""

    def __init__(self, memory_kib: int, time_cost: int, parallelism: int) -> None:
        self._context = CryptContext(
            schemes=["argon2"],
            argon2__type="ID",
            argon2__memory_cost=memory_kib,
            argon2__time_cost=time_cost,
            argon2__parallelism=parallelism,
        )
        self._nobodys = self.hash(secrets.token_urlsafe())

    def hash(self, password: str) -> str:
        return str(self._context.hash(password))

    def verify(self, password: str, password_hash: str | None) -> Verdict:
        """The same work whether the user exists (`password_hash` is None) or not."""
        if password_hash is None:
            self._context.verify(password, self._nobodys)
            return Verdict(False)
        is_right, new_hash = self._context.verify_and_update(password, password_hash)
        return Verdict(bool(is_right), new_hash)
