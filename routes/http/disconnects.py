"""Stop a read whose client has disconnected, so that no other read waits behind a useless database statement."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

# Watching the connection starts only after this time. Most reads are shorter, and watching adds a tenth to the cost of
# such a read.
WATCH_AFTER_SECONDS = 0.1

T = TypeVar("T")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`. Cancel `work` and raise ClientDisconnect if the client disconnects first."""
    loop = asyncio.get_running_loop()
    watches: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        connected.reschedule(loop.time())

    timer = loop.call_later(WATCH_AFTER_SECONDS, lambda: watches.append(loop.create_task(watch(), name="disconnect")))
    try:
        async with asyncio.timeout(None) as connected:
            return await work
    except TimeoutError as error:
        if not connected.expired():
            raise
        raise ClientDisconnect from error
    finally:
        timer.cancel()
        if watches:
            for task in watches:
                task.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
