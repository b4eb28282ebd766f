"""Websocket handshakes, subscriptions, requests and closes for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.service import Person, Service, Watcher


async def refusal(service: Service, query: str = "", path: str = "/ws", **options: Any) -> tuple[int, Any]:
    """Return the status and the body of the response to a handshake that must be rejected."""
    with pytest.raises(InvalidStatus) as refused:
        async with connect(service.ws_url.removesuffix("/ws") + path + query, **options):
            pass
    response = refused.value.response
    assert response.headers["Content-Type"] == "application/json"
    return response.status_code, json.loads(response.body)


async def closing(watcher: Watcher, seconds: float = 20.0) -> tuple[int, str]:
    """Read until the connection is closed, and return its close code and reason."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                await watcher.next(seconds)
    except ConnectionClosed as closed:
        assert closed.rcvd is not None, "the connection broke without a close frame"
        return closed.rcvd.code, closed.rcvd.reason


async def subscribed(watcher: Watcher, **members: Any) -> dict[str, Any]:
    """Subscribe, and return the data of the reply."""
    reply = await watcher.ask({"id": "sub", "action": "subscribe", **members})
    assert reply["ok"], reply
    data: dict[str, Any] = reply["data"]
    return data


async def rows_of(watcher: Watcher, topic: str = "movies") -> list[dict[str, Any]]:
    """Read the next snapshot, and return its rows."""
    rows: list[dict[str, Any]] = []
    while True:
        frame = await watcher.next()
        assert (frame["operation"], frame["topic"]) == ("snapshot", topic), frame
        rows += frame["data"]["items"]
        if frame["data"]["done"]:
            return rows


@asynccontextmanager
async def crowd(each: int, *services: Service, query: str) -> AsyncIterator[list[Watcher]]:
    """Open `each` sockets to each of the services."""
    async with AsyncExitStack() as stack:
        sockets = [service.watch(query, ping_interval=None) for service in services for _ in range(each)]
        yield await asyncio.gather(*(stack.enter_async_context(socket) for socket in sockets))


async def bulk_rows(watcher: Watcher, total: int, operation: str = "add_bulk") -> None:
    """Read bulk events until they have `total` rows together; assert that they do not have more."""
    while total > 0:
        total -= (await watcher.expect(operation))["data"]["count"]
    assert total == 0


async def request(watcher: Watcher, method: str, path: str, **members: Any) -> dict[str, Any]:
    """Send a REST request over the socket, and return its reply."""
    identity = f"r{len(watcher.events)}-{method}-{path}"[:200]
    await watcher.send({"id": identity, "action": "request", "method": method, "path": path, **members})
    return await watcher.until(lambda frame: frame.get("reply_to") == identity)


REVOKED_SECONDS = 2.0  # the documented second, and one more for a busy machine


def signed_in(person: Person) -> dict[str, Any]:
    return {"additional_headers": person.bearer}
