"""Receiving and converting pictures, with bounds on how many are in memory at once.

Decoding takes up to a second and 200 MB, so a single thread does it and the queue is short. Concurrent uploads are
bounded per worker and per user, so a slow client occupies only its own share.
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
MAX_UPLOADS = 32  # concurrent uploads on this worker
MAX_UPLOADS_PER_USER = 4


class Pictures:
    """One per process. `close` it at the end."""

    def __init__(self, *, max_uploads_per_user: int | None) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
        self._max_per_user = max_uploads_per_user
        self._receiving: Counter[int] = Counter()
        self._waiting = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def receiving(self, user_id: int) -> Iterator[None]:
        """Count an upload while its body is read. Raises TooManyRequests."""
        if self._max_per_user is not None and self._receiving[user_id] >= self._max_per_user:
            raise TooManyRequests(f"Expected at most {self._max_per_user} concurrent uploads per user", 2)
        if self._receiving.total() >= MAX_UPLOADS:
            raise TooManyRequests("Too many pictures are being uploaded; try again in a moment", 2)
        self._receiving[user_id] += 1
        try:
            yield
        finally:
            self._receiving[user_id] -= 1
            if not self._receiving[user_id]:
                del self._receiving[user_id]

    async def squares(self, content: bytes, sides: Sequence[int]) -> list[bytes]:
        """Run `images.squares` in the thread. Raises InvalidInput and TooManyRequests."""
        if self._waiting >= MAX_WAITING:
            raise TooManyRequests("Too many pictures are being converted; try again in a moment", 2)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, images.squares, content, sides)
        finally:
            self._waiting -= 1
