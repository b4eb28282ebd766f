"""A feed without a service around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from realtime.feed.feed import Feed
from repository.engine.database import Database


@asynccontextmanager
async def following(database: Database, *, runs: bool = True) -> AsyncIterator[tuple[Feed, list[int]]]:
    """Start a feed that rarely polls, as with a shared bus. Yield it and the sequence numbers that its listener got."""
    followed = Feed(database, has_shared_bus=True, is_bus_deaf=lambda: False)
    seen: list[int] = []
    followed.on_events.append(lambda events: seen.extend(event.seq for event in events))
    await followed.start()
    running = asyncio.create_task(followed.run()) if runs else None
    yield followed, seen
    if running is not None:
        assert not running.done(), running
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
