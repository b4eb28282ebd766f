"""Receiving and converting pictures, with bounds on how many are in memory at once.

Decoding takes up to a few seconds and 200 MB, so a single thread decodes, and the queue is short. Concurrent uploads
and queued pictures are bounded per worker, per user and per network, so a client with a slow connection or with many
accounts occupies only its own share.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from core.errors import TooManyRequests
from core.network.addresses import network_of
from services.pictures import images

THREADS = 1
MAX_WAITING = 8  # The limit for the queue, including the picture that is being converted.
MAX_WAITING_PER_USER = 2
MAX_WAITING_PER_ADDRESS = 4  # Half of the queue, shared by all users from one address.
MAX_UPLOADS = 32  # The limit for concurrent uploads to this worker.
MAX_UPLOADS_PER_USER = 4
MAX_UPLOADS_PER_ADDRESS = 16  # Half of the uploads, shared by all users from one address.
RETRY_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Uploader:
    """The user who uploads a picture. `address` is None if the address is not known."""

    user_id: int
    address: str | None


@dataclass(slots=True)
class _Queue:
    """A bounded set of pictures in progress. `what` is the plural noun for them in error messages."""

    what: str
    max_total: int
    max_per_user: int
    max_per_address: int
    limits_clients: bool
    _counted: Counter[int | str] = field(default_factory=Counter)  # the number of pictures, by user id and by network
    _total: int = 0

    @contextmanager
    def take(self, by: Uploader) -> Iterator[None]:
        """Count a picture until the context ends. Raises TooManyRequests."""
        network = network_of(by.address or "")
        if self.limits_clients:
            if self._counted[by.user_id] >= self.max_per_user:
                raise self._refusal(f"Expected at most {self.max_per_user} {self.what} per user")
            if self._counted[network] >= self.max_per_address:
                raise self._refusal(f"Expected at most {self.max_per_address} {self.what} from {network}")
        if self._total >= self.max_total:
            raise self._refusal(f"Expected at most {self.max_total} {self.what}")
        self._total += 1
        self._counted.update((by.user_id, network))
        try:
            yield
        finally:
            self._total -= 1
            self._counted.subtract((by.user_id, network))
            self._counted = +self._counted

    def _refusal(self, message: str) -> TooManyRequests:
        return TooManyRequests(f"{message}; try again in a moment", RETRY_SECONDS)


class Pictures:
    """The picture thread of a process, with its queue. Call `close` at the end.

    If `limits_clients` is false, there are no limits per user and per address.
    """

    def __init__(self, *, limits_clients: bool) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
        uploads = (MAX_UPLOADS, MAX_UPLOADS_PER_USER, MAX_UPLOADS_PER_ADDRESS)
        waiting = (MAX_WAITING, MAX_WAITING_PER_USER, MAX_WAITING_PER_ADDRESS)
        self._receiving = _Queue("concurrent uploads", *uploads, limits_clients)
        self._waiting = _Queue("queued pictures", *waiting, limits_clients)

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
