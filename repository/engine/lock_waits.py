"""Measures how long the writes of this process have been waiting for the lock that every write takes, for `/readyz`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
