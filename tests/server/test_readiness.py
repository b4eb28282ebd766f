"""`/readyz` says what is wrong with the database, and the service recovers by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx

from tests.support.locks import head_locked
from tests.support.requests import ok
from tests.support.service import Service, eventually


async def database_check(client: httpx.AsyncClient, status: int) -> str | None:
    """Return what `/readyz` says about the database when it has this status, None otherwise."""
    answer = await client.get("/readyz")
    return str(answer.json()["checks"]["database"]) if answer.status_code == status else None


async def is_ready(client: httpx.AsyncClient) -> bool:
    return await database_check(client, 200) == "ok"


async def test_a_foreign_lock_on_the_log_is_reported(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.anyone() as operator:
        async with head_locked(service.database_url):
            write = asyncio.create_task(alice.http.post("/movies", json={"title": "Blocked"}))
            said = await eventually(lambda: database_check(operator, 503), "not ready")
            assert said.startswith("writes have been waiting for a lock for ")
            await ok(operator.get("/movies"))
        await ok(write, 201)
        await eventually(lambda: is_ready(operator), "ready again")
