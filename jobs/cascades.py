"""Runs a job that renames or deletes a row with very many dependants (`repository.cascades`)."""

from __future__ import annotations

import time

from core.errors import ContentTooLarge
from repository import cascades, jobs
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.jobs import ClaimedJob


class CascadeJob:
    """A claimed job, which continues after its last stored chunk. Call `store` until `is_done`."""

    def __init__(self, database: Database, job: ClaimedJob, owner: str) -> None:
        self._database = database
        self._job = job
        self._owner = owner
        self._started = time.monotonic()
        self._size = cascades.CHUNK_ROWS
        self.done = job.done

    @property
    def is_done(self) -> bool:
        return self.done >= self._job.total

    async def store(self) -> int:
        """Store a chunk, or, if it is too large for one transaction, make the next one smaller.

        Return the number of changed rows. Raises LeaseLost, Forbidden or Unavailable.
        """

        async def work(tx: Transaction) -> int:
            number = await cascades.store_chunk(tx, self._job, self._size)
            left = self._job.total - self.done
            # Rows may have come or gone since `total` was counted.
            count = left if number is None else min(number, left - 1)
            seconds = max(time.monotonic() - self._started, 1e-3)
            rate = int((self.done - self._job.done + count) / seconds)
            await jobs.advance(tx, self._job, self._owner, self.done, count, rate)
            return count

        try:
            count = await self._database.write(work)
        except ContentTooLarge:
            if self._size == 1:
                raise
            self._size = max(1, self._size // 4)
            return 0
        self._size = min(cascades.CHUNK_ROWS, 2 * self._size)
        self.done += count
        return count
