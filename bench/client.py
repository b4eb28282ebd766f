"""Somebody who has signed in at a service that is just starting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from tests.support.service import PASSWORD

ATTEMPTS = 200
PAUSE_SECONDS = 0.05


@asynccontextmanager
async def signed_in(port: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a token, when the service on this port is ready."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for _ in range(ATTEMPTS):
            try:
                await client.get("/readyz")
                break
            except httpx.HTTPError:
                await asyncio.sleep(PAUSE_SECONDS)
        await client.post("/auth/register", json={"username": "bench", "password": PASSWORD})
        token = (await client.post("/token", data={"username": "bench", "password": PASSWORD})).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield client
