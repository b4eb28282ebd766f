"""The waits of the writes of this process: their deadline, and how long they have been waiting for the lock that every
write takes, for `/readyz`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

# The time of a write, with all its waits and attempts. On SQLite, it ends when the write has the lock that every write
# takes, so it does not include the write's own work. On PostgreSQL, where each statement may wait for a lock, it ends
# when COMMIT is sent, so it includes the work. The client gets its 503 within 15 s.
WRITE_SECONDS = 14.0


def lift(limit: asyncio.Timeout) -> float:
    """Lift the limit and return the seconds that were left. Raises TimeoutError if none are left.

    A limit may expire without an exception, because before Python 3.12, `wait_for`, which the pools use, may swallow a
    cancellation.
    """
    if limit.expired():
        raise TimeoutError
    when = limit.when()
    limit.reschedule(None)
    return max(0.0, when - asyncio.get_running_loop().time()) if when is not None else 0.0


class LockWaits:
    """The waits for SQLite's write lock or, on PostgreSQL, for the row of the log's head."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # the start of each wait, oldest first
        self._next = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the duration of the `with` block as a wait."""
        self._next += 1
        number = self._next
        self._since[number] = time.monotonic()
        try:
            yield
        finally:
            del self._since[number]

    @property
    def seconds(self) -> float:
        """The time since the oldest wait began; 0 when there is none."""
        oldest = next(iter(self._since.values()), None)
        return time.monotonic() - oldest if oldest is not None else 0.0
