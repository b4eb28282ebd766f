"""Receiving pictures and making ours of them, with a bound on how many are in memory at once.

Decoding takes up to a second and two hundred megabytes, so one thread of its own does it, and few wait for it. What is
being received is bounded, too, and a client that sends slowly takes its places from nobody but itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from core.errors import TooManyRequests
from services.pictures import images

THREADS = 1
MAX_WAITING = 8
MAX_UPLOADS = 32  # at once, of this worker
MAX_UPLOADS_PER_USER = 4


class Pictures:
    """One per process. `close` when done."""

    def __init__(self, *, max_uploads_per_user: int | None) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
        self._max_per_user = max_uploads_per_user
        self._receiving: Counter[int] = Counter()
        self._waiting = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def receiving(self, user_id: int) -> Iterator[None]:
        """While a body is read. Raises TooManyRequests."""
        if self._max_per_user is not None and self._receiving[user_id] >= self._max_per_user:
            raise TooManyRequests(f"Expected at most {self._max_per_user} uploads of a user at once", 2)
        if self._receiving.total() >= MAX_UPLOADS:
            raise TooManyRequests("Too many pictures are being received; try again in a moment", 2)
        self._receiving[user_id] += 1
        try:
            yield
        finally:
            self._receiving[user_id] -= 1
            if not self._receiving[user_id]:
                del self._receiving[user_id]

    async def squares(self, content: bytes, sides: Sequence[int]) -> list[bytes]:
        """`pictures.squares` in the thread. Raises InvalidInput, TooManyRequests."""
        if self._waiting >= MAX_WAITING:
            raise TooManyRequests("Too many pictures are waiting; try again in a moment", 2)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, images.squares, content, sides)
        finally:
            self._waiting -= 1
