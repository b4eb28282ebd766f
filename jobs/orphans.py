"""Files of the storage that no account names: left by a process that died between a file and its row, or by a storage
that was away when they should have been deleted. Under a lease: of all workers, one looks once a period.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog

from core.errors import Unavailable
from gateways.storage import Storage, StoredFile
from repository.accounts import avatars
from repository.engine import leases
from repository.engine.database import Database

PERIOD_SECONDS = 3600.0  # a bucket is paid by the page that is listed
LOOK_SECONDS = 300.0  # whether a period is over, which workers that are often started again would not live to see
MIN_AGE = timedelta(hours=1)  # a picture is in the storage for a moment before its account names it

log = structlog.get_logger("orphans")


class Orphans:
    """One per process; `run` works until cancelled."""

    def __init__(self, database: Database, storage: Storage, owner: str) -> None:
        self._database = database
        self._storage = storage
        self._owner = owner

    async def run(self) -> None:
        while True:
            # Jittered, so that workers that started together do not ask together.
            await asyncio.sleep(LOOK_SECONDS * random.uniform(0.8, 1.2))
            try:
                if await leases.take(self._database, "orphans", self._owner, PERIOD_SECONDS):
                    removed = await remove(self._database, self._storage)
                    log.info("files that no account names were looked for", deleted=removed)
            except Unavailable:
                pass  # the next period tries again
            except Exception as error:
                # Nor is this a reason to end the process.
                log.error("looking for orphans failed", exc_info=error)


async def remove(database: Database, storage: Storage, now: datetime | None = None) -> int:
    """Delete them, page by page. Answers how many files. Raises Unavailable."""
    before = (now or datetime.now(UTC)) - MIN_AGE
    removed = 0
    async for page in storage.pages(avatars.FOLDER):
        orphans = await _orphans(database, [file for file in page if file.modified_at < before])
        await storage.delete(orphans)
        removed += len(orphans)
    return removed


async def _orphans(database: Database, files: Sequence[StoredFile]) -> list[str]:
    # What does not bear a name of ours is not ours to delete.
    avatar_of = {file.name: avatar for file in files if (avatar := avatars.avatar_of(file.name)) is not None}
    named = await avatars.named(database, avatar_of.values()) if avatar_of else set()
    return [name for name, avatar in avatar_of.items() if avatar not in named]
