"""Run a feed without a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from realtime.feed.feed import Feed
from repository.engine.database import Database


@asynccontextmanager
async def following(database: Database, *, runs: bool = True) -> AsyncIterator[tuple[Feed, list[int]]]:
    """Start a feed that rarely polls, as with a shared bus; yield the feed and the sequence numbers it delivers."""
    followed = Feed(database, has_shared_bus=True, is_bus_deaf=lambda: False)
    seen: list[int] = []
    followed.on_events.append(lambda events: seen.extend(event.seq for event in events))
    await followed.start()
    async with running(followed) if runs else nullcontext():
        yield followed, seen


@asynccontextmanager
async def running(followed: Feed) -> AsyncIterator[None]:
    """Run a feed, which polls the log immediately, until the end of the block."""
    task = asyncio.create_task(followed.run())
    yield
    assert not task.done(), task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
