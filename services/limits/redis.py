"""Moving windows in Redis, shared by all workers, through the package `limits`.

A round trip to Redis costs as much as a small request itself. So a worker leases a share of a large limit, namely a
STEPS-th, and counts hits against this share. A client can exceed a large limit by at most one share per worker; small
limits are exact. Rejections are cached for a moment, so that a flood of requests does not reach Redis.

While Redis is unavailable, `hit` returns None, and the caller counts in memory. A warning is logged at most once a
minute.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from limits import RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.rates import Rate
from services.limits.memory import MAX_CLIENTS, STEPS, Hit

LIMIT_TIMEOUT_SECONDS = 0.25
MAX_REDIS_CONNECTIONS = 8
AWAY_SECONDS = 2.0  # seconds between attempts to reach Redis after a failure
MAX_REFUSED_SECONDS = 1.0
SECONDS_BETWEEN_LOG_LINES = 60.0

Result = TypeVar("Result")
log = structlog.get_logger("limits")


@dataclass(slots=True)
class _Share:
    """The hits that this worker can still allow a client without a call to Redis."""

    left: int = 0
    beyond: int = 0  # the hits that Redis still allows in addition to this share
    until: float = 0.0
    reset_at: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SharedWindows:
    """The windows of all clients in Redis. Workers with the same `prefix` share their windows."""

    def __init__(self, url: str, prefix: str) -> None:
        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_REDIS_CONNECTIONS,
            timeout=LIMIT_TIMEOUT_SECONDS,
            socket_timeout=LIMIT_TIMEOUT_SECONDS,
            socket_connect_timeout=LIMIT_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        pool: Any = self._pool  # RedisStorage accepts this pool, although its annotation says otherwise
        storage = RedisStorage("redis://", implementation="redispy", key_prefix=prefix, connection_pool=pool)
        self._windows = MovingWindowRateLimiter(storage)
        # The least recently seen client comes first.
        self._shares: OrderedDict[tuple[str, Rate], _Share] = OrderedDict()
        self._away_until = 0.0
        self._is_away = False
        self._silent_until = 0.0

    async def close(self) -> None:
        await self._pool.aclose()

    async def hit(self, key: str, rate: Rate) -> Hit | None:
        """Count a hit as `Windows.hit` does, or return None while Redis is unavailable.

        Each request to Redis takes at most LIMIT_TIMEOUT_SECONDS. Cancelling is safe: at worst, a share is leased and
        not used.
        """
        share = self._share_of(key, rate)
        now = time.monotonic()
        if now >= share.until:
            async with share.lock:  # the lock makes concurrent hits lease only one share
                now = time.monotonic()
                if now >= share.until and not await self._take(share, key, rate):
                    return None
        is_allowed = share.left > 0
        if is_allowed:
            share.left -= 1
            if share.left == 0:
                share.until = 0.0
        return Hit(is_allowed, share.beyond + share.left, share.reset_at - now)

    async def clear(self, key: str, rate: Rate) -> None:
        """Forget the hits of a client. Other workers may still reject the client for up to MAX_REFUSED_SECONDS."""
        self._shares.pop((key, rate), None)
        await self._ask(lambda: self._windows.clear(_item(rate), key))

    def _share_of(self, key: str, rate: Rate) -> _Share:
        if (share := self._shares.get((key, rate))) is not None:
            self._shares.move_to_end((key, rate))
            return share
        if len(self._shares) >= MAX_CLIENTS:
            self._shares.popitem(last=False)
        share = self._shares[(key, rate)] = _Share()
        return share

    async def _take(self, share: _Share, key: str, rate: Rate) -> bool:
        """Fill the share, or leave it empty if the limit is exhausted. Return False while Redis is unavailable."""
        item, portion = _item(rate), max(1, rate.amount // STEPS)

        async def work() -> tuple[int, int, float]:
            taken = portion if await self._windows.hit(item, key, cost=portion) else 0
            if not taken and portion > 1:
                taken = int(await self._windows.hit(item, key))
            window = await self._windows.get_window_stats(item, key)
            return taken, window.remaining, max(0.0, window.reset_time - time.time())

        found = await self._ask(work)
        if found is None:
            return False
        share.left, share.beyond, seconds = found
        now = time.monotonic()
        share.reset_at = now + seconds
        share.until = now + (rate.seconds if share.left else min(seconds, MAX_REFUSED_SECONDS))
        return True

    async def _ask(self, work: Callable[[], Awaitable[Result]]) -> Result | None:
        """Return the result of `work`, or None while Redis is unavailable."""
        now = time.monotonic()
        if now < self._away_until:
            return None
        if self._is_away:
            self._away_until = now + AWAY_SECONDS  # this call tests the connection; meanwhile, other calls return None
        try:
            async with asyncio.timeout(LIMIT_TIMEOUT_SECONDS):
                result = await work()
        except (RedisError, OSError, TimeoutError) as error:
            now = time.monotonic()
            self._is_away, self._away_until = True, now + AWAY_SECONDS
            if now >= self._silent_until:
                self._silent_until = now + SECONDS_BETWEEN_LOG_LINES
                reason = str(error) or type(error).__name__
                log.warning("redis unavailable; rate limits counted by each worker", reason=reason)
            return None
        if self._is_away:
            self._is_away, self._away_until = False, 0.0
            log.info("redis available again; rate limits shared by workers")
        return result


def _item(rate: Rate) -> RateLimitItemPerSecond:
    return RateLimitItemPerSecond(rate.amount, rate.seconds, namespace="window")
