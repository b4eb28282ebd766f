"""Run the measured service in its own process, and connect clients to it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "sewers of Vienna"
START_ATTEMPTS = 400
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Service:
    port: int
    pid: int
    probe: Path  # written by `bench.server`


def argument(place: int, default: int) -> int:
    """Return the command-line argument at index `place` as an integer, or the default if it is missing."""
    return int(sys.argv[place]) if len(sys.argv) > place else default


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, at the resolution of the scheduler."""
    return time.clock_gettime((~pid << 3) | 2)  # the clock's id, as clock_getcpuclockid(3) returns it on Linux


@contextmanager
def running(
    module: str = "bench.server", settings: Mapping[str, str] | None = None, root: Path = ROOT
) -> Iterator[Service]:
    """Run a module of the checkout `root` as a service on an empty SQLite database.

    The service runs in a new folder, so that no `.env` file affects the measurement.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.json"
        own = {
            "PYTHONPATH": str(root),
            "PORT": str(port),
            "DATABASE_URL": f"sqlite:///{folder}/bench.db",
            "MAIL_FOLDER": f"{folder}/mail",
        }
        command = [sys.executable, "-m", module, str(probe)]
        server = subprocess.Popen(
            command, env=os.environ | own | dict(settings or {}), cwd=folder, stdout=subprocess.DEVNULL
        )
        try:
            yield Service(port, server.pid, probe)
        finally:
            server.terminate()
            server.wait()


@asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Wait until the service is ready, and yield a client for it."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
        for _ in range(START_ATTEMPTS):
            try:
                await client.get("/readyz")
                break
            except httpx.HTTPError:
                await asyncio.sleep(PAUSE_SECONDS)
        yield client


@asynccontextmanager
async def signed_in(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Register a user, and yield a client that sends the user's token."""
    async with client_of(service) as client:
        await client.post("/auth/register", json={"username": "bench", "password": PASSWORD})
        token = (await client.post("/token", data={"username": "bench", "password": PASSWORD})).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield client
