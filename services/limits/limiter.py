"""How often a client may do a thing: one object for requests and for whatever else is counted, such as guesses of
passwords.

A client is a key that the caller makes up, and each (key, rate) has its own moving window: in Redis when there is one,
so that all workers count together, else in memory.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from core.rates import Rate
from services.limits.memory import Windows
from services.limits.redis import SharedWindows


@dataclass(frozen=True, slots=True)
class Outcome:
    """`reset_seconds`: until there is more room than now, at least 1."""

    is_allowed: bool
    limit: int
    remaining: int
    reset_seconds: int


class Limits:
    """One per process. When it is off, everything is allowed and nothing is counted."""

    def __init__(self, *, is_on: bool = True, shared: SharedWindows | None = None) -> None:
        self.is_on = is_on
        self._shared = shared
        self._own: dict[Rate, Windows] = {}

    async def close(self) -> None:
        if self._shared is not None:
            await self._shared.close()

    async def hit(self, key: str, rate: Rate) -> Outcome:
        """Count this one if there is room for it. Never raises, and never waits long: see `SharedWindows`."""
        if not self.is_on:
            return Outcome(True, rate.amount, rate.amount, 1)
        if self._shared is not None:
            is_allowed, remaining, seconds = await self._shared.hit(key, rate)
        else:
            is_allowed, remaining, seconds = self._windows_of(rate).hit(key, time.monotonic())
        return Outcome(is_allowed, rate.amount, remaining, max(1, math.ceil(seconds)))

    async def clear(self, key: str, rate: Rate) -> None:
        """Forget what was counted."""
        if self._shared is not None:
            await self._shared.clear(key, rate)
        else:
            self._windows_of(rate).clear(key)

    def _windows_of(self, rate: Rate) -> Windows:
        """Rates are those of the settings and of the code: few."""
        windows = self._own.get(rate)
        if windows is None:
            windows = self._own[rate] = Windows(rate)
        return windows
