"""The rate limiter for requests, password attempts and email address changes.

The caller identifies each client by a key. Each pair of key and rate has its own moving window. The window is in Redis
if Redis is configured, so that all workers count together, and otherwise in memory. While Redis is unavailable, each
worker counts in memory, starting at zero, because a Redis outage must not lift the limits on guessing passwords.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from core import metrics
from core.rates import Rate
from services.limits.memory import Windows
from services.limits.redis import SharedWindows


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state of a window after a hit. `remaining` grows again after `reset_seconds`, which is at least 1."""

    is_allowed: bool
    limit: int
    remaining: int
    reset_seconds: int


class Limits:
    """The rate limiter of a process. If `is_on` is false, every hit is allowed and none is counted."""

    def __init__(self, *, is_on: bool = True, shared: SharedWindows | None = None) -> None:
        self.is_on = is_on
        self._shared = shared
        self._own: dict[Rate, Windows] = {}

    async def close(self) -> None:
        if self._shared is not None:
            await self._shared.close()

    async def hit(self, key: str, rate: Rate) -> Outcome:
        """Count a hit if the window has room for it. Never raises; waits at most as long as `SharedWindows.hit`."""
        if not self.is_on:
            return Outcome(True, rate.amount, rate.amount, 1)
        hit = await self._shared.hit(key, rate) if self._shared is not None else None
        if hit is None:
            if self._shared is not None:
                metrics.LIMITS_NOT_SHARED.inc()
            hit = self._windows_of(rate).hit(key, time.monotonic())
        return Outcome(hit.is_allowed, rate.amount, hit.remaining, max(1, math.ceil(hit.reset_seconds)))

    async def clear(self, key: str, rate: Rate) -> None:
        """Forget the hits of a client."""
        if self._shared is not None:
            await self._shared.clear(key, rate)
        self._windows_of(rate).clear(key)

    def _windows_of(self, rate: Rate) -> Windows:
        # There are only a few rates, because they come from the settings and the code.
        if rate not in self._own:
            self._own[rate] = Windows(rate)
        return self._own[rate]
