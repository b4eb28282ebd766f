"""A free port for a service, and a signed-in client for a service that is starting."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

PASSWORD = "sewers of Vienna"
ATTEMPTS = 200
PAUSE_SECONDS = 0.05


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def signed_in(port: int) -> AsyncIterator[httpx.AsyncClient]:
    """Wait until the service on this port is ready, register, and yield a client with a token."""
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
