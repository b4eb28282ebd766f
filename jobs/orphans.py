"""Deletion of orphans: stored pictures that no account refers to.

An orphan remains when a process dies after it has written a file but before it has stored the row, or when the storage
is down at the time of a deletion. In each period, only the worker that holds the lease scans.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog

from core.errors import Unavailable
from gateways.storage import Storage, StoredFile
from repository import leases
from repository.accounts import avatars
from repository.engine.database import Database

PERIOD_SECONDS = 3600.0  # Scans are rare, because S3 services charge for each page of a bucket listing.
CHECK_SECONDS = 300.0  # Workers try to take the lease often, so that a scan takes place even if they restart often.
MIN_AGE = timedelta(hours=1)  # A newer file may belong to an account that does not refer to it yet.

log = structlog.get_logger("orphans")


class Orphans:
    """One per process. `run` continues until cancelled."""

    def __init__(self, database: Database, storage: Storage, owner: str) -> None:
        self._database = database
        self._storage = storage
        self._owner = owner

    async def run(self) -> None:
        while True:
            # Jittered, so that workers that started together do not compete for the lease.
            await asyncio.sleep(CHECK_SECONDS * random.uniform(0.8, 1.2))
            try:
                if await leases.take(self._database, "orphans", self._owner, PERIOD_SECONDS):
                    removed = await remove(self._database, self._storage)
                    log.info("orphan scan finished", deleted=removed)
            except Unavailable:
                pass  # the scan is retried later
            except Exception as error:
                # An error here must not end the process, which also serves clients.
                log.error("orphan scan failed", exc_info=error)


async def remove(database: Database, storage: Storage, now: datetime | None = None) -> int:
    """Delete all orphans older than MIN_AGE, page by page. Return how many files were deleted. Raises Unavailable."""
    before = (now or datetime.now(UTC)) - MIN_AGE
    removed = 0
    async for page in storage.pages(avatars.FOLDER):
        orphans = await _orphans(database, [file for file in page if file.modified_at < before])
        await storage.delete(orphans)
        removed += len(orphans)
    return removed


async def _orphans(database: Database, files: Sequence[StoredFile]) -> list[str]:
    # Files whose names are not names of avatars were not written by the service, so they are left alone.
    avatar_of = {file.name: avatar for file in files if (avatar := avatars.avatar_of(file.name)) is not None}
    named = await avatars.named(database, avatar_of.values()) if avatar_of else set()
    return [name for name, avatar in avatar_of.items() if avatar not in named]
