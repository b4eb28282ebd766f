"""Receiving and converting pictures, with bounds on how many are in memory at once.

Decoding takes up to a few seconds and 200 MB, so a single thread decodes, and the queue is short. Concurrent uploads
and queued pictures are bounded per worker, per user and per network, so a client with a slow connection or with many
accounts occupies only its own share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from services.limits.in_progress import InProgress, Uploader
from services.pictures import images

THREADS = 1
MAX_WAITING = 8  # The limit for the queue, including the picture that is being converted.
MAX_WAITING_PER_USER = 2
MAX_WAITING_PER_ADDRESS = 4  # Half of the queue, shared by all users from one address.
MAX_UPLOADS = 32  # The limit for concurrent uploads to this worker.
MAX_UPLOADS_PER_USER = 4
MAX_UPLOADS_PER_ADDRESS = 16  # Half of the uploads, shared by all users from one address.


class Pictures:
    """The picture thread of a process, with its queue. Call `close` at the end.

    If `limits_clients` is false, there are no limits per user and per address.
    """

    def __init__(self, *, limits_clients: bool) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
        uploads = (MAX_UPLOADS, MAX_UPLOADS_PER_USER, MAX_UPLOADS_PER_ADDRESS)
        waiting = (MAX_WAITING, MAX_WAITING_PER_USER, MAX_WAITING_PER_ADDRESS)
        self._receiving = InProgress("concurrent uploads", *uploads, limits_clients)
        self._waiting = InProgress("queued pictures", *waiting, limits_clients)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def receiving(self, by: Uploader) -> Iterator[None]:
        """Count an upload while its body is read. Raises TooManyRequests."""
        with self._receiving.take(by):
            yield

    async def squares(self, content: bytes, sides: Sequence[int], by: Uploader) -> list[bytes]:
        """Run `images.squares` in the picture thread. Raises InvalidInput or TooManyRequests."""
        with self._waiting.take(by):
            return await asyncio.get_running_loop().run_in_executor(self._threads, images.squares, content, sides)
